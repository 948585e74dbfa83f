"""Dense searchers: a dual encoder's vectors, searched exactly (JAX) or approximately (ScaNN).

Beside its manifest, a dense searcher's folder holds the passage ids by row (ids.arrow), the hashes of the
passages' texts by row (text_hashes.npy), the vectors (vectors.npy) or ScaNN's files (scann/), and the size
and checksum of each file.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from retrieval_jax.checkpoints import checksums
from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.data.records import Collection
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.embeddings.text_encoder import TextEncoder, query_encoder
from retrieval_jax.mesh.partitioning import Partitioner, all_devices
from retrieval_jax.search import scann_index
from retrieval_jax.search.exact import ExactSearch
from retrieval_jax.search.scann_index import ScannIndex, changed_rows
from retrieval_jax.search.searcher import IndexInputs, RankedList, Searcher, register_searcher

RECALL_QUERIES = 200  # with which an approximate search is measured


class DenseSearcher(Searcher):
    """Searches the vectors of passages for those with the largest dot products with a query's vector.

    A subclass says how the vectors are indexed (`write_index`), opened (`open`) and searched (`nearest`).

    Args:
      encoder: the encoder of queries.
      passage_ids: the passage ids by row.
      dimensions: the length of a vector.
    """

    family: ClassVar[str] = "dual encoder"
    model_family: ClassVar[str | None] = "dual encoder"
    reads_embeddings: ClassVar[bool] = True

    def __init__(self, encoder: TextEncoder, passage_ids: pa.Array, dimensions: int):
        self.encoder, self.passage_ids, self.dimensions = encoder, passage_ids, dimensions

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`. The scores are dot products."""
        if not queries:
            return []
        vectors_BxE = check_query_vectors(self.encoder(queries), self.dimensions)
        return ranked_lists(*self.nearest(vectors_BxE, min(k, len(self.passage_ids))), self.passage_ids)

    def nearest(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the rows with the largest dot products.

        Args:
          queries_BxE: float32, the queries' vectors.
          k: rows to find, at most as many as there are.

        Returns:
          Their rows (int, B×k) and dot products (float32, B×k); the score NaN says that a place is empty.
        """
        raise NotImplementedError

    @classmethod
    def write_index(cls, folder: Path, inputs: IndexInputs, earlier: Path | None) -> dict:
        """Writes the vectors and their index, the passage ids and the hashes of the texts.

        Args:
          folder: an empty folder.
          inputs: what the searcher is built from, with `embeddings`.
          earlier: a whole searcher of this kind and model, of an earlier state of the collection, if there
            is one.

        Returns:
          Facts for the manifest.
        """
        raise NotImplementedError

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`. Reports what has changed since an earlier searcher in `inputs.folder`."""
        embeddings, earlier = inputs.embeddings, inputs.folder
        if storage.finished(earlier):
            earlier = paths.ensure_local(earlier)
        facts = {"passages": len(embeddings.ids), "dimensions": embeddings.vectors_NxE.shape[1]}
        if indexed := _indexed_passages(earlier, cls.kind, embeddings):
            removed, added = changed_rows(*indexed, embeddings)
            facts |= {"added": len(added), "removed": len(removed)}
            log(f"{earlier}: {len(added)} passages added or changed, {len(removed)} removed or changed")
        facts |= cls.write_index(folder, inputs, earlier if indexed else None)
        checksums.write(folder)
        return facts


@register_searcher
class ExactSearcher(DenseSearcher):
    """Computes the dot product of the query with every passage, in JAX on all devices of a mesh.

    Args:
      encoder: the encoder of queries.
      vectors_NxE: float32, the passages' vectors.
      passage_ids: the passage ids by row.
      mesh: the devices over which the vectors are spread; None for one device.
    """

    kind: ClassVar[str] = "exact"

    def __init__(
        self,
        encoder: TextEncoder,
        vectors_NxE: np.ndarray,
        passage_ids: Sequence[str],
        mesh: Mesh | None = None,
    ):
        super().__init__(encoder, arrow_ids.array(passage_ids), vectors_NxE.shape[1])
        self.exact = ExactSearch(vectors_NxE, mesh)
        self.vectors_NxE, self.find_rows = vectors_NxE, arrow_ids.RowFinder(self.passage_ids)

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`. The scores are dot products."""
        if not queries:
            return []
        vectors_BxE, results = check_query_vectors(self.encoder(queries), self.dimensions), []
        for query_E, wanted in zip(vectors_BxE, candidates, strict=True):
            rows_C = np.array(self.find_rows(wanted), int)
            scores_C = self.vectors_NxE[rows_C] @ query_E  # so few are multiplied on the host
            results.append(np.where(rows_C < 0, np.nan, scores_C).tolist())
        return results

    def nearest(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `DenseSearcher.nearest`."""
        return self.exact(queries_BxE, k)

    @classmethod
    def write_index(cls, folder: Path, inputs: IndexInputs, earlier: Path | None) -> dict:
        """See `DenseSearcher.write_index`. Nothing but the vectors is needed."""
        for name in ("vectors.npy", "ids.arrow", "text_hashes.npy"):
            _link(paths.ensure_local(inputs.embeddings.folder / name), folder / name)
        return {}

    @classmethod
    def open(cls, folder: Path, make_partitioner: Callable[[], Partitioner] | None = None) -> "ExactSearcher":
        """See `Searcher.open`."""
        _, encoder, folder = _open(folder)
        vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        mesh = make_partitioner().mesh if make_partitioner else all_devices()
        return cls(encoder, vectors, arrow_ids.read(folder / "ids.arrow"), mesh)


@register_searcher
class ScannSearcher(DenseSearcher):
    """Searches with ScaNN (see `scann_index`), on the host's processor.

    Args:
      encoder: the encoder of queries.
      index: the passages' index.
      dimensions: the length of a vector.
    """

    kind: ClassVar[str] = "scann"

    def __init__(self, encoder: TextEncoder, index: ScannIndex, dimensions: int):
        super().__init__(encoder, index.ids, dimensions)
        self.index = index

    def nearest(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `DenseSearcher.nearest`. The scores, and which rows are found, are approximate."""
        return self.index.search(queries_BxE, k)

    @classmethod
    def is_installed(cls) -> bool:
        """See `Searcher.is_installed`."""
        return scann_index.is_installed()

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the settings of the index."""
        scann_index.check_installed()  # before the passages are encoded
        return {"scann": scann_index.settings(inputs.collection.passage_count)}

    @classmethod
    def write_index(cls, folder: Path, inputs: IndexInputs, earlier: Path | None) -> dict:
        """See `DenseSearcher.write_index`. Builds an index, or updates the earlier one.

        The facts include the recall against exact search, which is measured with queries of the collection.
        """
        if earlier:
            manifest = storage.read_manifest(earlier, "index")
            index = ScannIndex.open(earlier, manifest).update(inputs.embeddings)
        else:
            index = ScannIndex.build(inputs.embeddings)
        queries_BxE = query_encoder(inputs.model, inputs.mesh)(sample_queries(inputs.collection))
        recalls = index.tune(inputs.embeddings, queries_BxE)
        return index.write(folder) | recalls

    @classmethod
    def open(cls, folder: Path, make_partitioner: object = None) -> "ScannSearcher":
        """See `Searcher.open`. `make_partitioner` is not called."""
        manifest, encoder, folder = _open(folder)
        return cls(encoder, ScannIndex.open(folder, manifest), manifest["dimensions"])


def sample_queries(collection: Collection, count: int = RECALL_QUERIES) -> list[str]:
    """Returns up to `count` texts to measure an approximate search with.

    They are dev queries if there are any, otherwise train queries, those of another split, or passages.
    """
    for split in ("dev", "train", *collection.query_counts):
        if collection.query_counts.get(split):
            return [query.text for query in collection.queries(split)[:count]]
    step = max(collection.passage_count // count, 1)
    rows = range(0, collection.passage_count, step)[:count]
    return [passage.full_text for passage in collection.get(rows)]


def check_query_vectors(queries_BxE: np.ndarray, dimensions: int) -> np.ndarray:
    """Returns the same vectors of queries.

    Raises:
      UserError: a vector is not finite, or its length is not that of the passages' vectors.
    """
    if queries_BxE.shape[1] != dimensions:
        raise UserError(
            f"queries have {queries_BxE.shape[1]} dimensions and the index's passages {dimensions}: "
            "search with the model that the index was made of"
        )
    if not np.isfinite(queries_BxE).all():
        row = int((~np.isfinite(queries_BxE).all(-1)).argmax())
        raise UserError(f"the vector of query {row} has an infinity or NaN: train the model again")
    return queries_BxE


def ranked_lists(rows_BxK: np.ndarray, scores_BxK: np.ndarray, passage_ids: pa.Array) -> list[RankedList]:
    """Makes ranked lists of rows and scores.

    Places with the score NaN are left out (ScaNN fills up short lists with them), and equal scores are put
    into the order of the rows (ScaNN leaves it to chance).
    """
    lists = []
    for rows, scores in zip(rows_BxK.tolist(), scores_BxK.tolist(), strict=True):
        pairs = [(row, score) for row, score in zip(rows, scores, strict=True) if score == score]
        pairs.sort(key=lambda pair: (-pair[1], pair[0]))
        lists.append([(passage_ids[row].as_py(), score) for row, score in pairs])
    return lists


def _indexed_passages(earlier: Path, kind: str, embeddings: Embeddings) -> tuple[pa.Array, np.ndarray] | None:
    """Returns the ids and text hashes of an earlier searcher, if it is whole and of this kind and model."""
    if not storage.finished(earlier) or not (earlier / checksums.NAME).is_file():
        return None
    recipe = storage.read_manifest(earlier, "index")["recipe"]
    same = recipe["kind"] == kind and recipe.get("checksum") == embeddings.manifest["recipe"]["checksum"]
    if not same or checksums.find_damage(earlier):
        return None
    return arrow_ids.read(earlier / "ids.arrow"), np.load(earlier / "text_hashes.npy")


def _open(folder: Path) -> tuple[dict, TextEncoder, Path]:
    """Returns the manifest, the encoder of queries, and the folder on this machine with the files to read.

    The files were then compared with their checksums.
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
    """Makes the same file available at another place, without a copy if the disk can: neither changes."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
