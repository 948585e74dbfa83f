"""How results change with size: one metric for all families, power laws, recall in larger collections.

All functions take and give NumPy arrays. Letters in shapes: Q queries, D draws, R random passages, S seeds.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

TAIL = 0.05  # the share of a query's scores of other passages to which a tail is fitted
DRAWS = 2000  # of a bootstrap
REFITS = 200  # of a law, each to other queries
FLOOR_POINTS = 6  # the fewest points to which a law with a floor is fitted
RESTARTS = 16  # of a fit, whose squared errors have more than one minimum


def contrastive_entropy(positive_Q: np.ndarray, negatives_QxDxR: np.ndarray) -> np.ndarray:
    """Computes -log(e^s⁺ / (e^s⁺ + Σ e^s⁻)), the mean over draws of negatives (Fang et al., SIGIR 2024).

    It compares retrievers of any family whose scores are logits or log-probabilities: a dual encoder's dot
    products over its temperature, a generative retriever's log-probabilities of docids. One that knows
    nothing has log(R + 1).

    Args:
      positive_Q: the score of each query's relevant passage; where it is NaN, so is the entropy.
      negatives_QxDxR: those of D draws of R random passages; NaN where a passage answers the query.

    Returns:
      The entropy of each query in nats, float64.
    """
    positive_Qx1x1 = np.asarray(positive_Q, np.float64)[:, None, None]
    negatives_QxDxR = np.asarray(negatives_QxDxR, np.float64)
    margins_QxDxR = np.where(np.isnan(negatives_QxDxR), -np.inf, negatives_QxDxR - positive_Qx1x1)
    return np.logaddexp(0.0, np.logaddexp.reduce(margins_QxDxR, axis=2)).mean(1)


def mean_interval(values_SxQ: np.ndarray) -> tuple[float, float]:
    """Gives the 95% interval of the mean over seeds and queries, both of which are samples.

    Of one seed it is the percentile bootstrap of the queries. Of several it is the mean ± t standard errors,
    from the two-way analysis of variance of seeds and queries; t's degrees of freedom are Satterthwaite's
    (1946, "An Approximate Distribution of Estimates of Variance Components"). A bootstrap of so few seeds
    covers far less than 95%: where seeds alone differ, the two ends of two of them cover 50%.

    Args:
      values_SxQ: the value of each query with each seed, or a paired difference.
    """
    values_SxQ = np.atleast_2d(np.asarray(values_SxQ, np.float64))
    seeds, queries = values_SxQ.shape
    if seeds == 1:
        weights_DxQ = np.random.default_rng(0).multinomial(queries, np.full(queries, 1 / queries), DRAWS)
        low, high = np.quantile(weights_DxQ @ values_SxQ[0] / queries, (0.025, 0.975))
        return float(low), float(high)
    mean, of_seeds_S, of_queries_Q = values_SxQ.mean(), values_SxQ.mean(1), values_SxQ.mean(0)
    rest_SxQ = values_SxQ - of_seeds_S[:, None] - of_queries_Q + mean
    freedoms = np.maximum([seeds - 1, queries - 1, (seeds - 1) * (queries - 1)], 1)
    sums = queries * np.square(of_seeds_S - mean).sum(), seeds * np.square(of_queries_Q - mean).sum()
    squares = np.array([*sums, np.square(rest_SxQ).sum()]) / freedoms
    total = max(squares @ (1, 1, -1), squares[2])
    if total == 0:
        return float(mean), float(mean)
    freedom = total**2 / (squares**2 / freedoms).sum()
    half = stats.t.ppf(0.975, freedom) * np.sqrt(total / (seeds * queries))
    return float(mean - half), float(mean + half)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """L(x) = factor · x^-exponent + floor, or (A / x)^exponent + floor with A = factor^(1 / exponent).

    Attributes:
      factor: above 0.
      exponent: above 0 where L falls, below 0 where it rises with x.
      floor: what is left of L however large x is (of a law that falls), at least 0.
    """

    factor: float
    exponent: float
    floor: float = 0.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Computes the law at x."""
        return self.factor * np.asarray(x, np.float64) ** -self.exponent + self.floor


