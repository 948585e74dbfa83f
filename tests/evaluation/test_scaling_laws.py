"""Laws of scale, against scipy, brute force in float64 and data whose law is known."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from retrieval_jax.evaluation.scaling_laws import (
    TAIL,
    contrastive_entropy,
    fit_power_law,
    found_at,
    mean_interval,
    prediction_error,
)


def test_contrastive_entropy_is_its_formula_without_passages_that_answer():
    random = np.random.default_rng(0)
    positive_Q, negatives_QxDxR = random.normal(size=3), random.normal(size=(3, 4, 5)) * 3
    negatives_QxDxR[1, 2, 3] = np.nan
    expected = []
    for positive, draws in zip(positive_Q, negatives_QxDxR, strict=True):
        terms = [sum(math.exp(s) for s in some if not math.isnan(s)) for some in draws]
        expected.append(
            sum(-math.log(math.exp(positive) / (math.exp(positive) + t)) for t in terms) / len(terms)
        )
    np.testing.assert_allclose(contrastive_entropy(positive_Q, negatives_QxDxR), expected, rtol=1e-12)


def test_contrastive_entropy_of_chance_and_of_large_scores():
    np.testing.assert_allclose(contrastive_entropy(np.zeros(2), np.zeros((2, 3, 256))), math.log(257))
    far = contrastive_entropy(np.array([-2000.0, 0.0]), np.array([[[0.0]], [[-2000.0]]]))
    np.testing.assert_allclose(far, [2000.0, 0.0])


def test_a_relevant_passage_without_a_score_has_no_entropy():
    positive_Q, negatives_QxDxR = np.array([np.nan, -np.inf, 1.0]), np.zeros((3, 2, 4))
    negatives_QxDxR[1, 0, 0] = -np.inf
    negatives_QxDxR[2, :, 1:] = np.nan
    with np.errstate(invalid="ignore"):
        found = contrastive_entropy(positive_Q, negatives_QxDxR)
    np.testing.assert_allclose(found, [np.nan, np.nan, math.log1p(math.exp(-1))])


@pytest.mark.parametrize(("exponent", "floor"), [(0.5, 0.0), (0.3, 0.7), (-0.2, 0.0), (1.5, 0.05)])
def test_a_known_law_is_found(exponent, floor):
    x = np.array([1e3, 4e3, 1.6e4, 6.4e4, 2.5e5, 1e6])
    y = 3.0 * (x / 1e3) ** -exponent + floor
    law = fit_power_law(x, y)
    np.testing.assert_allclose(law.exponent, exponent, atol=1e-3)
    np.testing.assert_allclose(law(x), y, rtol=1e-5)
    np.testing.assert_allclose(law.floor, floor, atol=2e-3)


def test_a_noisy_law_has_no_larger_error_than_scipys_global_search():
    random, x = np.random.default_rng(1), np.geomspace(10, 1e5, 8)
    y = (40 * x**-0.6 + 0.5) * np.exp(random.normal(0, 0.05, 8))

    def error(parameters):
        factor, exponent, floor = parameters
        return np.square(np.log(np.exp(factor) * x**-exponent + floor) - np.log(y)).sum()

    bounds = [(-5, 10), (0.01, 3), (0, y.min())]
    best = optimize.differential_evolution(error, bounds, seed=0, maxiter=300, tol=1e-10)
    law = fit_power_law(x, y)
    found = error([np.log(law.factor), law.exponent, law.floor])
    assert found <= best.fun + 1e-6
    assert law.exponent == pytest.approx(best.x[1], rel=0.05)


def test_few_points_give_a_line_of_logarithms():
    law = fit_power_law([10, 100, 1000], [8.0, 4.5, 2.0])
    slope, height = np.polyfit(np.log([10, 100, 1000]), np.log([8.0, 4.5, 2.0]), 1)
    np.testing.assert_allclose([law.exponent, np.log(law.factor)], [-slope, height], rtol=1e-6)
    assert law.floor == 0
    with pytest.raises(ValueError, match="two sizes"):
        fit_power_law([10, 10], [1.0, 2.0])


def recall_of_gaussians(k: int, passages: int, distance: float) -> float:
    """Recall@k where scores are normal, relevant ones `distance` higher: integrated over the score."""
    score = np.linspace(-8, 14, 4001)
    beats = stats.norm.sf(score)  # one passage, by chance
    kept = stats.binom.cdf(k - 1, passages - 1, beats)
    return float(np.trapezoid(kept * stats.norm.pdf(score - distance), score))


@pytest.mark.parametrize("passages", [500, 20_000, 8_841_823])
def test_recall_in_a_larger_collection_is_that_of_the_distributions(passages):
    random, height_Qx1 = np.random.default_rng(0), np.linspace(-50, 50, 2000)[:, None]
    positive_Q, others_QxR = random.normal(3.5, 1, 2000), random.normal(size=(2000, 2560))
    others_QxR[0, :100] = np.nan
    spread_Qx1 = 1 + np.abs(height_Qx1)
    positive_Q = positive_Q * spread_Qx1[:, 0] + height_Qx1[:, 0]  # of each query its own
    predicted = found_at(positive_Q, others_QxR * spread_Qx1 + height_Qx1, k=10, passages=passages).mean()
    assert predicted == pytest.approx(recall_of_gaussians(10, passages, 3.5), abs=0.03)


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.3])
def test_the_tail_is_the_pareto_distribution_that_made_it(shape):
    others = stats.genpareto.rvs(shape, scale=2.0, size=400_000, random_state=0)
    share = TAIL / 500
    threshold = stats.genpareto.isf(share, shape, scale=2.0)
    around = threshold * np.array([0.85, 1.15])
    found = found_at(around, np.stack([others, others]), k=1, passages=round(1 / share))
    assert found.tolist() == [False, True]


def test_scores_that_are_mostly_0_have_the_tail_of_the_others():
    random, size = np.random.default_rng(0), (40, 20_000)
    others_QxR = np.where(random.random(size) < 0.02, random.exponential(size=size), 0.0)
    passages, k = 1_000_000, 10  # P(score > t) = .02 e^-t
    threshold = np.log(0.02 * passages / k)
    for factor, above in ((0.8, False), (1.2, True)):
        found_Q = found_at(np.full(40, factor * threshold), others_QxR, k=k, passages=passages)
        assert (found_Q == above).mean() > 0.9
    assert not found_at(np.array([0.0]), others_QxR[:1], k=900_000, passages=passages)


def test_equal_scores_above_the_others_have_no_pareto_tail():
    others_QxR = np.zeros((2, 2000))
    others_QxR[:, :90] = 1.0
    assert found_at(np.array([0.5, 1.5]), others_QxR, k=1, passages=10_000_000).tolist() == [False, True]


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 1.0])
def test_the_interval_covers_the_mean_whatever_differs(seeds, of_seeds):
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        values_SxQ = of_seeds * random.normal(size=(seeds, 1)) + 0.5 * random.normal(size=(1, 60))
        low, high = mean_interval(values_SxQ + 0.3 * random.normal(size=(seeds, 60)))
        covered += low <= 0 <= high
    assert 0.9 < covered / 400 < 0.98


def test_the_interval_of_one_seed_is_the_bootstrap_of_queries():
    values_Q = np.random.default_rng(0).beta(0.3, 0.5, 200)
    expected = stats.bootstrap((values_Q,), np.mean, method="percentile", random_state=1).confidence_interval
    np.testing.assert_allclose(mean_interval(values_Q), [expected.low, expected.high], atol=0.004)


def test_where_seeds_alone_differ_the_interval_is_students():
    values_SxQ = np.arange(3.0)[:, None] + np.zeros((3, 50))
    low, high = stats.t.interval(0.95, 2, loc=1.0, scale=stats.sem(np.arange(3.0)))
    assert mean_interval(values_SxQ) == pytest.approx((low, high))
    assert mean_interval(np.ones((3, 50))) == (1.0, 1.0)


def test_a_prediction_that_is_off_has_an_interval_without_0():
    """Queries differ far more from each other than sizes do, and are the same at all sizes."""
    x, rng = np.array([1e3, 4e3, 1.6e4, 6.4e4]), np.random.default_rng(0)
    of_queries_Q = rng.gamma(2.0, size=64)
    values = [of_queries_Q * size**-0.1 * (1 + 0.01 * rng.normal(size=64)) for size in x]
    difference, low, high = prediction_error(x, values)
    assert low < 0 < high
    assert high - low < 0.1 * values[-1].mean()
    *smaller, largest = values
    difference, low, high = prediction_error(x, [*smaller, 1.2 * largest])
    assert difference < high < 0
    law = fit_power_law(x[:-1], [some.mean() for some in smaller])
    assert difference == pytest.approx(law(x[-1]) - 1.2 * largest.mean())


def test_a_law_that_rises_has_no_floor_and_few_points_have_none():
    x = np.geomspace(1e3, 1e6, 8)
    assert fit_power_law(x, 1 + x**0.3).floor == 0
    assert fit_power_law(x[:5], 1 + x[:5] ** -0.3).floor == 0
    assert fit_power_law(x, 1 + 10 * x**-0.3).floor == pytest.approx(1, rel=1e-3)
