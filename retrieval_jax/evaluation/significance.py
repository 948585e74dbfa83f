"""Paired significance tests over queries: whether two systems differ by more than the choice of the queries.

All functions take arrays of per-query values, such as nDCG@10 of each query, in the same order of queries.

Smucker, Allan and Carterette (2007), "A comparison of statistical significance tests for information
retrieval evaluation", find that Fisher's randomisation test and the paired t-test agree, and advise against
the sign test and Wilcoxon's. Both are computed here; the randomisation test, which assumes nothing about how
the differences are distributed, decides what is marked as significant.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

PERMUTATIONS = 100_000
ALPHA = 0.05  # a difference is significant if its p, corrected for the number of comparisons, is not above
_BATCH = 1_000  # permutations at once: their signs are 1,000 × queries numbers


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a system differs from the baseline in one metric.

    Attributes:
      mean: the mean over the queries of the system's value minus the baseline's.
      low: the lower end of the 95% confidence interval of the mean, by Student's t distribution; NaN for a
        single query.
      high: its upper end.
      p: the two-sided p-value of the randomisation test; NaN if a query's value is not finite.
      p_t_test: the two-sided p-value of the paired t-test; NaN for a single query.
      p_holm: `p` after the correction of Holm and Bonferroni over all systems that are compared with the
        baseline.
    """

    mean: float
    low: float
    high: float
    p: float
    p_t_test: float
    p_holm: float

    def facts(self) -> dict[str, float | bool | None]:
        """The numbers as JSON, None for an undefined one, and whether the difference is significant."""
        numbers = {k: v if math.isfinite(v) else None for k, v in dataclasses.asdict(self).items()}
        return numbers | {"significant": self.significant}

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value of the randomisation test is at most ALPHA."""
        return self.p_holm <= ALPHA


def compare(baseline_Q: np.ndarray, systems: Mapping[str, np.ndarray]) -> dict[str, Difference]:
    """Compares systems with a baseline in one metric.

    Args:
      baseline_Q: the baseline's value of each query.
      systems: name of a system -> its value of each query, in the baseline's order. All of them together are
        the family of comparisons over which p-values are corrected.

    Returns:
      The difference of each system to the baseline, by name.
    """
    if not systems:
        return {}
    differences_SxQ = np.stack([np.subtract(values_Q, baseline_Q) for values_Q in systems.values()])
    p_S = randomization_test(differences_SxQ)
    p_t_test_S, low_S, high_S = t_test(differences_SxQ)
    return _by_name(systems, differences_SxQ.mean(1), low_S, high_S, p_S, p_t_test_S)


def compare_collections(
    baseline: Sequence[np.ndarray], systems: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, Difference]:
    """Compares systems with a baseline in the mean over several collections, each of which counts the same.

    The collections are taken as given, and the queries of each as drawn: the tests are stratified by
    collection. The randomisation test changes the signs of the queries' differences, as for one collection,
    and its statistic is the mean over the collections of their means. Interval and t-test have the variances
    of the collections apart, and degrees of freedom by Welch and Satterthwaite.

    Args:
      baseline: for each collection the baseline's value of each query.
      systems: name of a system -> for each collection its value of each query, in the baseline's order.

    Returns:
      The difference of each system to the baseline, by name.
    """
    if not systems:
        return {}
    of_collections = [  # S×Q of each collection
        np.stack([np.subtract(values[nth], base_Q, dtype=np.float64) for values in systems.values()])
        for nth, base_Q in enumerate(baseline)
    ]
    count = len(of_collections)
    weighted = [d_SxQ / d_SxQ.shape[1] / count for d_SxQ in of_collections]
    p_S = randomization_test(np.concatenate(weighted, axis=1))
    mean_S = sum(d_SxQ.sum(1) for d_SxQ in weighted)
    with np.errstate(all="ignore"):  # a collection of one query has no variance
        variance_CxS = np.stack([d.var(1) / (d.shape[1] - 1) / count**2 for d in of_collections])
        freedom_S = variance_CxS.sum(0) ** 2 / sum(
            v_S**2 / (d.shape[1] - 1) for v_S, d in zip(variance_CxS, of_collections, strict=True)
        )
        error_S = np.sqrt(variance_CxS.sum(0))
        p_t_test_S = 2 * stats.t.sf(np.abs(mean_S) / error_S, freedom_S)
        half_S = stats.t.ppf(0.975, freedom_S) * error_S
    same_S = ~np.any(np.concatenate(weighted, axis=1), axis=1)
    half_S, p_t_test_S = np.where(same_S, 0.0, half_S), np.where(same_S, 1.0, p_t_test_S)
    return _by_name(systems, mean_S, mean_S - half_S, mean_S + half_S, p_S, p_t_test_S)


def _by_name(
    names: Iterable[str],
    mean_S: np.ndarray,
    low_S: np.ndarray,
    high_S: np.ndarray,
    p_S: np.ndarray,
    p_t_test_S: np.ndarray,
) -> dict[str, Difference]:
    """Returns the difference of each system by its name, with p-values corrected over all of them."""
    columns = (mean_S, low_S, high_S, p_S, p_t_test_S, holm_bonferroni(p_S))
    return {
        name: Difference(*map(float, values))
        for name, *values in zip(names, *columns, strict=True)  # one value of each column
    }


def randomization_test(
    differences_SxQ: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> np.ndarray:
    """Computes Fisher's paired randomisation test of each system, two-sided, with the mean as the statistic.

    If a system and the baseline do not differ, their two values of a query may change places, which changes
    the sign of the difference. The p-value is the share of the assignments of signs whose mean is as far
    from 0 as the observed one, or farther. All assignments are counted if there are at most `permutations` of
    them (queries without a difference need no sign). Otherwise this many are drawn, the same for all systems,
    and p is (count + 1) / (permutations + 1): Phipson and Smyth (2010), "Permutation p-values should never be
    zero". scipy.stats.permutation_test does the same, but needs half an hour for 20 systems on 7,000 queries,
    where this product of matrices needs seconds.

    Args:
      differences_SxQ: each system's values minus the baseline's.
      permutations: the number of assignments of signs to draw.
      seed: the seed of the draws.

    Returns:
      p_S, float64; NaN for a system with a difference that is not finite.
    """
    differences_SxQ = np.asarray(differences_SxQ, np.float64)
    finite_S = np.isfinite(differences_SxQ).all(1)
    differs_S = np.count_nonzero(differences_SxQ, axis=1)
    exact_S = finite_S & (differs_S <= np.log2(permutations))
    sampled_S = finite_S & ~exact_S
    p_S = np.full(len(differences_SxQ), np.nan)
    for system in np.flatnonzero(exact_S):
        d_Q = differences_SxQ[system]
        d_Q = d_Q[d_Q != 0]
        every_PxQ = np.arange(2 ** len(d_Q))[:, None] >> np.arange(len(d_Q)) & 1
        p_S[system] = _count_as_far(every_PxQ, d_Q[None])[0] / len(every_PxQ)
    if sampled_S.any():
        random = np.random.default_rng(seed)
        drawn_DxQ = differences_SxQ[sampled_S]
        counts_D = np.zeros(len(drawn_DxQ), np.int64)
        queries = drawn_DxQ.shape[1]
        for first in range(0, permutations, _BATCH):
            size = (min(_BATCH, permutations - first), -(-queries // 8))
            bits_PxQ = np.unpackbits(random.integers(256, size=size, dtype=np.uint8), axis=1, count=queries)
            counts_D += _count_as_far(bits_PxQ, drawn_DxQ)
        p_S[sampled_S] = (counts_D + 1) / (permutations + 1)
    return p_S


def _count_as_far(bits_PxQ: np.ndarray, differences_SxQ: np.ndarray) -> np.ndarray:
    """Counts, for each system, the assignments of signs (bit 1: +, 0: -) as far from 0 as all signs +."""
    sum_S = differences_SxQ.sum(1)
    sums_PxS = 2 * (bits_PxQ.astype(np.float64) @ differences_SxQ.T) - sum_S
    tolerance_S = 1e-12 * np.abs(differences_SxQ).sum(1)  # equal sums that were rounded in another order
    return (np.abs(sums_PxS) >= np.abs(sum_S) - tolerance_S).sum(0)


def t_test(differences_SxQ: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the paired t-test of each system, two-sided, and the 95% confidence interval of its mean.

    Args:
      differences_SxQ: each system's values minus the baseline's.

    Returns:
      p_S, low_S and high_S, float64: NaN for a single query; 1, 0 and 0 where no query differs.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # differences that are all equal, or a single query
        result = stats.ttest_1samp(np.asarray(differences_SxQ, np.float64), 0.0, axis=1)
        low_S, high_S = result.confidence_interval(0.95)
    same_S = ~np.any(differences_SxQ, axis=1)
    return (
        np.where(same_S, 1.0, result.pvalue),
        np.where(same_S, 0.0, low_S),
        np.where(same_S, 0.0, high_S),
    )


def holm_bonferroni(p_S: np.ndarray) -> np.ndarray:
    """Corrects p-values for the number of comparisons by the Holm–Bonferroni method.

    The smallest of S p-values is multiplied by S, the next by S - 1, and so on; none gets below a smaller
    one, or above 1. The comparisons whose corrected p is at most α are those that the method rejects at α,
    and the chance that any of them is a false one is at most α. See Holm (1979), "A simple sequentially
    rejective multiple test procedure".

    Args:
      p_S: the p-values. NaN, for a comparison that is undefined, stays NaN and does not count.

    Returns:
      The corrected p-values, in the same order.
    """
    p_S = np.asarray(p_S, np.float64)
    order_S = np.argsort(p_S, kind="stable")
    left_S = np.count_nonzero(~np.isnan(p_S)) - np.arange(len(p_S))  # NaNs come last in the order
    raised_S = np.maximum.accumulate(p_S[order_S] * left_S)
    corrected_S = np.empty_like(p_S)
    corrected_S[order_S] = np.minimum(raised_S, 1.0)
    return corrected_S
