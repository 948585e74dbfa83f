import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.decoding.atomic import top_docids

WIDTH = 32
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
# On 8 simulated devices: tests/search/test_sharded.py.


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH).filter(any),
    st.sampled_from([1, 3, WIDTH, WIDTH + 4]),
    st.booleans(),
    st.sampled_from([None, MESH]),
    st.sampled_from([None, 0.99]),
)
@settings(deadline=None)
def test_top_docids_are_those_of_a_sort(seed, real, k, few_unreal, mesh, recall):
    """An approximate top-k is exact on a processor."""
    real = np.array(real)
    logits = np.random.default_rng(seed).normal(0, 3, (4, WIDTH)).astype(np.float32)
    logits[:, ~real] += 10  # were they not left out, padding tokens would come first
    tokens, scores = top_docids(logits, real, k, few_unreal, mesh, recall)

    wide = logits.astype(np.float64)
    log_probs = wide - np.log(np.exp(wide).sum(1, keepdims=True))  # of the whole softmax, padding and all
    found = min(k, real.sum())
    expected = np.argsort(-np.where(real, logits, -np.inf), axis=1, kind="stable")[:, :found]
    assert tokens.shape == scores.shape == (4, k)
    assert np.array_equal(tokens[:, :found], expected)
    np.testing.assert_allclose(scores[:, :found], np.take_along_axis(log_probs, expected, axis=1), atol=1e-4)
    assert (tokens[:, found:] == -1).all()
    assert (scores[:, found:] == -np.inf).all()
