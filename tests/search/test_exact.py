"""Exact search against brute force, and what its program holds."""

import numpy as np
import pytest

from retrieval_jax.search import exact, stored_vectors


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_exact_search_holds_few_scores_at_once(vectors: np.ndarray, monkeypatch):
    monkeypatch.setattr(exact, "_SCORES", 4 * len(vectors))
    queries = vectors[:10] + 0.1
    rows, scores = exact.ExactSearch(vectors)(queries, 7)
    order = np.argsort(-(queries @ vectors.T), axis=1)[:, :7]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, order, 1), atol=1e-5)
    mesh = exact.ExactSearch(vectors).mesh
    nothing = np.zeros((10, 7), np.int32), np.full((10, 7), -np.inf, np.float32)
    text = exact.top_vectors.lower(queries, (vectors,), 0, len(vectors), nothing, mesh).as_text()
    assert f"10x{len(vectors)}x" not in text
    assert f"4x{len(vectors)}x" in text
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    for product in products:  # neither side is rounded, on a TPU or a GPU either
        assert product.count("HIGHEST") == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("resident", [True, False])
def test_blocks_give_what_all_at_once_give(dtype, resident, vectors: np.ndarray, tmp_path, monkeypatch):
    """Against float64 products of what the dtype keeps; of equal ones the lower row comes first."""
    vectors = np.concatenate([vectors, vectors[:140], vectors[290:]])  # copies in other blocks
    queries = vectors[5:9] + 0.1
    np.save(tmp_path / "vectors.npy", vectors)
    scales = None
    if dtype != "float32":
        stored_vectors.write(tmp_path, vectors, dtype)
        stored, scales = stored_vectors.read(tmp_path, dtype)
    else:
        stored = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    meant = stored.astype(np.float64) * (1 if scales is None else scales[:, None].astype(np.float64))
    products = queries.astype(np.float64) @ meant.T
    monkeypatch.setattr(exact, "_elements", lambda *_: 64 * 16)
    monkeypatch.setattr(exact, "_memory", lambda mesh: np.inf if resident else 1000)
    search = exact.ExactSearch(stored, scales_N=scales)
    assert (search.rows, search.resident) == (64, resident)
    for k in (1, 30, 450):
        rows, scores = search(queries, k)
        best = -np.sort(-products, axis=1)[:, :k]
        np.testing.assert_allclose(np.take_along_axis(products, rows, 1), best, atol=2e-6)
        np.testing.assert_allclose(scores, best, atol=2e-6)
        for some in rows.tolist():
            assert len(set(some)) == k
            places = {row: place for place, row in enumerate(some)}
            assert all(places[row - 300] == places[row] - 1 for row in some if 300 <= row < 440)
    assert bool(search._kept) == resident
