"""The vectors of passages without a model, and scripts in processes of their own."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.data.collection import Passage
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.search import analysis
from retrieval_jax.search.bm25 import BM25Searcher
from retrieval_jax.search.bm25_index import INDEX_VERSION, write_index


def embeddings_of(folder: Path, vectors: np.ndarray, ids: list[str], texts: np.ndarray | None = None):
    """What `encode_collection` would give; `texts` are digests, else all texts are alike."""
    folder.mkdir(parents=True)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "text_hashes.npy", np.zeros(len(ids), np.uint64) if texts is None else texts)
    arrow_ids.write(folder / "ids.arrow", ids)
    return Embeddings(
        folder,
        np.load(folder / "vectors.npy", mmap_mode="r"),
        arrow_ids.read(folder / "ids.arrow"),
        np.load(folder / "text_hashes.npy"),
        {"recipe": {"checksum": "0"}},
    )


@pytest.fixture
def embeddings() -> Callable[..., Embeddings]:
    return embeddings_of


def bm25_of_passages(
    folder: Path, passages: Iterable[Passage], language: str | None = "porter"
) -> BM25Searcher:
    """BM25 over passages without a collection, written and opened again."""
    passages = [*passages]
    write_index(folder, [lambda: [passage.full_text for passage in passages]], language)
    arrow_ids.write(folder / "ids.arrow", [passage.id for passage in passages])
    facts = {"language": language, "analysis": analysis.VERSION, "index_version": INDEX_VERSION}
    storage.write_manifest(folder, {"recipe": {}, **facts})
    return BM25Searcher.open(folder)


@pytest.fixture(scope="session")
def bm25_of() -> Callable[..., BM25Searcher]:
    return bm25_of_passages
