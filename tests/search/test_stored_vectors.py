"""Vectors on disk in each dtype: their error, the recall that they keep, and files of another dtype."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.search import stored_vectors
from retrieval_jax.search.scann_index import recall_at


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Around 40 centres, with dimensions of very different size, as those of an encoder have."""
    rng = np.random.default_rng(0)
    size = (1 + np.arange(32)) ** -0.5
    found = rng.normal(size=(40, 32))[rng.integers(0, 40, 2000)] * size
    return (found + 0.5 * rng.normal(size=(2000, 32)) * size).astype(np.float32)


@pytest.mark.parametrize(("dtype", "recall"), [("bfloat16", 0.99), ("int8", 0.97)])
def test_what_is_read_is_what_was_written_rounded(dtype, recall, vectors, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stored_vectors, "_BLOCK", 300)
    vectors = np.concatenate([vectors, np.zeros((1, 32), np.float32), 1e4 * vectors[:1]])
    stored_vectors.write(tmp_path, vectors, dtype)
    stored, scales = stored_vectors.read(tmp_path, dtype)
    if dtype == "bfloat16":
        assert scales is None
        np.testing.assert_array_equal(stored, vectors.astype(ml_dtypes.bfloat16))
        meant = stored.astype(np.float32)
    else:
        assert stored.dtype == np.int8
        assert np.abs(stored[:-2].astype(int)).max(axis=1).tolist() == [127] * 2000
        meant = stored * scales[:, None]
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        assert (np.abs(meant - vectors) <= 0.5001 * largest / 127).all()
    assert (meant[-2] == 0).all()
    queries = vectors[:50] + 0.1
    wanted, found = (np.argsort(-(queries @ x[:-1].T), axis=1)[:, :100] for x in (vectors, meant))
    assert recall_at(100, wanted, found) > recall


def test_files_of_another_dtype_are_told(vectors, tmp_path: Path):
    stored_vectors.write(tmp_path, vectors, "int8")
    with pytest.raises(UserError, match=r"vectors.npy: holds int8, and the manifest says bfloat16: delete"):
        stored_vectors.read(tmp_path, "bfloat16")
    (tmp_path / "vector_scales.npy").unlink()
    with pytest.raises(UserError, match=r"vector_scales.npy.*delete the folder, then `retrieval-jax index`"):
        stored_vectors.read(tmp_path, "int8")
