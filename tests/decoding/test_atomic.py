import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.decoding.atomic import top_docids

WIDTH = 32


@given(st.integers(0, 2**32 - 1), st.integers(1, WIDTH - 1), st.sampled_from([1, 3, WIDTH - 1]))
@settings(deadline=None)
def test_top_docids_are_those_of_a_sort(seed, docids, k):
    k = min(k, docids) if k < WIDTH - 1 else docids  # as the searcher does it
    logits = np.random.default_rng(seed).normal(0, 3, (4, WIDTH)).astype(np.float32)
    logits[:, 0] += 10  # were they not left out, padding tokens would come first
    logits[:, docids + 1 :] += 10
    rows, scores = top_docids(logits, docids, k)

    wide = logits.astype(np.float64)
    log_probs = wide - np.log(np.exp(wide).sum(1, keepdims=True))  # of the whole softmax, padding and all
    expected = np.argsort(-logits[:, 1 : docids + 1], axis=1, kind="stable")[:, :k]
    assert np.array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(log_probs, expected + 1, axis=1), atol=1e-4)
