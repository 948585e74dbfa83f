"""How long and how much memory does a collection of MS MARCO's size take?

    python benchmarks/data_scale.py FOLDER [--lines N] [--vocabulary MODEL] [--quick]

In FOLDER (outside the repository, with 12 GB of room), a generator writes a
collection shaped like MS MARCO's passages: as many lines (8,841,823; 20,000 with --quick), as long, of words
that are as unevenly used, with as many judged queries, and two docT5query-like predictions a passage. Then
each step runs in a process of its own, and a table says what it took: seconds, lines of the source a second,
and the peak of the resident memory of the process and its workers, summed. At the end the D2Q mixture of all
of it (27 million examples) is read for half a minute, as the trainer does and by plain seqio
(example_stream.py), written to a cache, and read from there. The last line is JSON; its `cache` has the time
that 353 million examples (40 queries a passage) take at the same rate. The generated collection is kept in
FOLDER for the next run, which makes all else anew.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

LINES, TRAIN, UNJUDGED, DEV = 8_841_823, 502_939, 305_792, 6_980  # MS MARCO's
BLOCK = 100_000
MANY = 353_672_920  # examples of docT5query's 40 queries a passage
OURS, SEQIO, CACHE, CACHED = (
    "D2Q mixture", "D2Q mixture, plain seqio", "cache the D2Q mixture", "D2Q mixture, from the cache",
)  # fmt: skip
WORDS = 60_000


class Text:
    """Random words as bytes, Zipf-like: frequent ones are short."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        letters = np.frombuffer(b"etaoinshrdlucmfwygpbvk", np.uint8)
        length = np.clip(self.rng.poisson(1.3 + 0.65 * np.log1p(np.arange(WORDS))), 1, 14)
        column = np.arange(16)
        words = self.rng.choice(letters, (WORDS, 16), p=_zipf(len(letters), 4))
        words[column >= length[:, None]] = 0
        # The words followed by a space, then the same followed by a line end.
        self.table = np.tile(words, (2, 1))
        ends = np.tile(length, 2)
        self.table[np.arange(2 * WORDS), ends] = np.repeat(np.frombuffer(b" \n", np.uint8), WORDS)
        self.drawn = self.rng.choice(WORDS, 1 << 22, p=_zipf(WORDS, 3))

    def lines(self, ids: np.ndarray | None, count: int, mean: float) -> bytes:
        """`count` lines of about `mean` words, each after its id and a tab where there are ids."""
        lengths = np.clip(self.rng.lognormal(np.log(mean) - 0.06, 0.35, count).astype(np.int64), 3, 250)
        starts = np.cumsum(lengths) - lengths
        words = self.drawn[self.rng.integers(0, len(self.drawn), lengths.sum())]
        words[starts + lengths - 1] += WORDS
        cells = self.table[words]
        if ids is not None:
            keys = np.char.add(ids.astype("S10"), b"\t").astype("S16")
            cells = np.insert(cells, starts, np.frombuffer(keys.tobytes(), np.uint8).reshape(-1, 16), axis=0)
        return cells[cells > 0].tobytes()

    def blocks(self, ids: np.ndarray | None, count: int, mean: float) -> Iterator[bytes]:
        """The same, some lines at a time."""
        for first in range(0, count, BLOCK):
            some = min(BLOCK, count - first)
            yield self.lines(None if ids is None else ids[first : first + some], some, mean)


def _zipf(count: int, offset: float) -> np.ndarray:
    weights = 1 / (np.arange(count) + offset)
    return weights / weights.sum()


def generate(folder: Path, lines: int, seed: int = 0) -> None:
    """Writes the source files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = Text(seed)
    write(folder / "collection.tsv", text.blocks(np.arange(lines), lines, 55))
    scale = lines / LINES
    train, unjudged, dev = (max(round(n * scale), 20) for n in (TRAIN, UNJUDGED, DEV))
    ids = text.rng.permutation(2 * (train + unjudged + dev))
    for split, judged, others in (("train", train, unjudged), ("dev.small", dev, 0)):
        keys, ids = ids[: judged + others], ids[judged + others :]
        write(folder / f"queries.{split}.tsv", text.blocks(keys, len(keys), 6))
        passages = text.rng.choice(lines, judged, replace=False)
        rows = zip(keys[:judged].tolist(), passages.tolist(), strict=True)
        write(
            folder / f"qrels.{split}.tsv", (f"{query}\t0\t{passage}\t1\n".encode() for query, passage in rows)
        )
    for sample in range(2):
        write(folder / f"predicted_queries_sample{sample:03}.txt", text.blocks(None, lines, 6))


def write(path: Path, blocks: Iterator[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(blocks)


def measure(command: list[str]) -> tuple[float, float, dict]:
    """Seconds, peak gigabytes of the command's processes, and the JSON that it printed.

    Raises CalledProcessError where it fails.
    """
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        memory = 0
        for each in _tree(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory += each.memory_info().rss
        peak = max(peak, memory)
        time.sleep(0.25)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - started, peak / 1e9, json.loads(process.stdout.read())


def _tree(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def subsets(lines: int) -> list[int]:
    """The sizes of the paper's subsets, or as large a share of fewer lines."""
    return [round(share * lines / LINES) for share in (100_000, 1_000_000)]


