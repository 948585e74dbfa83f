"""Exact search against brute force, and what its program holds."""

import numpy as np
import pytest

from retrieval_jax.search import exact


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
    text = exact.top_vectors.lower(queries, vectors, len(vectors), 7, mesh).as_text()
    assert f"10x{len(vectors)}x" not in text
    assert f"4x{len(vectors)}x" in text
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    for product in products:  # neither side is rounded, on a TPU or a GPU either
        assert product.count("HIGHEST") == 2
