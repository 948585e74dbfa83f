"""Fusing ranked lists: against plain Python and ir_measures, and by hand for short, equal and empty lists."""

import itertools
import math
import statistics

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_jax.search.fusion import (
    DEPTHS,
    NORMALISATIONS,
    Candidates,
    Fusion,
    choose,
    list_ndcg,
    min_max,
    ndcg,
    reciprocal_ranks,
    weight_choices,
    z_scores,
)

METHODS = ("min_max", "z", "reciprocal_rank")


def by_hand(method: str, lists: list, weights: tuple[float, ...]) -> dict[str, float]:
    """Passage -> its fused score, from the definitions."""
    fused = dict.fromkeys((p for ranked_list in lists for p, _ in ranked_list), 0.0)
    for ranked_list, weight in zip(lists, weights, strict=True):
        scores = dict(ranked_list)
        values = list(scores.values())
        if method == "reciprocal_rank":
            made = {passage: 1 / (60 + rank) for rank, passage in enumerate(scores, start=1)}
            missing = 0.0
        elif method == "min_max":
            spread = max(values, default=0) - min(values, default=0)
            made = {p: (s - min(values)) / spread if spread else 1.0 for p, s in scores.items()}
            missing = 0.0
        elif len({*values}) > 1:
            mean, deviation = statistics.fmean(values), statistics.pstdev(values)
            made = {p: (s - mean) / deviation for p, s in scores.items()}
            missing = min(made.values())
        else:
            made, missing = dict.fromkeys(scores, 0.0), -1.0 if values else 0.0
        for passage in fused:
            fused[passage] += weight * made.get(passage, missing)
    return fused


def random_lists(rng: np.random.Generator, parts: int = 2, passages: int = 30, most: int = 20) -> list:
    lists = []
    for _ in range(parts):
        ids = rng.permutation(passages)[: rng.integers(0, most + 1)]
        scores = np.sort(rng.normal(size=len(ids)).round(1))[::-1]  # some are equal
        lists.append([(f"p{i}", float(score)) for i, score in zip(ids, scores, strict=True)])
    return lists


@pytest.mark.parametrize("method", METHODS)
def test_fused_scores_are_those_of_the_definitions(method):
    rng = np.random.default_rng(0)
    for parts in (2, 3):
        weights = tuple(rng.dirichlet(np.ones(parts)).tolist())
        for _ in range(20):
            lists = random_lists(rng, parts)
            found = Fusion(method, weights, 20).rank(Candidates.of(lists))
            assert dict(found) == pytest.approx(by_hand(method, lists, weights), abs=1e-12)
            scores = [score for _, score in found]
            assert scores == sorted(scores, reverse=True)


