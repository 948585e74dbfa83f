"""A collection's first dimensions: made once of the whole vectors, and again when these are others."""

from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.data.collection import Collection
from retrieval_jax.embeddings import shortened
from retrieval_jax.embeddings.encoding import encode_collection
from retrieval_jax.embeddings.shortened import shorten_embeddings


@pytest.mark.parametrize("normalize", [True, False])
def test_shortened_vectors_equal_the_first_dimensions(
    normalize: bool, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shortened, "_BLOCK", 16)  # which does not divide the passages

    def whole(seed: int):
        vectors = np.random.default_rng(seed).normal(size=(collection.passage_count, 8)).astype(np.float32)
        model = {"model": "random", "checksum": str(seed)}
        return encode_collection(
            tmp_path / "dense", model, collection, lambda: lambda texts, advance: vectors[: len(texts)]
        )

    for seed in (0, 1):
        embeddings = whole(seed)
        made = shorten_embeddings(embeddings, 3, normalize)
        expected = embeddings.vectors_NxE[:, :3].astype(np.float64)
        if normalize:
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(made.vectors_NxE, expected, rtol=1e-6)
        assert made.ids.equals(embeddings.ids)
        assert (made.text_hashes_N == embeddings.text_hashes_N).all()
        written = (made.folder / "vectors.npy").stat().st_mtime_ns
        again = shorten_embeddings(embeddings, 3, normalize)
        assert (again.folder / "vectors.npy").stat().st_mtime_ns == written
