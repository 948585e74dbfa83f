"""Searching by vectors: a dual encoder's passages, exactly (JAX) or approximately (ScaNN)."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax import arrow_ids, storage
from retrieval_jax.data.vocabulary import Vocabulary, round_up
from retrieval_jax.errors import UserError
from retrieval_jax.search.searcher import Ranking
from retrieval_jax.training import multihost
from retrieval_jax.training.checkpoints import open_model


class TextEncoder:
    """Texts to float32 vectors, by a dual encoder's `encode_queries` or `encode_passages`.

    `params` may be replaced between calls. `mesh`: where they lie; None for one device. `batch_size` is
    rounded up to share over its `data`.
    """

    def __init__(
        self,
        encode: Callable[[dict, jax.Array], jax.Array],
        params: dict,
        vocabulary: Vocabulary,
        length: int,
        batch_size: int = 64,
        mesh: Mesh | None = None,
    ):
        self.params, self.mesh = params, mesh
        self.vocabulary, self.length = vocabulary, length
        self.batch_size = round_up(batch_size, mesh.shape["data"] if mesh else 1)
        # The vectors go to every device, so that each process of a mesh of several reads them whole.
        self._encode = jax.jit(encode, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None)

    def __call__(self, texts: Sequence[str], advance: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors, len(texts) × vector_dim; `advance` is told how many more texts are done."""
        vectors = []
        for first in range(0, len(texts), self.batch_size):
            some = list(texts[first : first + self.batch_size])
            tokens = self.vocabulary.batch(some + [""] * (self.batch_size - len(some)), self.length)
            if self.mesh:
                tokens = multihost.placed(self.mesh, tokens, "data")
            vectors.append(np.asarray(self._encode(self.params, tokens))[: len(some)])
            if advance:
                advance(len(some))
        return np.concatenate(vectors)


@jax.jit(static_argnames="k")
def top_vectors(queries_BxE: jax.Array, vectors_NxE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(rows B×k, dot products B×k) of the nearest vectors, best first."""
    scores, rows = jax.lax.top_k(jnp.einsum("be,ne->bn", queries_BxE, vectors_NxE), k)
    return rows, scores


class ExactSearcher:
    """Every passage's dot product with the query."""

    kind = "exact"

    def __init__(self, encoder: TextEncoder, vectors_NxE: np.ndarray, passage_ids: Sequence[str]):
        self.encoder = encoder
        self.vectors = jnp.asarray(vectors_NxE)
        self.passage_ids = arrow_ids.array(passage_ids)

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """See Searcher. Scores are cosines."""
        k = min(k, len(self.passage_ids))
        rows, scores = top_vectors(self.encoder(queries), self.vectors, k)
        return _rankings(rows, scores, self.passage_ids)

    @staticmethod
    def write_index(folder: Path, vectors_NxE: np.ndarray) -> None:
        """Nothing but the vectors, which every dense searcher's folder holds."""

    @classmethod
    def open(cls, folder: Path) -> "ExactSearcher":
        """Opens a folder that `index` made."""
        return cls(*_open(folder))


class ScannSearcher:
    """ScaNN's search: brute force below 20,000 vectors, above it quantised with exact re-ordering."""

    kind = "scann"

    def __init__(self, encoder: TextEncoder, index, passage_ids: Sequence[str]):
        self.encoder, self.index, self.passage_ids = encoder, index, arrow_ids.array(passage_ids)

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """See Searcher. Scores are (approximate) cosines."""
        k = min(k, len(self.passage_ids))
        rows, scores = self.index.search_batched(self.encoder(queries), final_num_neighbors=k)
        return _rankings(rows, scores, self.passage_ids)

    @staticmethod
    def write_index(folder: Path, vectors_NxE: np.ndarray) -> None:
        """Builds ScaNN's index and writes it to folder/scann."""
        count = len(vectors_NxE)
        builder = scann_ops().builder(vectors_NxE, 100, "dot_product")
        if count < 20_000:
            builder = builder.score_brute_force()
        else:
            if count >= 100_000:
                leaves = int(count**0.5)
                builder = builder.tree(leaves, max(leaves // 10, 1), training_sample_size=min(count, 250_000))
            builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(1000)
        (folder / "scann").mkdir()
        builder.build().serialize(str(folder / "scann"), relative_path=True)

    @classmethod
    def open(cls, folder: Path) -> "ScannSearcher":
        """Opens a folder that `index` made."""
        encoder, _, passage_ids = _open(folder)
        return cls(encoder, scann_ops().load_searcher(str(folder / "scann")), passage_ids)


DENSE = {searcher.kind: searcher for searcher in (ExactSearcher, ScannSearcher)}


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


def write(folder: Path, kind: str, vectors: np.ndarray, passage_ids: Iterable[str]) -> None:
    """Writes the files of a dense searcher into a folder."""
    np.save(folder / "vectors.npy", vectors)
    arrow_ids.write(folder / "ids.arrow", passage_ids)
    DENSE[kind].write_index(folder, vectors)


def _open(folder: Path) -> tuple[TextEncoder, np.ndarray, pa.Array]:
    manifest = storage.read_manifest(folder, "index")
    opened = open_model(folder / manifest["model"], manifest["step"])
    try:
        vectors = np.load(folder / "vectors.npy")
        passage_ids = arrow_ids.read(folder / "ids.arrow")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{folder}: cannot be read ({error}): delete it, then `retrieval-jax index`"
        ) from None
    encoder = TextEncoder(
        opened.model.encode_queries,
        opened.params,
        opened.vocabulary,
        opened.description["input_length"],
        batch_size=32,
    )
    return encoder, vectors, passage_ids


def _rankings(rows: jax.Array, scores: jax.Array, passage_ids: pa.Array) -> list[Ranking]:
    # ScaNN fills up short rows with NaN scores.
    return [
        [(passage_ids[row].as_py(), score) for row, score in zip(*pair, strict=True) if score == score]
        for pair in zip(np.asarray(rows).tolist(), np.asarray(scores).tolist(), strict=True)
    ]
