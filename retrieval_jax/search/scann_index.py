"""ScaNN's index of a collection's vectors: built by its size, and changed as the collection changes.

scann/          ScaNN's own files, which may be moved
ids.arrow       passage ids by ScaNN's row
text_hashes.npy       uint64 by ScaNN's row, a digest of the passage's text
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gin
import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.search.exact import ExactSearch

_LEAVES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)  # shares that may be searched
RECALL = 0.985  # that the searched leaves are chosen for: other queries than those measured shall have 0.98
_MOST_REORDER = 8  # times as many as were set
_REBALANCE = 0.1  # of the vectors that were trained on: after so many changes the leaves are fitted anew


def is_installed() -> bool:
    """Whether ScaNN is there: it exists for Linux alone."""
    return importlib.util.find_spec("scann") is not None


def check_installed() -> None:
    """Raises UserError where ScaNN is not installed."""
    if not is_installed():
        hint = "make an exact searcher: retrieval-jax index --gin.make_index.kind=\"'exact'\""
        raise UserError(f"scann: not installed (it exists for Linux only): {hint}")


def scann_ops():
    """Imports ScaNN's Python module, without TensorFlow: it takes seconds, for an operation not used here.

    Raises:
      UserError: ScaNN is not installed.
    """
    check_installed()
    if "scann" in sys.modules or "tensorflow" in sys.modules:
        from scann import scann_ops_pybind

        return scann_ops_pybind
    sys.modules["tensorflow"] = None  # "cannot be imported", for this one import
    try:
        from scann import scann_ops_pybind
    finally:
        del sys.modules["tensorflow"]
    return scann_ops_pybind


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Inside, what ScaNN's C++ writes to stderr about its training goes nowhere."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@gin.configurable("scann")
def settings(count: int, exact_below: int = 20_000, tree_from: int = 100_000, reorder: int = 800) -> dict:
    """What is built for so many vectors; {} is an exact search. From benchmarks/vector_search.py.

    Args:
      count: the vectors.
      exact_below: fewer are searched exactly; more are quantised, and the best re-ordered by exact products.
      tree_from: so many get a tree of √count leaves, of which a search looks at some (see `tune`).
      reorder: how many are re-ordered, at least.
    """
    if count < exact_below:
        return {}
    return {"reorder": reorder} | ({"leaves": round(math.sqrt(count))} if count >= tree_from else {})


def build(vectors_NxE: np.ndarray, leaves: int = 0, reorder: int = 0):
    """ScaNN's searcher by dot product; without `reorder` it is exact, without `leaves` it has no tree.

    Vectors are product-quantised, 4 dimensions (2 of few) in 4 bits, without the anisotropic loss of Guo et
    al. (2020): with re-ordering that finds as much as 2 with it, for half the work.
    """
    builder = scann_ops().builder(np.ascontiguousarray(vectors_NxE), 100, "dot_product")
    if reorder:
        if leaves:
            builder = builder.tree(leaves, leaves)
        builder = builder.score_ah(4 if vectors_NxE.shape[1] >= 512 else 2).reorder(reorder)
    else:
        builder = builder.score_brute_force()
    with _quietly():
        return builder.build()


@dataclasses.dataclass
class ScannIndex:
    """An index and what its rows are.

    `leaves`: those that a search looks at. `trained_on`: how many vectors the clusters were fitted to;
    `changes`: passages deleted and inserted since then.
    """

    searcher: object
    ids: pa.Array
    text_hashes_N: np.ndarray
    settings: dict
    trained_on: int
    changes: int = 0
    leaves: int | None = None

    @classmethod
    def build(cls, embeddings: Embeddings) -> "ScannIndex":
        """Of all vectors, by `settings`."""
        count = len(embeddings.ids)
        chosen = settings(count)
        log(f"scann: building an index of {count:,} vectors")
        searcher = build(embeddings.vectors_NxE, **chosen)
        return cls(searcher, embeddings.ids, np.array(embeddings.text_hashes_N), chosen, count)

    def update(self, embeddings: Embeddings) -> "ScannIndex":
        """The index of all that embeddings hold; as little as possible is done anew.

        Vectors of passages that went or changed are deleted, those of new or changed ones inserted. When a
        tenth of what the clusters were fitted to has changed, they are fitted anew; where most passages went,
        or the size asks for another kind of index, it is built.
        """
        count = len(embeddings.ids)
        gone, new = changed_rows(self.ids, self.text_hashes_N, embeddings)
        chosen = settings(count)
        other_size = chosen.keys() != self.settings.keys() or not 0.5 < count / self.trained_on < 2
        if other_size or len(gone) > len(self.ids) // 2:
            return self.build(embeddings)
        # Names of rows: their numbers, first those that are here, then those that come.
        here = len(self.ids)
        changing = scann_ops().ScannSearcher(self.searcher.searcher, docids=list(range(here)))
        if len(gone):
            changing.delete(gone.tolist())
        if len(new):
            names = range(here, here + len(new))
            changing.upsert(list(names), np.ascontiguousarray(embeddings.vectors_NxE[new]), batch_size=256)
        names_N = np.array(changing.docids)
        ids = pa.concat_arrays([self.ids, embeddings.ids.take(new)]).take(names_N)
        text_hashes_N = np.concatenate([self.text_hashes_N, embeddings.text_hashes_N[new]])[names_N]
        index = dataclasses.replace(
            self, searcher=scann_ops().ScannSearcher(changing.searcher), ids=ids, text_hashes_N=text_hashes_N
        )
        if chosen:
            index.settings = self.settings | {"reorder": chosen["reorder"]}
        index.changes += len(gone) + len(new)
        if index.changes > _REBALANCE * self.trained_on:
            with _quietly():
                index.searcher.rebalance()
            index.trained_on, index.changes = count, 0
        return index

    def search(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows B×k, dot products B×k), best first, on all cores; short rows end with NaN scores."""
        queries_BxE = np.ascontiguousarray(queries_BxE, np.float32)
        share = max(-(-len(queries_BxE) // (os.cpu_count() or 1)), 1)
        reorder = max(self.settings["reorder"], 4 * k) if self.settings else None
        rows, scores = self.searcher.search_batched_parallel(queries_BxE, k, reorder, self.leaves, share)
        return np.asarray(rows), np.asarray(scores)

    def tune(self, embeddings: Embeddings, queries_BxE: np.ndarray, recall: float = RECALL) -> dict:
        """Re-orders more, if some queries need it for that recall@100, and searches no more leaves than that.

        Tells the recall, and gives {"recall_at_10": …, "recall_at_100": …}: the share of the exact best
        passages that are found.
        """
        exact = ExactSearch(embeddings.vectors_NxE)
        wanted_BxK, _ = exact(queries_BxE, min(100, exact.count))
        row_N = arrow_ids.find_rows(embeddings.ids, self.ids)  # of the vectors, by the index's row

        def at_leaves(leaves: int | None) -> dict[str, float]:
            self.leaves = leaves
            rows, scores = self.search(queries_BxE, wanted_BxK.shape[1])
            found_BxK = np.where(np.isnan(scores), -1, row_N[rows])
            return {f"recall_at_{k}": recall_at(k, wanted_BxK, found_BxK) for k in (10, 100)}

        most = self.settings.get("leaves")
        told = at_leaves(most)
        least = self.settings.get("reorder", 0)
        while told["recall_at_100"] < recall and self.settings.get("reorder", 0) < _MOST_REORDER * least:
            self.settings = self.settings | {"reorder": 2 * self.settings["reorder"]}
            told = at_leaves(most)
        if most and told["recall_at_100"] >= recall:
            for share in _LEAVES:
                told = at_leaves(max(round(share * most), 1))
                if told["recall_at_100"] >= recall:
                    break
        way = f"quantised, re-ordering {self.settings['reorder']}" if self.settings else "searched exactly"
        way += f", {self.leaves} of {most} leaves" if most else ""
        log(
            f"scann: recall@10 {told['recall_at_10']:.4f}, recall@100 {told['recall_at_100']:.4f} "
            f"against exact search for {len(queries_BxE)} queries ({way})"
        )
        return told

    def write(self, folder: Path) -> dict:
        """Writes it into a folder; gives what the manifest says of it."""
        (folder / "scann").mkdir()
        self.searcher.serialize(str(folder / "scann"), relative_path=True)
        arrow_ids.write(folder / "ids.arrow", self.ids)
        np.save(folder / "text_hashes.npy", self.text_hashes_N)
        counts = {name: getattr(self, name) for name in ("trained_on", "changes", "leaves")}
        return {"scann": {"settings": self.settings, **counts}}

    @classmethod
    def open(cls, folder: Path, manifest: dict) -> "ScannIndex":
        """What `write` wrote. Look whether its files are whole before: ScaNN may end the process."""
        try:
            searcher = scann_ops().load_searcher(str(folder / "scann"))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{folder}: cannot be read ({error}): delete it, then `retrieval-jax index`"
            ) from None
        text_hashes_N = np.load(folder / "text_hashes.npy")
        return cls(searcher, arrow_ids.read(folder / "ids.arrow"), text_hashes_N, **manifest["scann"])


def changed_rows(
    ids: pa.Array, text_hashes_N: np.ndarray, embeddings: Embeddings
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of `ids` that embeddings lack, rows of embeddings that `ids` lack); changed texts are in both."""
    row_N = arrow_ids.find_rows(ids, embeddings.ids)
    same = (row_N >= 0) & (text_hashes_N[row_N] == embeddings.text_hashes_N)
    gone = np.ones(len(ids), bool)
    gone[row_N[same]] = False
    return np.flatnonzero(gone), np.flatnonzero(~same)


def recall_at(k: int, wanted_BxK: np.ndarray, found_BxK: np.ndarray) -> float:
    """The mean share of the first k wanted rows that are among the first k found."""
    pairs = zip(wanted_BxK[:, :k], found_BxK[:, :k], strict=True)
    return float(np.mean([np.isin(wanted, found).mean() for wanted, found in pairs]))
