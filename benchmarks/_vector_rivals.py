"""One method of vector search, in a process of its own, so that its memory and threads are its own.

    python benchmarks/_vector_rivals.py METHOD FOLDER --threads T --batch B --seconds S

FOLDER holds vectors.npy (N×E), queries.npy (Q×E), tuning.npy (other queries) and, for all but the first
method, exact.npy (rows Q×100). Prints {"build_s": …, "bytes": …, "rows": {name: {"recall_at_10": …,
"recall_at_100": …, "qps": …, "qps_cpu": …}}}; bytes are those of its files.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

K, PASSES = 100, 5
Search = Callable[[np.ndarray], np.ndarray]
"""Queries B×E -> rows B×K."""


class Exact:
    """JAX's exact search, as the project's `exact` searcher."""

    def __init__(self, vectors_NxE: np.ndarray, _: argparse.Namespace):
        from retrieval_jax.search.exact import ExactSearch

        self.search, self.bytes = ExactSearch(vectors_NxE), vectors_NxE.nbytes

    def searches(self) -> dict[str, Search]:
        return {"exact": lambda queries: self.search(queries, K)[0]}


class Scann:
    """ScaNN as the project's `scann` searcher builds and tunes it, and with other leaves and re-ordering."""

    def __init__(self, vectors_NxE: np.ndarray, options: argparse.Namespace):
        from retrieval_jax.core import arrow_ids
        from retrieval_jax.embeddings.encoding import Embeddings
        from retrieval_jax.search import scann_shards

        count = len(vectors_NxE)
        ids = arrow_ids.array(map(str, range(count)))
        embeddings = Embeddings(options.folder, vectors_NxE, ids, np.zeros(count, np.uint64), {})
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            self.index = scann_shards.build(Path(folder), embeddings, "float32", {})
            self.bytes = sum(path.stat().st_size for path in Path(folder).rglob("scann/*"))
        self.index.tune(embeddings, np.load(options.folder / "tuning.npy"))

    def searches(self) -> dict[str, Search]:
        index, leaves = self.index, self.index.settings.get("leaves")
        tuned = f", {index.searched_leaves} of {leaves} leaves" if leaves else ""
        print(f"scann: re-ordering {index.settings['reorder']}{tuned}", file=sys.stderr)
        found = {"scann": lambda queries: index.search(queries, K)[0]}

        def other(reorder: int, some: int | None) -> Search:
            changed = dataclasses.replace(
                index, settings={**index.settings, "reorder": reorder}, searched_leaves=some
            )
            return lambda queries: changed.search(queries, K)[0]

        for share in (0.1, 0.2, 0.4, 0.6, 0.8) if leaves else (None,):
            some = share and round(share * leaves)
            for reorder in (index.settings["reorder"],) if leaves else (400, 600, 1000):
                name = f"ScaNN re-ordering {reorder}"
                name += f", {share:.0%} of {leaves} leaves" if leaves else ""
                found[name] = other(reorder, some)
        return found


