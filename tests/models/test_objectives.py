"""Objectives against float64 brute force and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.models.objectives import in_batch_softmax, token_cross_entropy


def brute_force(queries, passages, rows, grades, scale) -> float:
    """Both directions, one candidate at a time, in float64. passages BxGxE, rows and grades BxG."""
    total, (B, G) = 0.0, rows.shape
    candidates = [(j, g) for j in range(B) for g in range(G)]

    def answers(i: int, j: int, g: int) -> bool:
        return any(rows[i, h] == rows[j, g] for h in range(G) if grades[i, h] > 0)

    for i in range(B):
        score = scale * queries[i] @ passages[i, 0]
        to_passage, to_query = [score], [score]
        for j, g in candidates:
            if rows[j, g] >= 0 and not answers(i, j, g):
                to_passage.append(scale * queries[i] @ passages[j, g])
        to_query += [scale * queries[j] @ passages[i, 0] for j in range(B) if j != i and not answers(j, i, 0)]
        total += np.log(np.exp(to_passage).sum()) + np.log(np.exp(to_query).sum()) - 2 * score
    return total


def groups(seed: int, B: int = 5, G: int = 3, passages: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Rows and grades of candidates: a positive, then more positives, negatives and padding."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.choice(passages, G, replace=False) for _ in range(B)])
    grades = rng.integers(0, 3, (B, G))
    grades[:, 0] = 1 + grades[:, 0]
    padding = rng.random((B, G)) < 0.3
    padding[:, 0] = False
    return np.where(padding, -1, rows), np.where(padding, -1, grades)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(3, 12))
def test_in_batch_softmax_equals_brute_force(seed: int, G: int, distinct: int):
    rng = np.random.default_rng(seed)
    rows, grades = groups(seed, G=G, passages=distinct)
    queries, passages = rng.normal(size=(5, 4)), rng.normal(size=(5, G, 4))
    loss, right = in_batch_softmax(*map(jnp.array, (queries, passages.reshape(-1, 4), rows, grades)), 2.0)
    assert loss == pytest.approx(brute_force(queries, passages, rows, grades, 2.0), rel=1e-4, abs=1e-4)
    assert 0 <= right <= 5


def test_a_batch_of_one_passage_has_no_negatives():
    vectors, rows = jnp.ones((3, 2)), jnp.zeros((3, 1), jnp.int32)
    loss, right = in_batch_softmax(vectors, vectors, rows, rows + 1, 1.0)
    assert loss == 0
    assert right == 3


def test_gradients_equal_finite_differences():
    rng = np.random.default_rng(0)
    queries, passages = 0.5 * rng.normal(size=(5, 3)), 0.5 * rng.normal(size=(5, 2, 3))
    rows, grades = groups(3, G=2)
    rest = [jnp.array(x) for x in (passages.reshape(-1, 3), rows, grades)]
    gradient = jax.grad(lambda q: in_batch_softmax(q, *rest, 3.0)[0])(jnp.array(queries))
    for index in np.ndindex(queries.shape):
        step = np.zeros_like(queries)
        step[index] = 1e-5
        above, below = (brute_force(queries + s * step, passages, rows, grades, 3.0) for s in (1, -1))
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
