"""What does a server cost? Throughput and latency of `retrieval-jax serve` beside the searchers themselves.

    python benchmarks/serving.py WORK_DIR [--searchers bm25 scann atomic planned fused] [--quick]
    python benchmarks/serving.py WORK_DIR --processes 2
    python benchmarks/serving.py WORK_DIR --abuse 60

WORK_DIR is a finished work folder, such as that of `retrieval-jax demo`; searchers that it lacks are left
out, with a line. Of each searcher, one process searches for the collection's queries in batches of 32 and one
by one, 10 passages each (`Searcher.search`), and another one serves the same searcher, or several do, each
for its share of the clients (--processes); these run in a third process. All take turns in one run. No
answer comes from the server's cache, and with `max_queue_seconds=60` few queries are refused, which some of
128 clients of a slow searcher else are; where any are, a line says so in place of a row. "1 (lists)" is a
client that sends 32 queries at a time. CPU is what an answer took in the servers' processes and in the
clients', which share the machine's cores.
With sentence-transformers installed, the dual encoder's vectors are asked for, too, beside the same weights
behind the plainest FastAPI route, unless they are a decoder's state, which that library has no name for.
--quick takes the first two searchers, and less than a minute.

--abuse SECONDS asks for four times as much as the last searcher can answer (or, of a quick one, for as much
as this process can: `flood_over_capacity` says), while others send what no client should: see `_abuse.py`.

The last line is JSON: by searcher `throughput_over_batched` (32 clients, over batches of 32),
`lists_over_batched` (one client with lists of 32) and `added_ms` (one client, over a single `search`);
`embeddings_over_sentence_transformers`, by clients.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import operator
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote_plus
from urllib.request import Request, urlopen

import _abuse
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SEARCHERS = ("bm25", "scann", "atomic", "naive", "planned", "fused")
CLIENTS, HITS, BATCH = (1, 8, 32, 128), 10, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--searchers", nargs="+", default=SEARCHERS)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement, or eight batches")
    parser.add_argument("--processes", type=int, default=1, help="servers of each searcher")
    parser.add_argument("--abuse", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--direct", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.direct:
        return direct(options.work, *options.direct)
    names = [
        name for name in options.searchers if (folder_of(options.work, name) / "manifest.json").is_file()
    ]
    if left_out := [name for name in options.searchers if name not in names]:
        print(f"not in {options.work}: {', '.join(left_out)}", file=sys.stderr)
    names, clients = (names[:2], (1, 32)) if options.quick else (names, CLIENTS)
    seconds = 1 if options.quick else options.seconds
    queries = judged_queries(options.work)
    console = Console(stderr=True, width=120)
    if options.abuse:
        name = names[-1]
        with serving(options.work, [*{"bm25", name}]) as (process, address):
            report = _abuse.run(process, address, name, queries, options.abuse)
        _abuse.show(report, console)
        print(json.dumps({"abuse": report}))
        return None
    table = Table(
        "searcher", "clients", "queries/s", "over batches", "p50 ms", "p99 ms", "search alone ms",
        "CPU ms, server", "clients",
    )  # fmt: skip
    figures: dict[str, dict] = {"throughput_over_batched": {}, "lists_over_batched": {}, "added_ms": {}}
    for name in names:
        requests = [search_request(name, query) for query in queries]
        lists = [list_request(name, some) for some in in_batches(queries)]
        with contextlib.ExitStack() as stack:
            alone = stack.enter_context(searching(options.work, name))
            patient = (serving(options.work, [name], max_queue_seconds=60) for _ in range(options.processes))
            servers, addresses = zip(*map(stack.enter_context, patient), strict=True)
            for count, sent in [*((count, requests) for count in clients), (1, lists)]:
                batched = alone("batched", seconds)
                single = alone("single", seconds) if count == 1 and sent is requests else None
                try:
                    lasts = max(seconds, 8 * BATCH / batched)
                    found = load(addresses, sent, count, lasts, [server.pid for server in servers])
                except Refused as refused:  # 128 clients of a slow searcher wait longer than a request may
                    print(f"{name}, {count} clients: {refused}", file=sys.stderr)
                    continue
                batched = statistics.mean([batched, alone("batched", seconds)])
                each = BATCH if sent is lists else 1
                ratio = each * found["rate"] / batched
                if sent is lists:
                    figures["lists_over_batched"][name] = round(ratio, 3)
                elif count == 32:
                    figures["throughput_over_batched"][name] = round(ratio, 3)
                if single:
                    figures["added_ms"][name] = round(1000 * (found["p50"] - single), 2)
                table.add_row(
                    name, "1 (lists)" if sent is lists else str(count), f"{each * found['rate']:,.0f}",
                    f"{ratio:.2f}", f"{1000 * found['p50']:.2f}", f"{1000 * found['p99']:.2f}",
                    f"{1000 * single:.2f}" if single else "", f"{1000 * found['server_cpu'] / each:.3f}",
                    f"{1000 * found['cpu'] / each:.3f}",
                )  # fmt: skip
    dense = next((name for name in ("exact", "scann") if name in names), None)
    if dense and description(model_of(options.work, dense))["settings"].get("pooling") == "decoder":
        print(f"{dense}: of a decoder, so not beside sentence-transformers", file=sys.stderr)
        dense = None
    if dense and not options.quick and importlib.util.find_spec("sentence_transformers"):
        figures["embeddings_over_sentence_transformers"] = embeddings(
            options.work, dense, queries, seconds, table
        )
    console.print(table)
    print(json.dumps(figures))
    return None


def folder_of(work: Path, name: str) -> Path:
    return work / "searchers" / name


def model_of(work: Path, name: str) -> Path:
    """The folder of a searcher's model."""
    folder = folder_of(work, name)
    return folder / json.loads((folder / "manifest.json").read_text())["model"]


