"""Atomic docids: the exact top 100 of the softmax beside ScaNN over its columns, in recall and speed.

    python benchmarks/softmax_vectors.py --docids 1000000 --work /tmp/softmax_vectors

No model of millions of docids is at hand, so the columns are generated: vectors around topics (see
`_vectors.clustered`) of log-normal lengths, and states of the decoder near some of them. Both searches start
from the same states, in batches of 32 and one by one: `exact` is the program that a generative searcher
compiles (all logits, the best 100, and the log-sum-exp), `scann` the searcher `softmax_vectors` as `index`
builds and tunes it, with other states than those that are measured. Speeds are of the fastest of five passes.
--quick takes 50,000 docids, 64 wide, and less than a minute. The last line is JSON: recall_at_10,
recall_at_100, speedup and speedup_of_one by the number of docids.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import _quiet  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
from _vectors import clustered
from rich.console import Console
from rich.table import Table

from retrieval_jax.core import paths
from retrieval_jax.core.progress import log
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.atomic import BLOCK, top_docids
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.models.softmax import exact_products, logits_of
from retrieval_jax.search import scann_shards
from retrieval_jax.search.scann_index import recall_at

K, BATCH, QUERIES, TUNING, SEED = 100, 32, 256, 200, 0
SPREAD = 0.2  # deviation of the logarithm of a column's length
SCALE = 20.0  # of states


def columns(count: int, width: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The columns of a softmax as rows N×E, mapped from a file, and states of the decoder."""
    states_QxE = SCALE * clustered(count, width, path, QUERIES + TUNING, SEED)
    columns_NxE, rng = np.load(path, mmap_mode="r+"), np.random.default_rng(SEED)
    for first in range(0, count, 1 << 16):
        some = columns_NxE[first : first + (1 << 16)]
        some *= np.exp(SPREAD * rng.standard_normal((len(some), 1), np.float32))
    columns_NxE.flush()
    return np.load(path, mmap_mode="r"), states_QxE.astype(np.float32)


def exact_search(columns_NxE: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """States -> the rows of the best 100, as a generative searcher finds them."""
    N, E = columns_NxE.shape
    kernel_ExV = np.zeros((E, round_up(N, BLOCK)), np.float32)
    for first in range(0, N, 1 << 16):
        kernel_ExV[:, first : first + (1 << 16)][:, : N - first] = columns_NxE[first : first + (1 << 16)].T
    valid_V = jnp.arange(kernel_ExV.shape[1]) < N
    kernel = jax.device_put(kernel_ExV)

    @jax.jit
    def search(x_BxE, kernel_ExV, valid_V):
        with exact_products():
            return top_docids(logits_of(x_BxE, kernel_ExV), valid_V, K)[0]

    return lambda states_BxE: np.asarray(search(states_BxE, kernel, valid_V))


def scann_search(columns_NxE: np.ndarray, tuning_QxE: np.ndarray, folder: Path, dtype: str):
    """(states -> the rows of the best 100 that ScaNN finds; seconds of building)."""
    embeddings = Embeddings(folder, columns_NxE, range(len(columns_NxE)), None, {})
    began = time.perf_counter()
    index = scann_shards.build(folder / "shards", embeddings, dtype, {})
    index.tune(embeddings, tuning_QxE)
    return lambda states_BxE: index.search(states_BxE, K)[0], time.perf_counter() - began


def measure(search: Callable, states_QxE: np.ndarray, batch: int, queries: int) -> tuple[np.ndarray, float]:
    """(the rows found, milliseconds a query in the fastest of five passes)."""
    some = states_QxE[:queries]
    found, best = None, float("inf")
    search(some[:batch])
    for _ in range(5):
        began = time.perf_counter()
        found = np.concatenate([search(some[first : first + batch]) for first in range(0, len(some), batch)])
        best = min(best, time.perf_counter() - began)
    return found, 1000 * best / len(some)


def compare(count: int, width: int, folder: Path, dtype: str) -> dict:
    """The figures of one number of docids."""
    folder.mkdir(parents=True, exist_ok=True)
    columns_NxE, states_QxE = columns(count, width, folder / "columns.npy")
    states_QxE, tuning_QxE = states_QxE[:QUERIES], states_QxE[QUERIES:]
    log(f"{count:,} docids: {columns_NxE.nbytes / 1e9:.1f} GB of columns")
    search = exact_search(columns_NxE)
    wanted, exact = measure(search, states_QxE, BATCH, QUERIES)
    _, exact_one = measure(search, states_QxE, 1, 32)
    del search
    search, seconds = scann_search(columns_NxE, tuning_QxE, folder, dtype)
    found, scann = measure(search, states_QxE, BATCH, QUERIES)
    _, scann_one = measure(search, states_QxE, 1, 32)
    paths.remove(folder)
    return {
        "recall_at_10": recall_at(10, wanted, found),
        "recall_at_100": recall_at(100, wanted, found),
        "exact_ms": exact,
        "scann_ms": scann,
        "speedup": exact / scann,
        "exact_ms_of_one": exact_one,
        "scann_ms_of_one": scann_one,
        "speedup_of_one": exact_one / scann_one,
        "build_seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docids", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--width", type=int, default=256, help="of the network's output")
    parser.add_argument("--dtype", default="float32", help="what ScaNN keeps vectors as")
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder for what is made and removed again"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    if args.quick:
        args.docids, args.width = [50_000], 64
    results = {count: compare(count, args.width, args.work / str(count), args.dtype) for count in args.docids}
    names = (
        "docids",
        "recall@10",
        "recall@100",
        "exact ms",
        "scann ms",
        "times",
        "one: exact ms",
        "scann ms",
    )
    table = Table(*names, "times", "built in s", title=f"{args.width} wide, {args.dtype}, batches of {BATCH}")
    for count, figures in results.items():
        recalls = [f"{figures[name]:.4f}" for name in ("recall_at_10", "recall_at_100")]
        speeds = ("exact_ms", "scann_ms", "speedup", "exact_ms_of_one", "scann_ms_of_one", "speedup_of_one")
        shown = [f"{figures[name]:.2f}" for name in speeds]
        table.add_row(f"{count:,}", *recalls, *shown, f"{figures['build_seconds']:.0f}")
    Console(width=120).print(table)
    print(json.dumps({"softmax_vectors": results}))


if __name__ == "__main__":
    main()
