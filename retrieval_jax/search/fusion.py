"""Fusing ranked lists: scores made comparable and added up, and the weights that rank dev queries best.

Letters in shapes: C candidates (passages that a part found), P parts (searchers that are fused), R relevant
passages, W choices of weights.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from retrieval_jax.data.trec import RankedList

RECIPROCAL_RANK_K = 60
CUTOFF = 10  # of the nDCG by which weights are chosen
_STEPS = (20, 10, 5, 4, 3, 2, 1)  # weights are multiples of one of 1/20, 1/10, …
_MOST_WEIGHTS = 300  # choices of weights that are tried
_LONGEST = 2.0**32  # more than a list has passages


class Candidates(NamedTuple):
    """The passages that the parts found for a query, in the order in which they were first found.

    Attributes:
      ids: the C passage ids: first those of the first part's list, then those that only later parts found.
      scores_CxP: float64, each part's scores; NaN where it did not find the passage, unless that score is
        given (`and_also`). Infinite ones count as NaN: no other score is comparable to them.
      ranks_CxP: float64, the places in each part's list, from 1; NaN where it did not find the passage.
    """

    ids: list[str]
    scores_CxP: np.ndarray
    ranks_CxP: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[RankedList]) -> "Candidates":
        """Collects the passages of one ranked list a part."""
        row = {}
        for ranked_list in lists:
            for passage_id, _ in ranked_list:
                row.setdefault(passage_id, len(row))
        scores_CxP, ranks_CxP = (np.full((len(row), len(lists)), np.nan) for _ in range(2))
        for part, ranked_list in enumerate(lists):
            rows = [row[passage_id] for passage_id, _ in ranked_list]
            scores_CxP[rows, part] = [score for _, score in ranked_list]
            ranks_CxP[rows, part] = np.arange(1, len(rows) + 1)
        return cls(list(row), scores_CxP, ranks_CxP)

    def and_also(self, ids: Sequence[str], given: Sequence[Sequence[float] | None]) -> "Candidates":
        """Returns the same with further passages, and the scores of what parts did not find; without ranks.

        Args:
          ids: passage ids; what is among the candidates may be among them.
          given: for each part the scores of these, of which it found some; None for a part that gives none.
        """
        row = {passage_id: nth for nth, passage_id in enumerate(dict.fromkeys([*self.ids, *ids]))}
        more = ((0, len(row) - len(self.ids)), (0, 0))
        scores_CxP, ranks_CxP = (np.pad(x, more, constant_values=np.nan) for x in self[1:])
        rows = [row[passage_id] for passage_id in ids]
        for part, scores in enumerate(given):
            if scores is not None:
                found = scores_CxP[rows, part]
                scores_CxP[rows, part] = np.where(np.isnan(found), scores, found)
        return Candidates([*row], scores_CxP, ranks_CxP)

    def up_to(self, depth: int) -> "Candidates":
        """Returns what would be there if each part's list ended after `depth` passages."""
        within_CxP = self.ranks_CxP <= depth
        kept = within_CxP.any(axis=1)
        scores_CxP, ranks_CxP = (np.where(within_CxP, x, np.nan)[kept] for x in self[1:])
        return Candidates(list(itertools.compress(self.ids, kept)), scores_CxP, ranks_CxP)


def min_max(candidates: Candidates) -> np.ndarray:
    """Maps each part's scores onto 0 (the lowest that it found) to 1 (the highest): C×P.

    A passage that a part did not find has 0, or, if its score is given, where that lies on the same scale:
    mostly below 0. If all scores that a part found are equal, as where it found a single passage, those
    passages have 1, as has a given score that is not lower.
    """
    low_P, high_P, scores_CxP, _ = _extremes(candidates)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares_CxP = np.where(high_P > low_P, (scores_CxP - low_P) / (high_P - low_P), scores_CxP >= low_P)
    return np.where(np.isnan(scores_CxP), 0.0, shares_CxP)