def fit_power_law(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Fits a power law by least squares of the logarithms, the best of several random starts.

    Args:
      x: sizes, at least two of them different.
      y: values above 0. With fewer than FLOOR_POINTS the floor is 0: it would fit noise. A law that rises has
        none either.

    Returns:
      The law.

    Raises:
      ValueError: there are too few points, or one is not above 0.
    """
    log_x, y = np.log(np.asarray(x, np.float64)), np.asarray(y, np.float64)
    if len({*log_x.tolist()}) < 2 or not (np.isfinite(log_x).all() and (y > 0).all()):
        raise ValueError("a power law needs two sizes or more, and sizes and values above 0")
    center, log_y = log_x.mean(), np.log(y)

    def law(parameters: np.ndarray) -> np.ndarray:
        return np.exp(parameters[0] - parameters[1] * (log_x - center)) + np.append(parameters, 0.0)[2]

    def errors(parameters: np.ndarray) -> np.ndarray:
        return np.log(law(parameters)) - log_y

    slope, height = np.polyfit(log_x - center, log_y, 1)
    random, starts, bounds = np.random.default_rng(0), [[height, -slope]], ([-60.0, -5.0], [60.0, 5.0])
    if len(y) >= FLOOR_POINTS and slope < 0:
        bounds = ([bounds[0][0], 0.0, 0.0], [*bounds[1], float(y.min())])
        floors = y.min() * random.uniform(0.0, 0.99, RESTARTS)
        starts = [[*np.polyfit(log_x - center, np.log(y - floor), 1)[::-1], floor] for floor in floors]
        starts = [[height, -slope * random.uniform(0.5, 2.0), floor] for height, slope, floor in starts]
    fits = [
        optimize.least_squares(errors, np.clip(s, *bounds), bounds=bounds, xtol=1e-12, ftol=1e-12)
        for s in starts
    ]
    height, exponent, *floor = min(fits, key=lambda fit: fit.cost).x.tolist()
    return PowerLaw(float(np.exp(height + exponent * center)), exponent, *floor)


def prediction_error(x: np.ndarray, values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Computes the error of predicting the largest size by the power law of the smaller ones.

    Args:
      x: N sizes, the largest one last.
      values: for each size, S×Q values of the same queries, whose means the law describes; the seeds are
        averaged.

    Returns:
      (error, low, high): the law's value at the largest size minus the mean that was seen there, and its 95%
      interval, the percentile bootstrap of the queries. Each draw has the same queries at all sizes, and a
      law of its own.
    """
    values_NxQ = np.array([np.atleast_2d(some).mean(0) for some in values])
    queries = values_NxQ.shape[1]
    weights_DxQ = np.random.default_rng(0).multinomial(queries, np.full(queries, 1 / queries), REFITS)
    means_DxN = np.concatenate([values_NxQ.mean(1)[None], weights_DxQ @ values_NxQ.T / queries])
    errors = [float(fit_power_law(x[:-1], means_N[:-1])(x[-1]) - means_N[-1]) for means_N in means_DxN]
    low, high = np.quantile(errors[1:], (0.025, 0.975))
    return errors[0], float(low), float(high)


def found_at(positive_Q: np.ndarray, others_QxR: np.ndarray, *, k: int, passages: int) -> np.ndarray:
    """Predicts which queries find their passage among the first k of a collection of another size.

    Recall@k is the mean: 1 - F_relevant(F_other⁻¹(1 - k / N)), with the distributions F of the scores of
    relevant and of other passages, which are taken to be the same at every size. F_other is each query's own,
    as the scores of queries lie at different heights; but its upper tail, in units of its mean excess, is
    taken to be that of all queries. Beyond what these have, a generalised Pareto distribution continues it.

    Args:
      positive_Q: the score of each query's relevant passage.
      others_QxR: those of random passages; NaNs do not count.
      k: how many passages are found.
      passages: N, the number of passages of that collection.

    Returns:
      bool Q: whether the score is above the threshold.
    """
    share, tails = min(k / passages, 1.0), []
    scores = [np.sort(some[np.isfinite(some)]) for some in np.asarray(others_QxR, np.float64)]
    for some in scores:
        start = np.quantile(some, 1 - TAIL)
        excess = some[some > start] - start
        tails.append((start, len(excess) / len(some), excess.mean() if len(excess) else 0.0, excess))
    pooled = np.sort(np.concatenate([excess / mean for _, _, mean, excess in tails if mean]))
    thresholds_Q = [
        start + mean * _upper_quantile(pooled, share / above)
        if share < above and mean
        else np.quantile(some, 1 - share)
        for some, (start, above, mean, _) in zip(scores, tails, strict=True)
    ]
    return np.asarray(positive_Q) > np.array(thresholds_Q)


def _upper_quantile(values: np.ndarray, share: float) -> float:
    """Gives the value that this share of the distribution of ascending values lies above.

    Its last TAIL is a generalised Pareto distribution, fitted by probability-weighted moments (Hosking and
    Wallis 1987).
    """
    start = np.quantile(values, 1 - TAIL)
    excess = values[values > start] - start
    above = len(excess) / len(values)
    empirical = float(np.quantile(values, 1 - share))
    if share >= above or len(excess) < 5:
        return empirical
    rank = np.arange(len(excess))  # 1 - F is (n - 1 - rank) / (n - 1)
    first, second = excess.mean(), (excess * (len(excess) - 1 - rank) / (len(excess) - 1)).mean()
    below = first - 2.0 * second
    if below < 1e-9 * first:  # scores of a few distinct values, which no such distribution has
        return empirical
    shape, scale = 2.0 - first / below, 2.0 * first * second / below
    growth = above / share
    stretch = np.log(growth) if abs(shape) < 1e-9 else (growth**shape - 1.0) / shape
    return float(start + scale * stretch)
