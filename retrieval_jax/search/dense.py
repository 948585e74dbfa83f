"""Searching by vectors: a dual encoder's passages, exactly (JAX) or approximately (ScaNN).

A searcher's folder holds, beside its manifest, passage ids by row (ids.arrow), hashes of their texts by row
(text_hashes.npy), vectors (vectors.npy) or ScaNN's files (scann/), and each file's size and checksum.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from retrieval_jax.checkpoints import checksums
from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.embeddings.encoding import Embeddings, TextEncoder, query_encoder
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.search.exact import ExactSearch
from retrieval_jax.search.scann_index import ScannIndex, difference
from retrieval_jax.search.searcher import RankedList


class ExactSearcher:
    """Every passage's dot product with the query."""

    kind = "exact"

    def __init__(
        self,
        encoder: TextEncoder,
        vectors_NxE: np.ndarray,
        passage_ids: Sequence[str],
        mesh: Mesh | None = None,
    ):
        self.encoder = encoder
        self.exact = ExactSearch(vectors_NxE, mesh)
        self.passage_ids = arrow_ids.array(passage_ids)

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See Searcher. Scores are dot products."""
        if not queries:
            return []
        k = min(k, len(self.passage_ids))
        vectors = checked(self.encoder(queries), self.exact.dimensions)
        return _rankings(*self.exact(vectors, k), self.passage_ids)

    @staticmethod
    def write_index(folder: Path, embeddings: Embeddings, earlier: Path | None, queries_BxE: object) -> dict:
        """Nothing but the vectors; gives what the manifest says of it."""
        for name in ("vectors.npy", "ids.arrow", "text_hashes.npy"):
            _link(paths.ensure_local(embeddings.folder / name), folder / name)
        return {}

    @classmethod
    def open(cls, folder: Path, make_mesh: Callable[[], Mesh] | None = None) -> "ExactSearcher":
        """Opens a folder that `index` made, on a mesh."""
        _, encoder, folder = _open(folder)
        vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        return cls(encoder, vectors, arrow_ids.read(folder / "ids.arrow"), (make_mesh or all_devices)())


class ScannSearcher:
    """ScaNN's search; see `scann_index`."""

    kind = "scann"

    def __init__(self, encoder: TextEncoder, index: ScannIndex, dimensions: int):
        self.encoder, self.index, self.dimensions = encoder, index, dimensions

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See Searcher. Scores are (approximate) dot products."""
        if not queries:
            return []
        k = min(k, len(self.index.ids))
        vectors = checked(self.encoder(queries), self.dimensions)
        return _rankings(*self.index.search(vectors, k), self.index.ids)

    @staticmethod
    def write_index(
        folder: Path, embeddings: Embeddings, earlier: Path | None, queries_BxE: np.ndarray
    ) -> dict:
        """Builds ScaNN's index, or changes an earlier one; gives what the manifest says of it.

        That includes the recall, measured with some queries' vectors against exact search.
        """
        if earlier:
            manifest = storage.read_manifest(earlier, "index")
            index = ScannIndex.open(earlier, manifest).update(embeddings)
        else:
            index = ScannIndex.build(embeddings)
        told = index.tune(embeddings, queries_BxE)
        return index.write(folder) | told

    @classmethod
    def open(cls, folder: Path, make_mesh: object = None) -> "ScannSearcher":
        """Opens a folder that `index` made. ScaNN runs on the processor; `make_mesh` is not called."""
        manifest, encoder, folder = _open(folder)
        return cls(encoder, ScannIndex.open(folder, manifest), manifest["dimensions"])


DENSE = {searcher.kind: searcher for searcher in (ExactSearcher, ScannSearcher)}


def write(folder: Path, kind: str, embeddings: Embeddings, earlier: Path, queries_BxE: np.ndarray) -> dict:
    """Writes the files of a dense searcher into a folder; gives what its manifest says of them.

    Args:
      folder, kind: where, and which.
      embeddings: the vectors.
      earlier: where such a searcher of an earlier state of the collection may lie, to be changed.
      queries_BxE: vectors of queries, to measure an approximate search with.
    """
    if storage.finished(earlier):
        earlier = paths.ensure_local(earlier)
    facts = {"passages": len(embeddings.ids), "dimensions": embeddings.vectors_NxE.shape[1]}
    if known := _passages_of(earlier, kind, embeddings):
        gone, new = difference(*known, embeddings)
        facts |= {"added": len(new), "removed": len(gone)}
        log(f"{earlier}: {len(new)} passages added or changed, {len(gone)} removed or changed")
    facts |= DENSE[kind].write_index(folder, embeddings, earlier if known else None, queries_BxE)
    checksums.write(folder)
    return facts


def _passages_of(earlier: Path, kind: str, embeddings: Embeddings) -> tuple[pa.Array, np.ndarray] | None:
    """The ids and digests of an earlier searcher, where there is a whole one of this kind and model."""
    if not storage.finished(earlier) or not (earlier / checksums.NAME).is_file():
        return None
    recipe = storage.read_manifest(earlier, "index")["recipe"]
    same = recipe["kind"] == kind and recipe.get("checksum") == embeddings.manifest["recipe"]["checksum"]
    if not same or checksums.find_damage(earlier):
        return None
    return arrow_ids.read(earlier / "ids.arrow"), np.load(earlier / "text_hashes.npy")


def checked(queries_BxE: np.ndarray, dimensions: int) -> np.ndarray:
    """The same vectors of queries. UserError where one is not finite, or they do not fit the passages'."""
    if queries_BxE.shape[1] != dimensions:
        raise UserError(
            f"queries have {queries_BxE.shape[1]} dimensions and the index's passages {dimensions}: "
            "search with the model that the index was made of"
        )
    if not np.isfinite(queries_BxE).all():
        row = int((~np.isfinite(queries_BxE).all(-1)).argmax())
        raise UserError(f"the vector of query {row} has an infinity or NaN: train the model again")
    return queries_BxE


def _open(folder: Path) -> tuple[dict, TextEncoder, Path]:
    """The manifest, the encoder of queries and where the files can be read on this machine.

    All that is searched is then known to be what was made.
    """
    manifest = storage.read_manifest(folder, "index")
    hint = "delete it, then `retrieval-jax index`"
    if not (folder / checksums.NAME).is_file():
        raise UserError(f"{folder}: {checksums.NAME} is missing: {hint}")
    files = paths.ensure_local(folder)
    if reason := checksums.find_damage(files):
        raise UserError(f"{folder}: damaged ({reason}): {hint}")
    model = paths.join(folder, manifest["model"])
    if not model.is_dir():
        raise UserError(
            f"{folder}: its model is not at {paths.absolute(model)}: move both together, or "
            "`retrieval-jax index`"
        )
    return manifest, query_encoder(load_model(model, manifest["step"])), files


def _link(source: Path, target: Path) -> None:
    """The same file at another place, without a copy where the disk can: neither is ever changed."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _rankings(rows: np.ndarray, scores: np.ndarray, passage_ids: pa.Array) -> list[RankedList]:
    # ScaNN fills up short rows with NaN scores, and leaves the order of equal ones to chance.
    rankings = []
    for pair in zip(rows.tolist(), scores.tolist(), strict=True):
        found = [(row, score) for row, score in zip(*pair, strict=True) if score == score]
        found.sort(key=lambda result: (-result[1], result[0]))
        rankings.append([(passage_ids[row].as_py(), score) for row, score in found])
    return rankings