def z_scores(candidates: Candidates) -> np.ndarray:
    """Subtracts the mean of the scores that each part found, and divides by their standard deviation: C×P.

    A passage that a part did not find has the lowest value of those that it found, or, if its score is given,
    that score's. If all scores that a part found are equal, those passages have 0, as has a given score that
    is not lower, and the others -1; all have 0 if it found none.
    """
    low_P, high_P, scores_CxP, found_CxP = _extremes(candidates)
    count_P = np.maximum(found_CxP.sum(axis=0), 1)
    mean_P = np.where(found_CxP, scores_CxP, 0.0).sum(axis=0) / count_P
    off_CxP = scores_CxP - mean_P
    deviation_P = np.sqrt((np.where(found_CxP, off_CxP, 0.0) ** 2).sum(axis=0) / count_P)
    varies_P = (high_P > low_P) & (deviation_P > 0)  # equal scores leave a rounding error in the deviation
    scaled_CxP = np.where(varies_P, off_CxP / np.where(varies_P, deviation_P, 1.0), 0.0)
    lowest_P = np.where(found_CxP, scaled_CxP, 0.0).min(axis=0, initial=0.0)
    lowest_P = np.where(varies_P, lowest_P, np.where(found_CxP.any(axis=0), -1.0, 0.0))
    scaled = np.where(varies_P, ~np.isnan(scores_CxP), scores_CxP >= low_P)
    return np.where(scaled, scaled_CxP, lowest_P)


def reciprocal_ranks(candidates: Candidates) -> np.ndarray:
    """Computes 1 / (60 + rank) of each part's list, 0 for a passage that it did not find: C×P.

    Cormack, Clarke and Büttcher (2009), "Reciprocal rank fusion outperforms Condorcet and individual rank
    learning methods", section 2; the constant is theirs.
    """
    return np.nan_to_num(1 / (RECIPROCAL_RANK_K + candidates.ranks_CxP))


def _extremes(candidates: Candidates) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (the lowest score that each part found, the highest; all scores, NaN if not finite; found)."""
    scores_CxP = np.where(np.isfinite(candidates.scores_CxP), candidates.scores_CxP, np.nan)
    found_CxP = ~np.isnan(scores_CxP) & ~np.isnan(candidates.ranks_CxP)
    low_P = np.where(found_CxP, scores_CxP, np.inf).min(axis=0, initial=np.inf)
    high_P = np.where(found_CxP, scores_CxP, -np.inf).max(axis=0, initial=-np.inf)
    return low_P, high_P, scores_CxP, found_CxP


RERANK = "rerank"
NORMALISATIONS = {"min_max": min_max, "z": z_scores, "reciprocal_rank": reciprocal_ranks, RERANK: min_max}
"""Name of a fusion -> what makes its parts' scores comparable."""
DEPTHS = {name: (20, 50, 100, 200) if name == RERANK else (100, 200) for name in NORMALISATIONS}
"""Name of a fusion -> the depths that are tried. Lists of fewer than 100 would be too short where 100 are
wanted, but a re-ranked list goes on as its first part's does."""


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How the lists of several parts become one.

    Attributes:
      method: the name of a fusion, a key of NORMALISATIONS.
      weights: the weight of each part.
      depth: passages of each part's list that count; with "rerank", of the first part's list.
    """

    method: str
    weights: tuple[float, ...]
    depth: int

    def weigh(self, candidates: Candidates) -> np.ndarray:
        """Computes what each part adds to a candidate's score, its weight times the normalised score: C×P."""
        return NORMALISATIONS[self.method](candidates) * self.weights

    def rank(self, candidates: Candidates) -> RankedList:
        """Ranks a query's candidates by the sum of what the parts add (`weigh`), best first.

        Equal sums are in the order of the candidates. The sums are rounded once (`math.fsum`), so that parts
        of the same weight may change places.
        """
        sums = [math.fsum(row) for row in self.weigh(candidates).tolist()]
        return sorted(zip(candidates.ids, sums, strict=True), key=lambda pair: -pair[1])


def weight_choices(parts: int) -> np.ndarray:
    """Returns the weights that are tried: W×P, multiples of a step that add up to 1, nearest to equal first.

    The step is the smallest of 1/20, 1/10, 1/5, 1/4, 1/3, 1/2 and 1 with at most 300 choices.
    """
    steps = next(n for n in _STEPS if n == 1 or math.comb(n + parts - 1, parts - 1) <= _MOST_WEIGHTS)
    bars = itertools.combinations(range(steps + parts - 1), parts - 1)
    counts = [np.diff([-1, *bar, steps + parts - 1]) - 1 for bar in bars]
    counts.sort(key=lambda count_P: float((count_P**2).sum()))  # stable: equal distances keep their order
    return np.array(counts) / steps