def description(model: Path) -> dict:
    return json.loads((model / "model.json").read_text())


def judged_queries(work: Path) -> list[str]:
    """The texts of the collection's test and dev queries, read by a child."""
    script = (
        "import sys, json; from retrieval_jax.data.collection import Collection; c = Collection(sys.argv[1]);"
        "print(json.dumps([q.text for s in ('test', 'dev') if s in c.query_counts for q in c.queries(s)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(work / "collection")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout)[:4096]


def search_request(name: str, query: str) -> list:
    return ["GET", f"/v1/{name}/search?query={quote_plus(query)}&hits={HITS}", None]


def list_request(name: str, queries: Sequence[str]) -> list:
    return ["POST", f"/v1/{name}/search", {"queries": queries, "hits": HITS}]


def in_batches(queries: Sequence[str]) -> list[Sequence[str]]:
    """Whole batches of the queries, or one of all if they are fewer."""
    firsts = range(0, len(queries) - BATCH + 1, BATCH)
    return [queries[first : first + BATCH] for first in firsts] or [queries]


@contextlib.contextmanager
def serving(work: Path, names: Sequence[str], **settings: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server of some searchers; gives its process and its address when it is ready."""
    command = [sys.executable, "-m", "retrieval_jax.main", "serve", f"--WORK_DIR={work}"]
    settings |= {"port": 0, "cache_mb": 0, "searchers": tuple(names)}
    command += [f"--gin.serve.{key}={value!r}" for key, value in settings.items()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if match := re.search(r"ready: http://(\S+)", line):
                yield process, match[1]
                break
        else:
            raise SystemExit(f"the server ended with {process.wait()}")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def searching(work: Path, name: str) -> Iterator:
    """A process that searches; gives a function of what to do and for how long, which returns the result."""
    command = [sys.executable, __file__, str(work), "--direct", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()

    def ask(what: str, seconds: float) -> float:
        process.stdin.write(json.dumps([what, seconds]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def direct(work: Path, name: str) -> None:
    """The process that searches: queries a second in batches, or the median seconds of one query."""
    import _quiet  # noqa: F401

    from retrieval_jax.search.searcher import Searcher

    queries, searcher = judged_queries(work), Searcher.open(work / "searchers" / name)
    searcher.use_batch_sizes((1, 8, BATCH))
    batches = in_batches(queries)
    for size in (1, BATCH):
        searcher.search(queries[:size], HITS)
    print("open", flush=True)
    for line in sys.stdin:
        what, seconds = json.loads(line)
        texts = batches if what == "batched" else [[query] for query in queries]
        times, counts, began = [], 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            some = texts[len(times) % len(texts)]
            start = time.perf_counter()
            searcher.search(some, HITS)
            times.append(time.perf_counter() - start)
            counts += len(some)
        result = counts / sum(times) if what == "batched" else statistics.median(times)
        print(json.dumps(result), flush=True)


class Refused(Exception):
    """A server answered otherwise than with what was asked for."""


def load(
    addresses: Sequence[str], requests: Sequence[list], clients: int, seconds: float, pids: Sequence[int] = ()
) -> dict:
    """Asks in a process of its own; see `_load.py`. Raises Refused for any answer but 200."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(request) + "\n" for request in requests)
        file.flush()
        options = {"addresses": addresses, "requests": file.name, "clients": clients, "seconds": seconds}
        options["pids"] = pids
        command = [sys.executable, str(HERE / "_load.py"), json.dumps(options)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    if found["statuses"].keys() != {"200"}:
        raise Refused(f"answered {found['statuses']}")
    return found


def embeddings(work: Path, name: str, queries: Sequence[str], seconds: float, table: Table) -> dict:
    """The same weights behind /v1/embeddings and behind sentence-transformers in a FastAPI route."""
    requests = [["POST", "/v1/embeddings", {"input": query}] for query in queries]
    ratios = {}
    with tempfile.TemporaryDirectory() as folder, serving(work, [name]) as (_, address):
        model = model_of(work, name)
        length = description(model)["input_length"]
        command = [sys.executable, "-m", "retrieval_jax.main", "export", f"--WORK_DIR={work}", "--json"]
        command += [f"--MODEL_DIR={model}", f"--gin.export.output='{folder}/st'"]
        command += ["--gin.export.format='sentence_transformers'"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with sentence_transformers(f"{folder}/st", length) as theirs:
            check_same_vectors(address, theirs, queries[:32])
            for count in (1, 32):
                ours_found = load([address], requests, count, seconds)
                theirs_found = load([theirs], requests, count, seconds)
                ratios[str(count)] = round(ours_found["rate"] / theirs_found["rate"], 2)
                for label, found in (("/v1/embeddings", ours_found), ("sentence-transformers", theirs_found)):
                    table.add_row(
                        label, str(count), f"{found['rate']:,.0f}", "", f"{1000 * found['p50']:.2f}",
                        f"{1000 * found['p99']:.2f}", "", "", f"{1000 * found['cpu']:.3f}",
                    )  # fmt: skip
    return ratios


def check_same_vectors(ours: str, theirs: str, queries: Sequence[str]) -> None:
    """Ends the benchmark unless both servers give the same vectors."""

    def vector(address: str, query: str) -> list[float]:
        body = json.dumps({"input": query}).encode()
        asked = Request(f"http://{address}/v1/embeddings", body, {"Content-Type": "application/json"})
        with urlopen(asked) as response:
            return json.load(response)["data"][0]["embedding"]

    for query in queries:
        a, b = vector(ours, query), vector(theirs, query)
        cosine = sum(map(operator.mul, a, b)) / (math.hypot(*a) * math.hypot(*b))
        if cosine < 0.999:
            raise SystemExit(f"{query!r}: the cosine of both sides' vectors is {cosine:.4f}")


PLAINEST = """
import sys, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

class Request(BaseModel):
    input: str

app, model = FastAPI(), SentenceTransformer(sys.argv[1], device="cpu")
model.max_seq_length = int(sys.argv[2])
name = "query" if model.prompts.get("query") else None

@app.post("/v1/embeddings")
def embeddings(request: Request):
    return {"data": [{"index": 0, "embedding": model.encode(request.input, prompt_name=name).tolist()}]}

model.encode("warm up")
config = uvicorn.Config(app, port=0, http="httptools", access_log=False, log_level="info")
uvicorn.Server(config).run()
"""


@contextlib.contextmanager
def sentence_transformers(folder: str, length: int) -> Iterator[str]:
    command = [sys.executable, "-c", PLAINEST, folder, str(length)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        for line in process.stderr:
            if match := re.search(r"running on http://(\S+)", line):
                yield match[1]
                break
        else:
            raise SystemExit(f"sentence-transformers ended with {process.wait()}")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
