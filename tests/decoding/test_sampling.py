"""Sampling from a language whose next token depends on the newest one alone, against exact probabilities."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.data.vocabulary import EOS
from retrieval_jax.decoding.sampling import sample_top_k

V, LENGTH, TOP_K, TEMPERATURE = 6, 3, 3, 1.5
LOGITS = np.random.default_rng(0).normal(0, 1.5, (V, V))
LOGITS[:, 0] = -9.0  # padding is never written


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample(keys_B: jax.Array, count: int, length: int) -> tuple[jax.Array, jax.Array]:
    def step(tokens_BxN, position, cache):
        return jnp.float32(LOGITS)[tokens_BxN], cache

    return sample_top_k(step, (), keys_B, count, length, TEMPERATURE, TOP_K)


def sequences() -> dict[tuple[int, ...], tuple[float, float]]:
    """Every sequence that can be sampled -> its probability, and its log-probability by the whole softmax."""
    found = {}
    for tokens in itertools.product(range(V), repeat=LENGTH):
        tokens = (*itertools.takewhile(lambda t: t != EOS, tokens), EOS)[:LENGTH]
        probability, log_prob, before = 1.0, 0.0, 0
        for token in tokens:
            best = np.sort(LOGITS[before])[-TOP_K:]
            inside = LOGITS[before][token] >= best[0]
            probability *= (
                inside * np.exp(LOGITS[before][token] / TEMPERATURE) / np.exp(best / TEMPERATURE).sum()
            )
            log_prob += LOGITS[before][token] - np.log(np.exp(LOGITS[before]).sum())
            before = token
        if probability:
            found[tokens + (0,) * (LENGTH - len(tokens))] = probability, log_prob
    return found


def test_sequences_are_as_frequent_as_they_are_probable():
    exact, count = sequences(), 20_000
    assert abs(sum(p for p, _ in exact.values()) - 1) < 1e-9
    tokens, scores = (np.asarray(x)[0] for x in sample(jax.random.split(jax.random.key(0), 1), count, LENGTH))
    drawn = {}
    for row, score in zip(map(tuple, tokens.tolist()), scores.tolist(), strict=True):
        drawn.setdefault(row, []).append(score)
    assert drawn.keys() <= exact.keys()
    for row, found in drawn.items():
        np.testing.assert_allclose(found, exact[row][1], atol=1e-4)
    expected = np.array([exact[row][0] * count for row in exact])
    counts = np.array([len(drawn.get(row, [])) for row in exact])
    chi_square = ((counts - expected) ** 2 / expected)[expected > 5].sum()
    freedom = (expected > 5).sum() - 1
    assert freedom > 10
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_a_row_draws_by_its_own_key():
    keys = jax.random.split(jax.random.key(1), 3)
    tokens, _ = sample(keys, 20, LENGTH)
    turned, _ = sample(keys[jnp.array([2, 0, 1])], 20, LENGTH)
    np.testing.assert_array_equal(turned, np.asarray(tokens)[[2, 0, 1]])
    assert (np.asarray(tokens)[0] != np.asarray(tokens)[1]).any()
