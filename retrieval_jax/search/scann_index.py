"""An index of a collection's vectors by ScaNN (Guo et al. 2020).

Its structure depends on the number of vectors, and it is updated when the collection changes. Its files:

    scann/            ScaNN's own files, which may be moved
    ids.arrow         passage ids by ScaNN's row
    text_hashes.npy   uint64 by ScaNN's row, hashes of the passages' texts
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

_LEAF_FRACTIONS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)  # that `tune` tries
RECALL = 0.985  # the least recall@100 in `tune`, such that queries that were not measured have about 0.98
_MAX_REORDER_FACTOR = 8  # times the setting, at most
_REBALANCE_FRACTION = 0.1  # of changed vectors, after which the clusters are fitted again


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
    sys.modules["tensorflow"] = None  # makes this one import fail, which ScaNN tolerates
    try:
        from scann import scann_ops_pybind
    finally:
        del sys.modules["tensorflow"]
    return scann_ops_pybind


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Discards what ScaNN's C++ code writes to stderr about its training."""
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
    """Chooses the structure of an index by its size. The defaults come from benchmarks/vector_search.py.

    Args:
      count: the number of vectors.
      exact_below: with fewer vectors than this, the search is exact; otherwise vectors are quantised, and the
        best are re-ordered by exact dot products.
      tree_from: from this number of vectors on, a tree of √count leaves is built, of which a search visits a
        part (see `ScannIndex.tune`).
      reorder: the number of candidates to re-order, at least.

    Returns:
      {} for an exact search, otherwise "reorder" and, for a tree, "leaves".
    """
    if count < exact_below:
        return {}
    return {"reorder": reorder} | ({"leaves": round(math.sqrt(count))} if count >= tree_from else {})