class Faiss:
    """An index of FAISS's, by its factory, with some settings of the search."""

    factory: str
    grid: tuple[tuple[str, dict[str, float]], ...] = ()

    def __init__(self, vectors_NxE: np.ndarray, options: argparse.Namespace):
        import faiss

        faiss.omp_set_num_threads(options.threads)
        count, dimensions = vectors_NxE.shape
        leaves = round(count**0.5)
        self.index = faiss.index_factory(
            dimensions, self.factory.format(leaves=leaves, codes=dimensions // 8), faiss.METRIC_INNER_PRODUCT
        )
        self.configure()
        if not self.index.is_trained:
            step = max(count // max(40 * leaves, 65_536), 1)
            self.index.train(np.ascontiguousarray(vectors_NxE[::step]))
        began = time.monotonic()
        for first in range(0, count, 10_000):
            self.index.add(np.ascontiguousarray(vectors_NxE[first : first + 10_000]))
            if time.monotonic() - began > options.most_seconds:
                raise SystemExit(f"not built: {first:,} vectors after {options.most_seconds:.0f} s")
        with tempfile.NamedTemporaryFile(dir=options.folder) as file:
            faiss.write_index(self.index, file.name)
            self.bytes = Path(file.name).stat().st_size

    def configure(self) -> None:
        pass

    def searches(self) -> dict[str, Search]:
        import faiss

        def search(values: dict[str, float]) -> Search:
            def run(queries: np.ndarray) -> np.ndarray:
                space = faiss.ParameterSpace()
                for name, value in values.items():
                    space.set_index_parameter(self.index, name, value)
                return self.index.search(queries, K)[1]

            return run

        return {name: search(values) for name, values in self.grid}


class FaissFlat(Faiss):
    factory = "Flat"
    grid = (("FAISS flat (exact)", {}),)


class FaissHnsw(Faiss):
    factory = "HNSW32,Flat"
    grid = tuple((f"FAISS HNSW32, efSearch {ef}", {"efSearch": ef}) for ef in (128, 256, 512))

    def configure(self) -> None:
        self.index.hnsw.efConstruction = 80


class FaissIvfPq(Faiss):
    factory = "IVF{leaves},PQ{codes},RFlat"

    def configure(self) -> None:
        import faiss

        ivf = faiss.downcast_index(self.index.base_index)
        ivf.cp.niter = ivf.pq.cp.niter = 12  # as ScaNN's

    grid = tuple(
        (f"FAISS IVF-PQ, {way}{n} probes", {"nprobe": n, "k_factor_rf": k_factor})
        for way, k_factor in (("", 1), ("re-ordering 800, ", 8))
        for n in (32, 128, 256)
    )


METHODS = {
    "exact": Exact,
    "scann": Scann,
    "flat": FaissFlat,
    "hnsw": FaissHnsw,
    "ivfpq": FaissIvfPq,
}


def queries_a_second(
    search: Search, queries: np.ndarray, batch: int, seconds: float, threads: int
) -> tuple[float, float]:
    """By the clock, of the fastest of some passes over all queries, as many as fit the time; and by the time
    that the threads were running, of all passes: as if nobody else were using the cores.
    """
    firsts = range(0, len(queries) - batch + 1, batch)
    search(queries[:batch])
    best, every, cpu = 0.0, 0, time.process_time()
    until = time.perf_counter() + seconds
    for _ in range(PASSES):
        done, began = 0, time.perf_counter()
        for first in firsts:
            search(queries[first : first + batch])
            done += batch
            if time.perf_counter() > until:
                break
        best = max(best, done / (time.perf_counter() - began))
        every += done
        if time.perf_counter() > until:
            break
    return best, every * threads / (time.process_time() - cpu)


def measure(method: str, folder: Path, python: str = sys.executable, **options: object) -> dict | str:
    """What this file prints when run, or why it failed."""
    command = [python, __file__, method, str(folder)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", json.dumps(value)]
    threads = options["threads"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    environment["OMP_WAIT_POLICY"] = "passive"  # others share the machine: who spins is slow
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(
        *(line for line in done.stderr.splitlines() if line.startswith("scann:")), sep="\n", file=sys.stderr
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["killed"])[-1][:80]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--most-seconds", type=float, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # threads of every library
    vectors_NxE = np.load(options.folder / "vectors.npy", mmap_mode="r")
    queries_QxE = np.load(options.folder / "queries.npy")
    began = time.monotonic()
    method = METHODS[options.method](vectors_NxE, options)
    build = time.monotonic() - began
    from retrieval_jax.search.scann_index import recall_at

    exact_path = options.folder / "exact.npy"
    rows = {}
    for name, search in method.searches().items():
        parts = [
            search(queries_QxE[i : i + options.batch]) for i in range(0, len(queries_QxE), options.batch)
        ]
        found_QxK = np.concatenate(parts)
        if options.method == "exact" and not exact_path.exists():
            np.save(exact_path, found_QxK)
        wanted_QxK = np.load(exact_path)
        rows[name] = {f"recall_at_{k}": recall_at(k, wanted_QxK, found_QxK) for k in (10, K)}
        rows[name]["qps"], rows[name]["qps_cpu"] = queries_a_second(
            search, queries_QxE, options.batch, options.seconds, options.threads
        )
    print(json.dumps({"build_s": build, "bytes": method.bytes, "rows": rows}))


if __name__ == "__main__":
    main()
