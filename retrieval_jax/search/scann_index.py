"""ScaNN's index of a collection's vectors: built by its size, and changed as the collection changes.

scann/          ScaNN's own files, which may be moved
ids.arrow       passage ids by ScaNN's row
texts.npy       uint64 by ScaNN's row, a digest of the passage's text
"""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval_jax import arrow_ids
from retrieval_jax.errors import UserError
from retrieval_jax.search.encoding import Embeddings

EXACT_BELOW, TREE_FROM = 20_000, 100_000  # vectors
_REBALANCE = (
    0.1  # share of the vectors that were trained on: after so many changes the leaves are fitted anew
)


def scann_ops():
    """ScaNN's Python module. It would import TensorFlow for an operation that is not used here (seconds)."""
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


def settings(count: int) -> dict:
    """What is built for so many vectors: the leaves of a tree, those searched, and how many are re-ordered.

    {} is an exact search. benchmarks/vector_search.py measures what these give.
    """
    if count < EXACT_BELOW:
        return {}
    if count < TREE_FROM:
        return {"reorder": 1000}
    leaves = round(math.sqrt(count))
    return {"leaves": leaves, "leaves_to_search": max(leaves // 10, 1), "reorder": 1000}


def build(vectors_NxE: np.ndarray, leaves: int = 0, leaves_to_search: int = 0, reorder: int = 0):
    """ScaNN's searcher by dot product; without `reorder` it is exact, without `leaves` it has no tree.

    Vectors are quantised by anisotropic product quantisation, 2 dimensions a block (Guo et al. 2020).
    """
    builder = scann_ops().builder(np.ascontiguousarray(vectors_NxE), 100, "dot_product")
    if reorder:
        if leaves:
            sample = min(len(vectors_NxE), 250_000)
            builder = builder.tree(leaves, leaves_to_search, training_sample_size=sample)
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(reorder)
    else:
        builder = builder.score_brute_force()
    with _quietly():
        return builder.build()


@dataclasses.dataclass
class ScannIndex:
    """An index and what its rows are. `trained_on`: how many vectors its clusters were fitted to; `changes`
    since then."""

    searcher: object
    ids: pa.Array
    texts_N: np.ndarray
    settings: dict
    trained_on: int
    changes: int = 0

    @classmethod
    def build(cls, embeddings: Embeddings) -> "ScannIndex":
        """Of all vectors, by `settings`."""
        count = len(embeddings.ids)
        chosen = settings(count)
        searcher = build(embeddings.vectors_NxE, **chosen)
        return cls(searcher, embeddings.ids, np.array(embeddings.texts_N), chosen, count)

    def update(self, embeddings: Embeddings) -> "ScannIndex":
        """The index of all that embeddings hold; as little as possible is done anew.

        Vectors of passages that went or changed are deleted, those of new or changed ones inserted. When a
        tenth of what the clusters were fitted to has changed, they are fitted anew; where the size asks for
        another kind of index, it is built.
        """
        count = len(embeddings.ids)
        gone, new = difference(self.ids, self.texts_N, embeddings)
        if bool(self.settings) != bool(settings(count)) or not 0.5 < count / self.trained_on < 2:
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
        texts_N = np.concatenate([self.texts_N, embeddings.texts_N[new]])[names_N]
        index = dataclasses.replace(
            self, searcher=scann_ops().ScannSearcher(changing.searcher), ids=ids, texts_N=texts_N
        )
        index.changes += len(gone) + len(new)
        if index.changes > _REBALANCE * self.trained_on:
            with _quietly():
                index.searcher.rebalance()
            index.trained_on, index.changes = count, 0
        return index

    def write(self, folder: Path) -> dict:
        """Writes it into a folder; gives what the manifest says of it."""
        (folder / "scann").mkdir()
        self.searcher.serialize(str(folder / "scann"), relative_path=True)
        arrow_ids.write(folder / "ids.arrow", self.ids)
        np.save(folder / "texts.npy", self.texts_N)
        return {"scann": {**self.settings, "trained_on": self.trained_on, "changes": self.changes}}

    @classmethod
    def open(cls, folder: Path, manifest: dict) -> "ScannIndex":
        """What `write` wrote. Look whether its files are whole before: ScaNN may end the process."""
        known = dict(manifest["scann"])
        counts = {key: known.pop(key) for key in ("trained_on", "changes")}
        try:
            searcher = scann_ops().load_searcher(str(folder / "scann"))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{folder}: cannot be read ({error}): delete it, then `retrieval-jax index`"
            ) from None
        texts_N = np.load(folder / "texts.npy")
        return cls(searcher, arrow_ids.read(folder / "ids.arrow"), texts_N, known, **counts)


def difference(ids: pa.Array, texts_N: np.ndarray, embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """(rows of `ids` that embeddings lack, rows of embeddings that `ids` lack); changed texts are in both."""
    row_N = arrow_ids.rows(ids, embeddings.ids)
    same = (row_N >= 0) & (texts_N[row_N] == embeddings.texts_N)
    gone = np.ones(len(ids), bool)
    gone[row_N[same]] = False
    return np.flatnonzero(gone), np.flatnonzero(~same)
