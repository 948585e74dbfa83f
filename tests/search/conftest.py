"""The vectors of passages without a model, and scripts in processes of their own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import arrow_ids
from retrieval_jax.embeddings.encoding import Embeddings


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
