"""Dense searchers: a dual encoder's vectors, searched exactly (JAX) or approximately (ScaNN).

What lies in their folders: see dense_folder.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from retrieval_jax.checkpoints import checksums
from retrieval_jax.checkpoints.model_folder import LoadedModel
from retrieval_jax.core import arrow_ids, paths, storage, unfinished
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import UNFINISHED
from retrieval_jax.data.collection import Collection
from retrieval_jax.embeddings.encoding import Embeddings, encode_by_model
from retrieval_jax.embeddings.shortened import shorten_embeddings
from retrieval_jax.embeddings.text_encoder import TextEncoder, query_encoder
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import Partitioner, all_devices
from retrieval_jax.search import scann_index, scann_shards, stored_vectors
from retrieval_jax.search.dense_folder import (
    FIRST_DIMENSIONS,
    OF_PASSAGES,
    SHARDS,
    check_files,
    indexed_passages,
)
from retrieval_jax.search.encoding_searcher import EncodingSearcher, load_own_model
from retrieval_jax.search.exact import ExactSearch
from retrieval_jax.search.index_inputs import IndexInputs
from retrieval_jax.search.scann_index import recall_at
from retrieval_jax.search.scann_shards import Indexed, ScannIndex, rows_now
from retrieval_jax.search.searcher import RankedList, register_searcher

RECALL_QUERIES = 200  # with which an approximate search is measured


class DenseSearcher(EncodingSearcher):
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
    reads_settings: ClassVar[tuple[str, ...]] = ("vector_dtype", "dimensions")

    def __init__(self, encoder: TextEncoder, passage_ids: pa.Array, dimensions: int):
        super().__init__(encoder)
        self.passage_ids, self.dimensions = passage_ids, dimensions

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`. The scores are dot products."""
        if not queries or k <= 0:
            return [[] for _ in queries]
        vectors_BxE = check_query_vectors(self.encoder(queries), self.dimensions)
        return ranked_lists(*self.nearest(vectors_BxE, min(k, len(self.passage_ids))), self.passage_ids)

    @classmethod
    def make_encoder(
        cls, opened: LoadedModel, mesh: Mesh | None = None, dimensions: int | None = None
    ) -> TextEncoder:
        """Makes the encoder of queries of a model; see `query_encoder`."""
        return query_encoder(opened, mesh, dimensions)

    @classmethod
    def make_embeddings(cls, inputs: IndexInputs) -> Embeddings:
        """Makes or finds the passages' vectors. All processes must call this."""
        description, collection = inputs.model.description, inputs.collection
        if description["collection"] not in (None, collection.fingerprint):
            log(
                f"{inputs.model_dir}: trained on another collection ({description['collection_name']}, or an "
                "earlier version) than this one"
            )
        made = encode_by_model(inputs.model_dir, inputs.model, inputs.mesh, inputs.work, collection)
        size = inputs.settings.dimensions
        return shorten_embeddings(made, size, inputs.model.model.module.normalize) if size else made

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
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the dtype of the vectors, and how many of their dimensions there are."""
        size, kept = inputs.settings.dimensions, {"vector_dtype": inputs.settings.vector_dtype}
        if size is None:
            return kept
        model = inputs.model.model
        whole = getattr(model.module, "vector_dim", 0)
        if size >= whole:
            raise UserError(
                f"make_index.dimensions: {size} of {whole} that {inputs.model_dir} can shorten: set fewer"
                if whole
                else f"make_index.dimensions: {cls.kind} searches no dual encoder's vectors: leave it away"
            )
        if size not in model.matryoshka:
            log(
                f"{inputs.model_dir}: was not trained for its first {size} dimensions alone "
                f"(--gin.DualEncoder.matryoshka={(size,)}): their ranking may be far from that of all {whole}"
            )
        return kept | {FIRST_DIMENSIONS: size}

    @classmethod
    def write_index(cls, folder: Path, inputs: IndexInputs) -> dict:
        """Writes the vectors and their index.

        Args:
          folder: a folder with the passage ids and the hashes of the texts.
          inputs: what the searcher is built from, with `embeddings`.

        Returns:
          Facts for the manifest.
        """
        raise NotImplementedError

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`. Reports what has changed since an earlier searcher in `inputs.folder`."""
        embeddings = inputs.embeddings
        facts = {"passages": len(embeddings.ids), "dimensions": embeddings.vectors_NxE.shape[1]}
        if earlier := indexed_passages(inputs, cls.kind):
            now_N = rows_now(*earlier, embeddings)
            kept = int((now_N >= 0).sum())
            facts |= {"added": len(embeddings.ids) - kept, "removed": len(now_N) - kept}
            log(
                f"{inputs.folder}: {facts['added']} passages added or changed, {facts['removed']} removed or "
                "changed"
            )
        for name in OF_PASSAGES:
            paths.link(paths.ensure_local(embeddings.folder / name), folder / name)
        facts |= cls.write_index(folder, inputs)
        checksums.write(folder)
        return facts


