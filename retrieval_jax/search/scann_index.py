"""ScaNN (Guo et al. 2020): its settings, and one index of a part of a collection's vectors, a shard.

The structure of an index depends on the number of vectors (`settings`). A shard's files:

    scann/       ScaNN's own files, which may be moved
    rows.npy     int32 by ScaNN's row, the row in the collection
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

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegative, Positive

_REBUILD_FRACTION = 0.1  # of changed vectors, after which a shard is built again
_FILES = {"float32": "dataset.npy", "bfloat16": "bfloat16_dataset.npy", "int8": "int8_dataset.npy"}


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
def settings(
    count: int,
    exact_below: NonNegative = 20_000,
    tree_from: NonNegative = 100_000,
    reorder: Positive = 800,
    shard_size: Positive = 1 << 20,
) -> dict:
    """Chooses the structure of an index by its size. The defaults come from benchmarks/vector_search.py.

    Args:
      count: the number of vectors.
      exact_below: with fewer vectors than this, the search is exact; otherwise vectors are quantised, and the
        best are re-ordered by the dot products of whole vectors.
      tree_from: from this number of vectors on, a tree of √count leaves is built, of which a search visits a
        part (see `ScannIndex.tune`).
      reorder: the number of candidates to re-order, at least.
      shard_size: the most vectors of a shard. More vectors are divided into the fewest shards, of the same
        size, which are built one after the other.

    Returns:
      {} for an exact search, otherwise "reorder" and, for a tree, "leaves". Of more than one shard also their
      number as "shards", and "shard_size"; then "leaves" and "reorder" are those of each shard.
    """
    shards = -(-count // shard_size)
    some = {"shards": shards, "shard_size": shard_size} if shards > 1 else {}
    if count < exact_below:
        return some
    each = -(-count // max(shards, 1))
    chosen = {"reorder": -(-reorder // max(shards, 1))} | some
    return chosen | ({"leaves": round(math.sqrt(each))} if count >= tree_from else {})


def build(vectors_NxE: np.ndarray, leaves: int = 0, reorder: int = 0, dtype: str = "float32"):
    """Builds ScaNN's searcher by dot product.

    Vectors are product-quantised: 4 dimensions (2 if a vector has fewer than 512) become 4 bits, without the
    anisotropic loss of Guo et al. (2020, section 3). With re-ordering this has the recall of 2 dimensions
    with that loss, for half the work.

    Args:
      vectors_NxE: float32, the vectors.
      leaves: the number of leaves of the tree; 0 for no tree.
      reorder: the number of candidates to re-order; 0 for an exact search.
      dtype: what whole vectors are kept as: "float32", "bfloat16" or "int8" (with a scale per dimension).

    Returns:
      A `scann_ops_pybind.ScannSearcher`.
    """
    builder = scann_ops().builder(np.ascontiguousarray(vectors_NxE), 100, "dot_product")
    from scann.scann_ops.py.scann_builder import ReorderType  # without TensorFlow, after `scann_ops`

    kept = ReorderType[dtype.upper()]
    if reorder:
        if leaves:
            builder = builder.tree(leaves, leaves)
        builder = builder.score_ah(4 if vectors_NxE.shape[1] >= 512 else 2).reorder(reorder, kept)
    else:
        builder = builder.score_brute_force(kept)
    with _quietly():
        return builder.build()


@dataclasses.dataclass
class ScannShard:
    """ScaNN's searcher of some of a collection's vectors.

    Attributes:
      searcher: ScaNN's searcher.
      rows_M: int32, the row in the collection of each of ScaNN's rows.
      dtype: what whole vectors are kept as.
      reorder: the number of candidates to re-order that it was built with; 0 for an exact search.
      leaves: the leaves of its tree; 0 without a tree.
      training_size: the number of vectors that the clusters were fitted to.
      changes: passages that were deleted or inserted since then.
    """

    searcher: object
    rows_M: np.ndarray
    dtype: str
    reorder: int
    leaves: int
    training_size: int
    changes: int = 0

    @classmethod
    def build(
        cls, vectors_NxE: np.ndarray, rows_M: np.ndarray, dtype: str, reorder: int = 0, leaves: int = 0
    ) -> "ScannShard":
        """Builds an index of some vectors.

        Args:
          vectors_NxE: float32, all vectors, maybe mapped from a file.
          rows_M: int, the rows of those to index, ascending.
          dtype: what whole vectors are kept as.
          reorder: see `build`.
          leaves: see `build`.
        """
        first, last = int(rows_M[0]), int(rows_M[-1])
        contiguous = last - first == len(rows_M) - 1  # then nothing is copied
        some_MxE = vectors_NxE[first : last + 1] if contiguous else vectors_NxE[rows_M]
        searcher = build(some_MxE, leaves, reorder, dtype)
        return cls(searcher, rows_M.astype(np.int32), dtype, reorder, leaves, len(rows_M))

    def update(self, vectors_NxE: np.ndarray, now_M: np.ndarray, new: np.ndarray) -> "ScannShard":
        """Returns an index of the vectors as they are now, and repeats as little work as possible.

        Vectors that were removed are deleted, new ones are inserted. When a tenth of the vectors that the
        clusters were fitted to has changed, the index is built again. This index must not be used any more.

        Args:
          vectors_NxE: float32, all vectors as they are now.
          now_M: int, the row there of each vector of this index; -1 where it was removed or changed.
          new: int, rows of vectors to insert, ascending.
        """
        removed = np.flatnonzero(now_M < 0)
        changes = self.changes + len(removed) + len(new)
        if changes > _REBUILD_FRACTION * self.training_size:
            rows = np.sort(np.concatenate([now_M[now_M >= 0], new]))
            return self.build(vectors_NxE, rows, self.dtype, self.reorder, self.leaves)
        # Rows are named by numbers: first the old rows, then the inserted ones.
        old = len(now_M)
        changing = scann_ops().ScannSearcher(self.searcher.searcher, docids=list(range(old)))
        if len(removed):
            changing.delete(removed.tolist())
        if len(new):
            names = range(old, old + len(new))
            changing.upsert(list(names), np.ascontiguousarray(vectors_NxE[new]), batch_size=256)
        rows_M = np.concatenate([now_M, new])[np.array(changing.docids, int)].astype(np.int32)
        searcher = scann_ops().ScannSearcher(changing.searcher)
        return dataclasses.replace(self, searcher=searcher, rows_M=rows_M, changes=changes)

    def search(
        self, queries_BxE: np.ndarray, k: int, reorder: int | None, leaves: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Searches on all cores.

        Args:
          queries_BxE: float32, contiguous, the queries' vectors.
          k: vectors to find, at most as many as there are.
          reorder: the number of candidates to re-order; None for an exact search.
          leaves: the number of leaves to search; None without a tree.

        Returns:
          Rows of the collection (int32, B×k) and dot products (float32, B×k), best first. Where fewer than k
          vectors are found, the last scores are NaN.
        """
        batch_size = max(-(-len(queries_BxE) // (os.cpu_count() or 1)), 1)
        found, scores = self.searcher.search_batched_parallel(queries_BxE, k, reorder, leaves, batch_size)
        return self.rows_M[np.asarray(found)], np.asarray(scores)

    def write(self, folder: Path) -> dict:
        """Writes the index into a folder, and returns the facts that `open` needs.

        Raises:
          UserError: the disk is full.
        """
        (folder / "scann").mkdir()
        try:
            self.searcher.serialize(str(folder / "scann"), relative_path=True)
            np.save(folder / "rows.npy", self.rows_M)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{folder.parent}: cannot be written ({error}): make room, the same command goes on"
            ) from None
        names = ("dtype", "reorder", "leaves", "training_size", "changes")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def open(cls, folder: Path, facts: dict) -> "ScannShard":
        """Opens what `write` wrote.

        The caller must have compared the files with their checksums: ScaNN may end the process if they are
        damaged.

        Args:
          folder: the folder.
          facts: what `write` returned.

        Raises:
          UserError: ScaNN cannot read its files, or they hold vectors of another dtype.
        """
        hint = "delete the searcher's folder, then `retrieval-jax index`"
        if not (folder / "scann" / _FILES[facts["dtype"]]).is_file():
            raise UserError(f"{folder}: holds no vectors as {facts['dtype']}: {hint}")
        try:
            searcher = scann_ops().load_searcher(str(folder / "scann"))
            rows_M = np.load(folder / "rows.npy")
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: cannot be read ({error}): {hint}") from None
        return cls(searcher, rows_M, **facts)


def recall_at(k: int, wanted_BxK: np.ndarray, found_BxK: np.ndarray) -> float:
    """Returns the mean fraction of the first k wanted rows that are among the first k found rows.

    Args:
      k: the cut-off.
      wanted_BxK: int, the rows to find for each query, best first.
      found_BxK: int, the rows that were found, best first; -1 for an empty place.
    """
    pairs = zip(wanted_BxK[:, :k], found_BxK[:, :k], strict=True)
    return float(np.mean([np.isin(wanted, found).mean() for wanted, found in pairs]))