def steps(source: Path, lines: int, vocabulary: str | None) -> Iterator[tuple[str, list[str]]]:
    """(name, command) of what is measured."""

    def verb(name: str, work: str, *settings: str) -> list[str]:
        given = [f"COLLECTION='{source}'", f"WORK_DIR='{source.parent / work}'", *settings]
        if vocabulary:
            given.append(f"VOCABULARY='{Path(vocabulary).resolve()}'")
        settings = [f"--gin.{setting}" for setting in given]
        return [sys.executable, "-m", "retrieval_jax.main", name, "--json", *settings]

    full = f"full_{lines}"
    yield "import", verb("import", full)
    for size in subsets(lines):
        yield f"import, {size:,} of them", verb("import", f"subset_{size}", f"SUBSET={size}")
    yield "naive docids", verb("docids", full, "DOCIDS='naive'")
    yield "predicted queries", verb("generate-queries", full, f"generate_queries.predictions='{source}'")

    def stream(name: str) -> list[str]:
        script, work = str(Path(__file__).with_name("example_stream.py")), str(source.parent / full)
        seconds = "30" if lines == LINES else "3"
        return [sys.executable, script, name, "--source", str(source), "--work", work, "--seconds", seconds]

    yield OURS, stream("ours")
    yield SEQIO, stream("seqio")
    mixture = ("DataConfig.mixture='3b'", "SYNTHETIC='doc2query'", "DOCIDS='naive'")
    yield CACHE, verb("cache", full, *mixture)
    yield CACHED, stream("ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where 12 GB may be written")
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--vocabulary", help="a SentencePiece model; without it the import learns one")
    parser.add_argument("--quick", action="store_true", help="20,000 lines: within a minute")
    args = parser.parse_args()
    lines = 20_000 if args.quick else args.lines
    source = args.folder / f"msmarco_like_{lines}"
    for earlier in (f"full_{lines}", *(f"subset_{size}" for size in subsets(lines))):
        shutil.rmtree(args.folder / earlier, ignore_errors=True)  # or nothing would be made, and timed
    started = time.perf_counter()
    if not (source / "predicted_queries_sample001.txt").exists():
        generate(source, lines)
    seconds = {"generating": (time.perf_counter() - started, 0.0)}
    said: dict[str, dict] = {}
    for name, command in steps(source, lines, args.vocabulary):
        *seconds[name], said[name] = measure(command)
    cached = sum(said[CACHE]["examples"].values())
    said[CACHE]["examples_per_second"] = round(cached / seconds[CACHE][0])

    table = Table("step", "seconds", "lines/s", "peak GB", title=f"{lines:,} passages")
    for name, (took, peak) in seconds.items():
        rate = said.get(name, {}).get("examples_per_second")
        speed = f"{rate:,} examples" if rate else f"{lines / took:,.0f}"
        table.add_row(name, f"{took:.0f}", speed, f"{peak:.2f}" if peak else "–")
    Console().print(table)
    figures = {
        "lines": lines,
        "lines_per_second": lines / seconds["import"][0],
        "peak_gb": max(peak for name, (_, peak) in seconds.items() if name != SEQIO),
        "examples_per_second": said[OURS]["examples_per_second"],
        "plain_seqio_examples_per_second": said[SEQIO]["examples_per_second"],
        "cached_examples_per_second": said[CACHED]["examples_per_second"],
        "cache": {
            "examples": cached,
            "examples_per_second": said[CACHE]["examples_per_second"],
            "peak_gb": seconds[CACHE][1],
            "gb": said[CACHE]["bytes"] / 1e9,
            "minutes_for_353_million": MANY / said[CACHE]["examples_per_second"] / 60,
            "gb_of_353_million": MANY / cached * said[CACHE]["bytes"] / 1e9,
        },
        "seconds": {name: took for name, (took, _) in seconds.items()},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