def build(vectors_NxE: np.ndarray, leaves: int = 0, reorder: int = 0):
    """Builds ScaNN's searcher by dot product.

    Vectors are product-quantised: 4 dimensions (2 if a vector has fewer than 512) become 4 bits, without the
    anisotropic loss of Guo et al. (2020, section 3). With re-ordering this has the recall of 2 dimensions
    with that loss, for half the work.

    Args:
      vectors_NxE: float32, the vectors.
      leaves: the number of leaves of the tree; 0 for no tree.
      reorder: the number of candidates to re-order; 0 for an exact search.

    Returns:
      A `scann_ops_pybind.ScannSearcher`.
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
    """ScaNN's searcher, and which passage each of its rows is.

    Attributes:
      searcher: ScaNN's searcher.
      ids: passage ids by row.
      text_hashes_N: uint64, hashes of the passages' texts by row.
      settings: the structure, from `settings`; `tune` may raise its "reorder".
      training_size: the number of vectors that the clusters were fitted to.
      changes: passages that were deleted or inserted since then.
      searched_leaves: leaves that a search visits; None without a tree.
    """

    searcher: object
    ids: pa.Array
    text_hashes_N: np.ndarray
    settings: dict
    training_size: int
    changes: int = 0
    searched_leaves: int | None = None

    @classmethod
    def build(cls, embeddings: Embeddings) -> "ScannIndex":
        """Builds an index of all vectors, with the structure that `settings` chooses for their number."""
        count = len(embeddings.ids)
        chosen = settings(count)
        log(f"scann: building an index of {count:,} vectors")
        searcher = build(embeddings.vectors_NxE, **chosen)
        return cls(searcher, embeddings.ids, np.array(embeddings.text_hashes_N), chosen, count)

    def update(self, embeddings: Embeddings) -> "ScannIndex":
        """Returns an index of the vectors as they are now, and repeats as little work as possible.

        Vectors of passages that were removed or changed are deleted, those of new or changed passages are
        inserted. When a tenth of the vectors that the clusters were fitted to has changed, the clusters are
        fitted again. When most passages were removed, or the new size asks for another structure, the index
        is built again. This index must not be used any more.

        Args:
          embeddings: the vectors of all passages.
        """
        count = len(embeddings.ids)
        removed, new = changed_rows(self.ids, self.text_hashes_N, embeddings)
        chosen = settings(count)
        other_size = chosen.keys() != self.settings.keys() or not 0.5 < count / self.training_size < 2
        if other_size or len(removed) > len(self.ids) // 2:
            return self.build(embeddings)
        # Rows are named by numbers: first the old rows, then the inserted ones.
        old = len(self.ids)
        changing = scann_ops().ScannSearcher(self.searcher.searcher, docids=list(range(old)))
        if len(removed):
            changing.delete(removed.tolist())
        if len(new):
            names = range(old, old + len(new))
            changing.upsert(list(names), np.ascontiguousarray(embeddings.vectors_NxE[new]), batch_size=256)
        names_N = np.array(changing.docids)
        ids = pa.concat_arrays([self.ids, embeddings.ids.take(new)]).take(names_N)
        text_hashes_N = np.concatenate([self.text_hashes_N, embeddings.text_hashes_N[new]])[names_N]
        index = dataclasses.replace(
            self, searcher=scann_ops().ScannSearcher(changing.searcher), ids=ids, text_hashes_N=text_hashes_N
        )
        if chosen:
            index.settings = self.settings | {"reorder": chosen["reorder"]}
        index.changes += len(removed) + len(new)
        if index.changes > _REBALANCE_FRACTION * self.training_size:
            with _quietly():
                index.searcher.rebalance()
            index.training_size, index.changes = count, 0
        return index

    def search(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Searches on all cores.

        Args:
          queries_BxE: float32, the queries' vectors.
          k: vectors to find.

        Returns:
          Rows (B×k) and their dot products (float32, B×k), best first. Where fewer than k vectors are found,
          the last scores are NaN.
        """
        queries_BxE = np.ascontiguousarray(queries_BxE, np.float32)
        batch_size = max(-(-len(queries_BxE) // (os.cpu_count() or 1)), 1)
        reorder = max(self.settings["reorder"], 4 * k) if self.settings else None
        rows, scores = self.searcher.search_batched_parallel(
            queries_BxE, k, reorder, self.searched_leaves, batch_size
        )
        return np.asarray(rows), np.asarray(scores)

    def tune(self, embeddings: Embeddings, queries_BxE: np.ndarray, recall: float = RECALL) -> dict:
        """Chooses how many candidates are re-ordered and how many leaves are searched.

        Doubles `reorder` (up to 8 times) until recall@100 reaches `recall`, then chooses the smallest number
        of leaves that keeps it. Reports the recall.

        Args:
          embeddings: the vectors of all passages.
          queries_BxE: float32, vectors of queries to measure with.
          recall: the least recall@100.

        Returns:
          "recall_at_10" and "recall_at_100": the fraction of the exact best passages that are found.
        """
        exact = ExactSearch(embeddings.vectors_NxE)
        wanted_BxK, _ = exact(queries_BxE, min(100, exact.count))
        row_N = arrow_ids.find_rows(embeddings.ids, self.ids)  # index row -> row of the embeddings

        def measure(leaves: int | None) -> dict[str, float]:
            self.searched_leaves = leaves
            rows, scores = self.search(queries_BxE, wanted_BxK.shape[1])
            found_BxK = np.where(np.isnan(scores), -1, row_N[rows])
            return {f"recall_at_{k}": recall_at(k, wanted_BxK, found_BxK) for k in (10, 100)}

        all_leaves, reorder = self.settings.get("leaves"), self.settings.get("reorder", 0)
        recalls = measure(all_leaves)
        while (
            recalls["recall_at_100"] < recall
            and self.settings.get("reorder", 0) < _MAX_REORDER_FACTOR * reorder
        ):
            self.settings = self.settings | {"reorder": 2 * self.settings["reorder"]}
            recalls = measure(all_leaves)
        if all_leaves and recalls["recall_at_100"] >= recall:
            for fraction in _LEAF_FRACTIONS:
                recalls = measure(max(round(fraction * all_leaves), 1))
                if recalls["recall_at_100"] >= recall:
                    break
        method = f"quantised, re-ordering {self.settings['reorder']}" if self.settings else "searched exactly"
        method += f", {self.searched_leaves} of {all_leaves} leaves" if all_leaves else ""
        log(
            f"scann: recall@10 {recalls['recall_at_10']:.4f}, recall@100 {recalls['recall_at_100']:.4f} "
            f"against exact search for {len(queries_BxE)} queries ({method})"
        )
        return recalls

    def write(self, folder: Path) -> dict:
        """Writes the index into a folder, and returns the facts that `open` needs in the manifest."""
        (folder / "scann").mkdir()
        self.searcher.serialize(str(folder / "scann"), relative_path=True)
        arrow_ids.write(folder / "ids.arrow", self.ids)
        np.save(folder / "text_hashes.npy", self.text_hashes_N)
        counts = {name: getattr(self, name) for name in ("training_size", "changes", "searched_leaves")}
        return {"scann": {"settings": self.settings, **counts}}

    @classmethod
    def open(cls, folder: Path, manifest: dict) -> "ScannIndex":
        """Opens what `write` wrote.

        The caller must have compared the files with their checksums: ScaNN may end the process if they are
        damaged.

        Args:
          folder: the folder.
          manifest: its manifest, with what `write` returned.

        Raises:
          UserError: ScaNN cannot read its files.
        """
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
    """Compares an index with the vectors as they are now.

    Args:
      ids: the index's passage ids.
      text_hashes_N: uint64, the index's text hashes.
      embeddings: the vectors of all passages.

    Returns:
      The rows of the index to delete, and the rows of the embeddings to insert. A passage whose text changed
      is in both.
    """
    row_N = arrow_ids.find_rows(ids, embeddings.ids)
    same = (row_N >= 0) & (text_hashes_N[row_N] == embeddings.text_hashes_N)
    removed = np.ones(len(ids), bool)
    removed[row_N[same]] = False
    return np.flatnonzero(removed), np.flatnonzero(~same)


def recall_at(k: int, wanted_BxK: np.ndarray, found_BxK: np.ndarray) -> float:
    """Returns the mean fraction of the first k wanted rows that are among the first k found rows.

    Args:
      k: the cut-off.
      wanted_BxK: int, the rows to find for each query, best first.
      found_BxK: int, the rows that were found, best first; -1 for an empty place.
    """
    pairs = zip(wanted_BxK[:, :k], found_BxK[:, :k], strict=True)
    return float(np.mean([np.isin(wanted, found).mean() for wanted, found in pairs]))
