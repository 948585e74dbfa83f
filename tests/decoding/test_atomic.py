import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.decoding.atomic import top_docids

WIDTH = 36  # blocks of 4
SEARCH = jax.jit(top_docids, static_argnums=(2, 3, 4, 5))
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
# On 8 simulated devices: tests/search/test_sharded.py.


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH).filter(any),
    st.sampled_from([1, 3, WIDTH, WIDTH + 4]),
    st.sampled_from([None, MESH]),
    st.sampled_from([None, 0.99]),
    st.booleans(),
)
@settings(deadline=None)
def test_top_docids_are_those_of_a_sort(seed, real, k, mesh, recall, sums_log_probs):
    """An approximate top-k is exact on a processor. Of an exact one's ties the lower token comes first."""
    real = np.array(real)
    logits = np.random.default_rng(seed).normal(0, 3, (4, WIDTH)).astype(np.float32)
    if recall is None:
        logits = np.round(logits) + 0.0  # of which -0.0 is not less
    logits[:, ~real] += 10  # were they not left out, padding tokens would come first
    tokens, scores = SEARCH(logits, real, k, mesh, recall, sums_log_probs)

    wide = logits.astype(np.float64)
    if sums_log_probs:
        wide -= np.log(np.exp(wide).sum(1, keepdims=True))  # of the whole softmax, padding and all
    found = min(k, real.sum())
    expected = np.argsort(-np.where(real, logits, -np.inf), axis=1, kind="stable")[:, :found]
    assert tokens.shape == scores.shape == (4, k)
    assert np.array_equal(tokens[:, :found], expected)
    np.testing.assert_allclose(scores[:, :found], np.take_along_axis(wide, expected, axis=1), atol=1e-4)
    assert (tokens[:, found:] == -1).all()
    assert (scores[:, found:] == -np.inf).all()


@pytest.mark.parametrize("width", [128 * 100, 128 * 100 + 1, 3])
@pytest.mark.parametrize("unreal", [0, 20, 6000])
def test_whole_blocks_and_widths_without_any(width, unreal):
    """Of 100 blocks none, a few or all hold tokens that are not real."""
    rng = np.random.default_rng(0)
    logits, real = rng.normal(size=(2, width)).astype(np.float32), np.ones(width, bool)
    real[rng.permutation(width)[: min(unreal, width - 1)]] = False
    tokens, scores = SEARCH(logits, real, 40, None, None)
    masked = jnp.where(real, jax.nn.log_softmax(logits), -jnp.inf)
    best, expected = jax.lax.top_k(masked, min(40, real.sum()))
    assert np.array_equal(tokens[:, : expected.shape[1]], expected)
    np.testing.assert_allclose(scores[:, : expected.shape[1]], best, atol=1e-5)
