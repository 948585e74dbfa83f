"""Objectives against their definitions, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.models.objectives import symmetric_kl, token_cross_entropy
from retrieval_jax.models.softmax import softmax_stats


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
    softmax = softmax_stats(jnp.array(logits), jnp.array(targets))
    losses = token_cross_entropy(softmax, z_loss, smoothing, 7, jnp.array(logits.sum(1)))
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
    np.testing.assert_allclose(symmetric_kl(jnp.array(a), jnp.array(b)), expected, rtol=2e-3, atol=1e-4)


def test_divergence_stays_finite_where_that_of_probabilities_does_not():
    a, b = jnp.array([[300.0, 0.0, -50.0]]), jnp.array([[0.0, 200.0, 40.0]])
    p, q = jax.nn.softmax(a), jax.nn.softmax(b)
    assert not np.isfinite(jnp.sum(p * jnp.log(p / q)))  # as the loss is usually written
    value, gradient = jax.value_and_grad(lambda a: symmetric_kl(a, b)[0])(a)
    assert value == pytest.approx((300 + 200) / 2, rel=1e-6)  # all of p is at 0, all of q at 1
    assert np.isfinite(gradient).all()
