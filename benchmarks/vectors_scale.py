"""What do millions of vectors cost as float32, bfloat16 and int8, searched exactly and by ScaNN?

    python benchmarks/vectors_scale.py [--passages 8841823] [--dimensions 256] [--methods exact scann]
        [--dtypes float32 bfloat16 int8] [--shard-size N] [--folder TMP] [--quick]

The vectors are generated, since no encoder at hand gives so many: topics of 300 passages on average, whose
centres are normal with a variance of 1/d in dimension d (a falling spectrum, as encoders' vectors have), and
passages around them with .7 of that deviation, made unit vectors; a query is a passage with .6 of it added.
Neighbours are therefore many and close to each other: harder than separate clusters, while without any (all
components independent) no index could find them. They are written to a file block by block.

Every method runs in a process of its own. `peak` is the most memory of its own that the process held; `with
files` adds the pages of files that are mapped into memory, which the system takes back where it needs them.
Built in seconds: the conversion of the file (exact); building, opening and tuning by 200 other queries
(scann). Queries a second are those of batches of 32 on all cores, in the fastest of up to three passes. The
recall is against exact search of float32. --quick takes 60,000 passages in 3 shards, and less than a minute.
The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _quiet  # noqa: F401
import numpy as np
from _vectors import clustered
from rich.console import Console
from rich.table import Table

DTYPES = ("float32", "bfloat16", "int8")
BATCH, QUERIES, TUNING, K, SEED = 32, 512, 200, 100, 0
PASSES, SECONDS = 3, 5  # no pass begins after so many seconds of searching


def worker(method: str, dtype: str, folder: Path, shard_size: int | None) -> dict:
    """Builds one index, searches it, and returns what was measured; rows of exact float32 are kept."""
    from retrieval_jax.core import arrow_ids
    from retrieval_jax.embeddings.encoding import Embeddings
    from retrieval_jax.search import scann_index, scann_shards, stored_vectors
    from retrieval_jax.search.exact import ExactSearch

    vectors_NxE = np.load(folder / "vectors.npy", mmap_mode="r")
    queries, tuning = (np.load(folder / f"{name}.npy") for name in ("queries", "tuning"))
    files, facts = folder / "index", {}
    files.mkdir()
    began = time.monotonic()
    if method == "exact":
        vectors, scales = vectors_NxE, None
        if dtype != "float32":
            stored_vectors.write(files, vectors_NxE, dtype)
            vectors, scales = stored_vectors.read(files, dtype)
        search = ExactSearch(vectors, scales_N=scales)
    else:
        if shard_size:
            import gin

            gin.bind_parameter("scann.shard_size", shard_size)
        count = len(vectors_NxE)
        ids = arrow_ids.array(map(str, range(count)))
        embeddings = Embeddings(folder, vectors_NxE, ids, np.zeros(count, np.uint64), {})
        index = scann_shards.build(files, embeddings, dtype, {})
        facts["shards"], facts["shards_s"] = len(index.shards), round(time.monotonic() - began, 1)
        index.tune(embeddings, tuning)
        facts |= {"reorder": index.settings.get("reorder"), "leaves": index.searched_leaves}
        search = index.search
    facts["built_s"] = round(time.monotonic() - began, 1)
    search(queries[:BATCH], K)  # compiles
    passes: list[float] = []
    while len(passes) < PASSES and sum(passes) < SECONDS:
        began, found = time.perf_counter(), []
        for first in range(0, len(queries), BATCH):
            found.append(search(queries[first : first + BATCH], K)[0])
        passes.append(time.perf_counter() - began)
    facts["qps"] = len(queries) / min(passes)
    found_QxK = np.concatenate(found)
    if (method, dtype) == ("exact", "float32"):
        np.save(folder / "exact.npy", found_QxK)
    wanted_QxK = np.load(folder / "exact.npy")
    facts |= {f"recall_at_{k}": scann_index.recall_at(k, wanted_QxK, found_QxK) for k in (10, K)}
    sizes = [path.stat().st_size for path in files.rglob("*") if path.is_file()]
    return facts | {"bytes": sum(sizes) or vectors_NxE.nbytes}


def measured(method: str, dtype: str, folder: Path, shard_size: int | None) -> dict:
    """Runs `worker` in a process and watches its memory, since it may be too busy to watch itself."""
    command = [sys.executable, __file__, "--worker", method, dtype, "--folder", str(folder)]
    command += ["--shard-size", str(shard_size)] if shard_size else []
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = {"RssAnon": 0, "VmHWM": 0}
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]) * 1024)
        time.sleep(0.05)
    out = child.stdout.read()
    if child.wait():
        return {"failed": f"ended with {child.returncode}"}
    return json.loads(out.splitlines()[-1]) | {"peak": peak["RssAnon"], "peak_with_files": peak["VmHWM"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=8_841_823)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=["exact", "scann"], choices=["exact", "scann"])
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=DTYPES)
    parser.add_argument("--shard-size", type=int, help="default: that of `index`")
    parser.add_argument("--folder", type=Path, help="for the files, about 9 bytes a number at most")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(*options.worker, options.folder, options.shard_size)))
        return
    if options.quick:
        options.passages, options.dimensions, options.shard_size = 60_000, 64, 20_000
    console, began = Console(stderr=True), time.monotonic()
    rows = [("exact", "float32")]  # the others are measured against it
    rows += [(m, d) for m in options.methods for d in options.dtypes if (m, d) not in rows]
    table = Table(
        "method", "dtype", "GB on disk", "built in s", "peak GB", "with files", "recall@10", "recall@100",
        "queries/s", "× exact",
        title=f"{options.passages:,} × {options.dimensions}, {os.cpu_count()} cores, batches of {BATCH}",
    )  # fmt: skip
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        many = QUERIES + TUNING
        queries = clustered(options.passages, options.dimensions, folder / "vectors.npy", many, SEED)
        np.save(folder / "queries.npy", queries[:QUERIES])
        np.save(folder / "tuning.npy", queries[QUERIES:])
        console.print(f"vectors written: {time.monotonic() - began:.0f} s")
        for method, dtype in rows:
            found = measured(method, dtype, folder, options.shard_size)
            subprocess.run(["rm", "-r", str(folder / "index")], check=False)
            console.print(f"{method} {dtype}: {json.dumps(found)}, {time.monotonic() - began:.0f} s")
            figures[f"{method} {dtype}"] = found
            if "failed" in found:
                table.add_row(method, dtype, found["failed"])
                continue
            ratio = found["qps"] / figures["exact float32"]["qps"]
            figures[f"{method} {dtype}"]["qps_over_exact"] = ratio
            table.add_row(
                method, dtype, f"{found['bytes'] / 1e9:.2f}", f"{found['built_s']:.0f}",
                f"{found['peak'] / 1e9:.2f}", f"{found['peak_with_files'] / 1e9:.2f}",
                f"{found['recall_at_10']:.3f}", f"{found['recall_at_100']:.3f}", f"{found['qps']:,.1f}",
                f"{ratio:.1f}",
            )  # fmt: skip
    Console(width=130).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
