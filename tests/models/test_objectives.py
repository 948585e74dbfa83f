"""Objectives against float64 brute force and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.models.objectives import in_batch_softmax, token_cross_entropy


def brute_force(queries, passages, rows, scale) -> float:
    """Both directions, one candidate at a time, in float64."""
    total, B = 0.0, len(rows)
    for i in range(B):
        allowed = [j for j in range(B) if j == i or rows[j] != rows[i]]
        positive = scale * queries[i] @ passages[i]
        to_passage = [scale * queries[i] @ passages[j] for j in allowed]
        to_query = [scale * queries[j] @ passages[i] for j in allowed]
        total += np.log(np.exp(to_passage).sum()) - positive
        total += np.log(np.exp(to_query).sum()) - positive
    return total


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_in_batch_softmax_equals_brute_force(seed: int, rows: list[int]):
    rng = np.random.default_rng(seed)
    queries, passages = rng.normal(size=(2, 6, 4))
    loss, right = in_batch_softmax(jnp.array(queries), jnp.array(passages), jnp.array(rows), 2.0)
    assert loss == pytest.approx(brute_force(queries, passages, rows, 2.0), rel=1e-4, abs=1e-4)
    assert 0 <= right <= 6


def test_a_batch_of_one_passage_has_no_negatives():
    vectors = jnp.ones((3, 2))
    loss, right = in_batch_softmax(vectors, vectors, jnp.zeros(3, jnp.int32), 1.0)
    assert loss == 0
    assert right == 3


def test_gradients_equal_finite_differences():
    rng = np.random.default_rng(0)
    queries, passages = (0.5 * rng.normal(size=(5, 3)) for _ in range(2))
    rows = np.array([0, 1, 2, 1, 4])
    gradient = jax.grad(lambda q: in_batch_softmax(q, jnp.array(passages), jnp.array(rows), 3.0)[0])(
        jnp.array(queries)
    )
    for index in np.ndindex(queries.shape):
        step = np.zeros_like(queries)
        step[index] = 1e-5
        above, below = (brute_force(queries + s * step, passages, rows, 3.0) for s in (1, -1))
        assert gradient[index] == pytest.approx((above - below) / 2e-5, abs=2e-3)


def test_token_cross_entropy_counts_only_weighted_positions():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 3, 5))
    targets = np.array([[1, 2, 0], [4, 0, 0]])
    weights = np.array([[1, 1, 0], [1, 0, 0]])
    nll, right = token_cross_entropy(jnp.array(logits), jnp.array(targets), jnp.array(weights))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = [(0, 0, 1), (0, 1, 2), (1, 0, 4)]
    assert nll == pytest.approx(-sum(log_probs[p] for p in places), rel=1e-5)
    assert right == sum(logits[b, t].argmax() == v for b, t, v in places)