def ndcg(
    candidates: Candidates,
    normalised_CxP: np.ndarray,
    weights_WxP: np.ndarray,
    grades: Mapping[str, int],
    own: str | None = None,
) -> np.ndarray:
    """Computes a query's nDCG@10 for each choice of weights: W, float64.

    The gain is the grade, as in trec_eval. Only the ranks of relevant passages are computed, by counting what
    lies above them. What only parts of weight 0 found is not ranked, as those parts are not searched.

    Args:
      candidates: the query's candidates.
      normalised_CxP: their parts' scores, normalised.
      weights_WxP: the choices of weights, each with one above 0.
      grades: passage id -> grade (> 0) of all relevant passages, at least one.
      own: the passage that the query itself is, which evaluations leave out of its results; None for none.
    """
    best = sorted(grades.values(), reverse=True)[:CUTOFF]
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(best, start=1))
    place_CxW = _places(candidates, weights_WxP)
    place_CxW[[passage_id == own for passage_id in candidates.ids]] = np.inf
    sums_CxW = np.where(np.isfinite(place_CxW), normalised_CxP @ weights_WxP.T, -np.inf)
    total_W = np.zeros(len(weights_WxP))
    for row, passage_id in enumerate(candidates.ids):
        if grade := grades.get(passage_id, 0):
            before_CxW = (sums_CxW == sums_CxW[row]) & (place_CxW < place_CxW[row])
            above_W = (sums_CxW > sums_CxW[row]).sum(axis=0) + before_CxW.sum(axis=0)
            ranked_W = np.isfinite(place_CxW[row]) & (above_W < CUTOFF)
            total_W += np.where(ranked_W, grade / np.log2(above_W + 2), 0.0)
    return total_W / ideal


def _places(candidates: Candidates, weights_WxP: np.ndarray) -> np.ndarray:
    """Computes the order of equal sums for each choice of weights: C×W; infinity if a passage is not found.

    It is the order of `Candidates.of` the lists of those parts that have a weight.
    """
    weighs_SxP, set_W = np.unique(weights_WxP > 0, axis=0, return_inverse=True)
    rank_CxP = np.where(np.isnan(candidates.ranks_CxP), np.inf, candidates.ranks_CxP)
    place_CxP = rank_CxP + _LONGEST * np.arange(rank_CxP.shape[1])
    return np.stack([place_CxP[:, weighs_P].min(axis=1) for weighs_P in weighs_SxP], axis=1)[:, set_W.ravel()]


def list_ndcg(ranked_list: RankedList, grades: Mapping[str, int], own: str | None = None) -> float:
    """Computes the nDCG@10 of one searcher's list, of which the first 11 passages are enough; see `ndcg`."""
    found = Candidates.of([ranked_list[: CUTOFF + 1]])
    return float(ndcg(found, -found.ranks_CxP, np.ones((1, 1)), grades, own)[0])


@dataclasses.dataclass(frozen=True)
class Choice:
    """The fusion that `choose` found to be best.

    Attributes:
      fusion: its method, weights and depth.
      ndcg: its mean nDCG@10.
    """

    fusion: Fusion
    ndcg: float


def choose(
    candidates: Sequence[Candidates],
    grades: Sequence[Mapping[str, int]],
    owns: Sequence[str | None],
    methods: Sequence[str],
    depths: Sequence[int] | None = None,
) -> Choice:
    """Chooses method, weights and depth by the mean nDCG@10 over queries: every combination is tried.

    Of equally good ones the first is taken: methods and depths in their order, weights nearest to equal
    first.

    Args:
      candidates: each query's candidates, from lists as long as the largest depth.
      grades: each query's relevant passages, at least one: passage id -> grade.
      owns: for each query the passage that it is itself, or None; see `ndcg`.
      methods: the names of fusions to choose from.
      depths: the depths to choose from; None for each method's own in DEPTHS.
    """
    weights_WxP, best = weight_choices(candidates[0].scores_CxP.shape[1]), None
    for method in methods:
        for depth in depths or DEPTHS[method]:
            mean_W = np.zeros(len(weights_WxP))
            for found, relevant, own in zip(candidates, grades, owns, strict=True):
                cut = found.up_to(depth)  # as a search normalises it: with the query's own passage
                normalised_CxP = NORMALISATIONS[method](cut)
                mean_W += ndcg(cut, normalised_CxP, weights_WxP, relevant, own) / len(grades)
            at = int(np.argmax(np.round(mean_W, 9)))
            if best is None or mean_W[at] > best.ndcg + 1e-9:
                best = Choice(Fusion(method, tuple(weights_WxP[at].tolist()), depth), float(mean_W[at]))
    return best
