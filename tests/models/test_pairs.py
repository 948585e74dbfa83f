"""Margins, means over pairs, and divergences of candidates, against loops and SciPy."""

import jax
import numpy as np
from scipy.special import softmax
from scipy.stats import entropy

from retrieval_jax.models.pairs import divergence, margins, mean_of_pairs


def test_margins_and_their_means_over_some_pairs():
    """The last query has no pair. What stands where there is none, NaN too, counts in nothing."""
    rng = np.random.default_rng(0)
    x, pairs = rng.normal(size=(4, 3)).astype(np.float32), rng.random((4, 3, 3)) < 0.4
    x[0, 2], pairs[0, 2], pairs[0, :, 2], pairs[3] = np.nan, False, False, False
    found = np.asarray(mean_of_pairs(margins(x), pairs))
    for b in range(4):
        some = [x[b, i] - x[b, j] for i in range(3) for j in range(3) if pairs[b, i, j]]
        np.testing.assert_allclose(found[b], np.mean(some) if some else 0, rtol=1e-5)
    assert found[3] == 0
    assert np.isfinite(jax.grad(lambda x: mean_of_pairs(margins(x), pairs).sum())(x)).all()


def test_the_divergence_is_that_of_the_candidates_that_count():
    rng = np.random.default_rng(1)
    teacher, scores = rng.normal(size=(2, 4, 5)).astype(np.float32)
    counts = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0] * 5], bool)
    teacher[~counts] = np.nan
    found, several = divergence(teacher, scores, counts)
    assert several.tolist() == [True, True, False, False]
    for b, some in enumerate(counts):
        exact = entropy(softmax(teacher[b, some]), softmax(scores[b, some])) if some.sum() > 1 else 0
        np.testing.assert_allclose(found[b], exact, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: divergence(teacher, x, counts)[0].sum())(scores)).all()