@register_searcher
class ExactSearcher(DenseSearcher):
    """Computes the dot product of the query with every passage, in JAX on all devices of a mesh.

    Args:
      encoder: the encoder of queries.
      vectors_NxE: float32, bfloat16 or int8, the passages' vectors.
      passage_ids: the passage ids by row.
      mesh: the devices over which the vectors are spread; None for one device.
      scales_N: float32, by which int8 vectors are multiplied.
    """

    kind: ClassVar[str] = "exact"

    def __init__(
        self,
        encoder: TextEncoder,
        vectors_NxE: np.ndarray,
        passage_ids: Sequence[str],
        mesh: Mesh | None = None,
        scales_N: np.ndarray | None = None,
    ):
        super().__init__(encoder, arrow_ids.array(passage_ids), vectors_NxE.shape[1])
        self.exact = ExactSearch(vectors_NxE, mesh, scales_N)
        self.batch_sizes: Sequence[int] = ()
        self.find_rows = arrow_ids.RowFinder(self.passage_ids)

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`. The scores are dot products."""
        if not queries:
            return []
        vectors_BxE, results = check_query_vectors(self.encoder(queries), self.dimensions), []
        vectors_NxE, *scales_N = self.exact.arrays
        for query_E, wanted in zip(vectors_BxE, candidates, strict=True):
            rows_C = np.array(self.find_rows(wanted), int)
            scores_C = vectors_NxE[rows_C].astype(np.float32) @ query_E  # so few are multiplied on the host
            for scale_N in scales_N:
                scores_C *= scale_N[rows_C]
            results.append(np.where(rows_C < 0, np.nan, scores_C).tolist())
        return results

    def use_batch_sizes(self, sizes: Sequence[int]) -> None:
        """See `Searcher.use_batch_sizes`: of the encoder, and of the products."""
        super().use_batch_sizes(sizes)
        self.batch_sizes = sizes

    def nearest(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `DenseSearcher.nearest`."""
        count = len(queries_BxE)
        size = next((size for size in self.batch_sizes if size >= count), count)
        rows_BxK, scores_BxK = self.exact(np.pad(queries_BxE, ((0, size - count), (0, 0))), k)
        return rows_BxK[:count], scores_BxK[:count]

    @classmethod
    def write_index(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `DenseSearcher.write_index`. The recall of rounded vectors is measured against float32."""
        embeddings, dtype = inputs.embeddings, inputs.settings.vector_dtype
        if dtype == "float32":
            source = paths.ensure_local(embeddings.folder / stored_vectors.VECTORS)
            paths.link(source, folder / stored_vectors.VECTORS)
            return {}
        stored_vectors.write(folder, embeddings.vectors_NxE, dtype)
        vectors, scales = stored_vectors.read(folder, dtype)
        encoder = cls.make_encoder(inputs.model, inputs.mesh, inputs.settings.dimensions)
        queries_BxE = encoder(sample_queries(inputs.collection))
        k = min(100, len(vectors))
        wanted, _ = ExactSearch(embeddings.vectors_NxE, inputs.mesh)(queries_BxE, k)
        found, _ = ExactSearch(vectors, inputs.mesh, scales)(queries_BxE, k)
        recalls = {f"recall_at_{k}": recall_at(k, wanted, found) for k in (10, 100)}
        log(
            f"exact: recall@10 {recalls['recall_at_10']:.4f}, recall@100 {recalls['recall_at_100']:.4f} of "
            f"vectors as {dtype} against float32 for {len(queries_BxE)} queries"
        )
        return recalls

    @classmethod
    def open(cls, folder: Path, make_partitioner: Callable[[], Partitioner] | None = None) -> "ExactSearcher":
        """See `Searcher.open`."""
        manifest = storage.read_manifest(folder, "index")
        files = paths.ensure_local(folder)
        check_files(files, manifest)
        encoder = cls.make_encoder(load_own_model(folder, manifest), None, manifest.get(FIRST_DIMENSIONS))
        vectors, scales = stored_vectors.read(files, manifest["vector_dtype"])
        mesh = make_partitioner().mesh if make_partitioner else all_devices()
        return cls(encoder, vectors, arrow_ids.read(files / "ids.arrow"), mesh, scales)


@register_searcher
class ScannSearcher(DenseSearcher):
    """Searches with ScaNN (see `scann_index`), on the host's processor.

    Args:
      encoder: the encoder of queries.
      index: the passages' index.
      passage_ids: the passage ids by row.
      dimensions: the length of a vector.
    """

    kind: ClassVar[str] = "scann"
    is_shared: bool = True

    def __init__(self, encoder: TextEncoder, index: ScannIndex, passage_ids: pa.Array, dimensions: int):
        super().__init__(encoder, passage_ids, dimensions)
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
        """See `Searcher.recipe`: the dtype of the vectors and the settings of the index."""
        scann_index.check_installed()  # before the passages are encoded
        chosen = scann_index.settings(inputs.collection.passage_count)
        return super().recipe(inputs) | {"scann": chosen}

    @classmethod
    @contextlib.contextmanager
    def prepare(cls, inputs: IndexInputs, recipe: dict) -> Iterator[tuple[Path, ScannIndex, dict]]:
        """See `Searcher.prepare`. The processes build, open and tune an index, each its shards.

        Yields:
          The folder of the shards, the index, and its recall against exact search, which is measured with
          queries of the collection.
        """
        scratch = _unfinished_folder(inputs)
        with multihost.lock(scratch):
            if multihost.broadcast_from_process_0(storage.is_up_to_date(inputs.folder, recipe)):
                yield None  # another command has made it meanwhile
                return
            earlier = None
            if indexed := multihost.on_every_process(lambda: indexed_passages(inputs, cls.kind)):
                facts = storage.read_manifest(inputs.folder, "index")["scann"]
                earlier = Indexed(inputs.folder / SHARDS, facts, *indexed)
            dtype = inputs.settings.vector_dtype
            index = scann_shards.build(scratch, inputs.embeddings, dtype, recipe, earlier)
            encoder = cls.make_encoder(inputs.model, inputs.mesh, inputs.settings.dimensions)
            recalls = index.tune(inputs.embeddings, encoder(sample_queries(inputs.collection)))
            yield scratch, index, recalls
            multihost.on_process_0(lambda: paths.remove(scratch))

    @classmethod
    def tidy(cls, inputs: IndexInputs, recipe: dict) -> None:
        """See `Searcher.tidy`: the shards."""
        unfinished.remove_leftover(_unfinished_folder(inputs), recipe)

    @classmethod
    def write_index(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `DenseSearcher.write_index`."""
        scratch, index, recalls = inputs.prepared
        scann_shards.copy_shards(scratch, folder / SHARDS, len(index.all_facts))
        return {"scann": index.facts} | recalls

    @classmethod
    def open(cls, folder: Path, make_partitioner: object = None) -> "ScannSearcher":
        """See `Searcher.open`. `make_partitioner` is not called."""

        def opened() -> tuple[dict, ScannIndex]:
            manifest = storage.read_manifest(folder, "index")
            count = len(manifest["scann"]["shards"]) if "scann" in manifest else 0
            own = [scann_shards.shard_folder(Path(SHARDS), n) for n in multihost.process_share(count)]
            check_files(folder, manifest, [*OF_PASSAGES, *map(str, own)])
            return manifest, ScannIndex.open(folder / SHARDS, manifest["scann"])

        # A shard that cannot be read must not leave those waiting that hold the others.
        manifest, index = multihost.on_every_process(opened)
        encoder = cls.make_encoder(load_own_model(folder, manifest), None, manifest.get(FIRST_DIMENSIONS))
        return cls(encoder, index, arrow_ids.read(folder / "ids.arrow"), manifest["dimensions"])


def sample_queries(collection: Collection, count: int = RECALL_QUERIES) -> list[str]:
    """Returns up to `count` texts to measure an approximate search with.

    They are dev queries if there are any, otherwise train queries, those of another split, or passages. Other
    queries later on do not make an index stale: they chose how far it searches, and the recall that it tells.
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


def _unfinished_folder(inputs: IndexInputs) -> Path:
    """Returns where the shards lie until the searcher is finished."""
    return inputs.folder.with_name(f"{inputs.folder.name}{UNFINISHED}")