def test_short_equal_and_empty_lists():
    one, equal, none = [("a", 7.0)], [("b", 2.0), ("a", 2.0)], []
    candidates = Candidates.of([one, equal, none])
    assert candidates.ids == ["a", "b"]
    np.testing.assert_array_equal(min_max(candidates), [[1, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(z_scores(candidates), [[0, 0, 0], [-1, 0, 0]])
    np.testing.assert_allclose(reciprocal_ranks(candidates), [[1 / 61, 1 / 62, 0], [0, 1 / 61, 0]])
    for method in METHODS:
        assert Fusion(method, (0.5, 0.5), 10).rank(Candidates.of([none, none])) == []
        assert Fusion(method, (0.5, 0.5), 10).rank(Candidates.of([none, one]))[0][0] == "a"
    # Scores that are equal but for rounding have no spread: 0.1 three times has a mean that is not 0.1.
    tenths = Candidates.of([[("a", 0.1), ("b", 0.1), ("c", 0.1)], []])
    np.testing.assert_array_equal(z_scores(tenths)[:, 0], 0)


def test_only_one_part_found_it():
    """The lowest that a part found is above what it did not find only where the other part says so."""
    lists = [[("a", 3.0), ("b", 2.0), ("c", 1.0)], [("d", 9.0), ("a", 5.0)]]
    assert dict(Fusion("min_max", (0.5, 0.5), 10).rank(Candidates.of(lists))) == {
        "a": 0.5,
        "d": 0.5,
        "b": 0.25,
        "c": 0.0,
    }


@given(st.lists(st.permutations("abcde"), min_size=3, max_size=3))
def test_equal_scores_are_in_the_order_of_the_parts_lists(orders):
    """Parts of the same weight may change places: the same scores, to the last bit."""
    lists = [[(passage, float(-rank)) for rank, passage in enumerate(order)] for order in orders]
    fusion = Fusion("reciprocal_rank", (1 / 3, 1 / 3, 1 / 3), 5)
    found = fusion.rank(Candidates.of(lists))
    for other in itertools.permutations(lists):
        assert dict(fusion.rank(Candidates.of(other))) == dict(found)
    first = orders[0].index
    assert found == sorted(found, key=lambda pair: (-pair[1], first(pair[0])))


def test_a_shorter_list_is_what_a_shallower_search_gives():
    rng = np.random.default_rng(1)
    for _ in range(20):
        lists = random_lists(rng)
        cut, short = (Candidates.of(x) for x in (lists, [ranked_list[:5] for ranked_list in lists]))
        cut = cut.up_to(5)
        assert sorted(cut.ids) == sorted(short.ids)
        row = [cut.ids.index(passage) for passage in short.ids]
        np.testing.assert_array_equal(cut.scores_CxP[row], short.scores_CxP)
        np.testing.assert_array_equal(cut.ranks_CxP[row], short.ranks_CxP)


@pytest.mark.parametrize(("parts", "steps"), [(2, 20), (3, 20), (4, 10), (5, 5), (8, 3), (30, 1)])
def test_weights_are_all_multiples_of_a_step(parts, steps):
    weights = weight_choices(parts)
    counts = weights * steps
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert (weights >= 0).all()
    assert len({tuple(row) for row in counts.round().tolist()}) == len(weights)
    assert len(weights) == math.comb(steps + parts - 1, parts - 1) <= 300
    off = ((weights - 1 / parts) ** 2).sum(axis=1)
    assert (np.diff(off) >= -1e-12).all()


def test_the_choice_is_the_best_of_all_combinations():
    """By ir_measures, of every method, depth and weight; graded, with passages that no part found.

    Parts without a weight are not searched. Two queries are passages, which their rankings leave out.
    """
    rng = np.random.default_rng(2)
    lists = [random_lists(rng, passages=40) for _ in range(8)]
    grades = [{f"p{i}": int(rng.integers(1, 4)) for i in rng.choice(40, 5, replace=False)} for _ in lists]
    grades[0]["elsewhere"] = 3
    candidates, owns = [Candidates.of(some) for some in lists], [None] * len(lists)
    for nth in (1, 2):
        owns[nth] = lists[nth][0][0][0]
        grades[nth].pop(owns[nth], None)
    depths = (5, 20)

    def value(rankings: list[list[str]]) -> float:
        qrels = {str(nth): relevant for nth, relevant in enumerate(grades)}
        run = {
            str(nth): {passage: float(-rank) for rank, passage in enumerate(ids) if passage != owns[nth]}
            for nth, ids in enumerate(rankings)
        }
        (value,) = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run).values()
        return value

    def measured(method: str, weights: tuple[float, ...], depth: int) -> float:
        parts = [part for part, weight in enumerate(weights) if weight]
        fusion = Fusion(method, tuple(weights[part] for part in parts), depth)
        cut = ([some[part][:depth] for part in parts] for some in lists)
        return value([[passage for passage, _ in fusion.rank(Candidates.of(found))] for found in cut])

    tried = {
        (method, (step / 20, 1 - step / 20), depth): None
        for method in METHODS for depth in depths for step in range(21)
    }  # fmt: skip
    values = {one: measured(*one) for one in tried}
    choice = choose(candidates, grades, owns, METHODS, depths)
    assert choice.ndcg == pytest.approx(max(values.values()), abs=1e-9)
    chosen = choice.fusion
    assert measured(chosen.method, chosen.weights, chosen.depth) == pytest.approx(choice.ndcg, abs=1e-9)
    for part in range(2):
        alone = [list_ndcg(some[part], *of) for some, *of in zip(lists, grades, owns, strict=True)]
        own_lists = [[passage for passage, _ in some[part]] for some in lists]
        assert statistics.fmean(alone) == pytest.approx(value(own_lists), abs=1e-9)


def test_of_equally_good_weights_those_nearest_to_equal_are_taken():
    lists = [[("a", 1.0), ("b", 0.5)], [("a", 3.0), ("b", 2.0)]]
    choice = choose([Candidates.of(lists)], [{"a": 1}], [None], METHODS, (10,))
    assert choice.fusion == Fusion("min_max", (0.5, 0.5), 10)
    assert (choice.ndcg, [list_ndcg(one, {"a": 1}) for one in lists]) == (1, [1, 1])
    # What a part of weight 0 alone has found is not found, however short the other list is.
    found = Candidates.of([[("a", 1.0)], [("b", 1.0)]])
    weights = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    at_2 = 1 / np.log2(3)
    np.testing.assert_allclose(ndcg(found, min_max(found), weights, {"b": 1}), [0, 1, at_2])
    np.testing.assert_allclose(ndcg(found, min_max(found), weights, {"a": 1}), [1, 0, 1])
    np.testing.assert_allclose(ndcg(found, min_max(found), weights, {"b": 1}, own="a"), [0, 1, 1])


def test_scores_that_are_not_finite_count_as_not_found():
    infinite = Candidates.of([[("a", math.inf), ("b", 2.0), ("c", 1.0), ("d", -math.inf)]])
    missing = Candidates.of([[("a", math.nan), ("b", 2.0), ("c", 1.0), ("d", math.nan)]])
    np.testing.assert_array_equal(min_max(infinite), [[0], [1], [0], [0]])
    np.testing.assert_array_equal(z_scores(infinite), [[-1], [1], [-1], [-1]])
    for normalise in (min_max, z_scores):
        np.testing.assert_array_equal(normalise(infinite), normalise(missing))
        assert not np.isnan(normalise(Candidates.of([[("a", -math.inf)]]))).any()


def test_every_method_has_depths():
    assert DEPTHS.keys() == NORMALISATIONS.keys()
