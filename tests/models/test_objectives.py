"""Objectives against float64 brute force and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.models.objectives import cross_entropy, divergence, in_batch_softmax
from retrieval_jax.models.softmax import softmax_of_logits


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


def smoothed(logits, target, smoothing, z_loss) -> float:
    """T5X's loss of one token by its definition, in float64: distance from a softened target, and z-loss."""
    log_z = np.log(np.exp(logits).sum())
    wanted = np.full(len(logits), smoothing / (len(logits) - 1))
    wanted[target] = 1 - smoothing
    entropy = -(wanted[wanted > 0] * np.log(wanted[wanted > 0])).sum()
    return -(wanted * (logits - log_z)).sum() - entropy + z_loss * log_z**2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_equals_its_definition(smoothing: float, z_loss: float):
    logits, targets = np.random.default_rng(1).normal(size=(4, 7)), np.array([0, 6, 3, 3])
    softmax = softmax_of_logits(jnp.array(logits), jnp.array(targets))
    losses = cross_entropy(softmax, z_loss, smoothing, 7, jnp.array(logits.sum(1)))
    expected = [smoothed(x, t, smoothing, z_loss) for x, t in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def kl(p, q) -> np.ndarray:
    """KL(p‖q) of float64 probabilities."""
    return (p * np.log(p / q)).sum(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 20))
def test_divergence_is_the_mean_of_both_directions(seed: int, spread: float):
    a, b = spread * np.random.default_rng(seed).normal(size=(2, 3, 5))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = (kl(p, q) + kl(q, p)) / 2
    np.testing.assert_allclose(divergence(jnp.array(a), jnp.array(b)), expected, rtol=2e-3, atol=1e-4)


def test_divergence_stays_finite_where_that_of_probabilities_does_not():
    a, b = jnp.array([[300.0, 0.0, -50.0]]), jnp.array([[0.0, 200.0, 40.0]])
    p, q = jax.nn.softmax(a), jax.nn.softmax(b)
    assert not np.isfinite(jnp.sum(p * jnp.log(p / q)))  # as the loss is usually written
    value, gradient = jax.value_and_grad(lambda a: divergence(a, b)[0])(a)
    assert value == pytest.approx((300 + 200) / 2, rel=1e-6)  # all of p is at 0, all of q at 1
    assert np.isfinite(gradient).all()
