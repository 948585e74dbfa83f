"""The choice of hard negatives from a ranked list, and the facts about all that were chosen."""

import math

import numpy as np

from retrieval_jax.data import mined
from retrieval_jax.data.collection import Query
from retrieval_jax.data.distribution import QUANTILES
from retrieval_jax.data.mined import Chosen, NegativesRule

QUERY = Query("q", "text", {"right": 1, "also": 1})
RANKING = [("a", 9.0), ("right", 8.0), ("b", 7.5), ("also", 7.0), ("c", 6.0), ("d", 2.0)]


def choose_negatives(query, ranking, limit, skip_top, margin=None, *, rule=None, **more) -> list[str]:
    rule = NegativesRule(limit, skip_top, margin, **(rule or {}))
    return mined.choose_negatives(query, ranking, rule, **more).negatives


def test_a_margin_leaves_out_what_scores_like_a_positive():
    query, ranking = QUERY, RANKING
    assert choose_negatives(query, ranking, 10, 0, None) == ["a", "b", "c", "d"]
    assert choose_negatives(query, ranking, 2, 1, None) == ["b", "c"]
    assert choose_negatives(query, ranking, 10, 0, 1.0) == ["c", "d"]
    assert choose_negatives(query, ranking, 10, 0, 0.0) == ["b", "c", "d"]
    assert choose_negatives(query, ranking, 10, 3, 1.0) == ["c", "d"]  # the positive counts, though skipped
    assert choose_negatives(Query("q", "text", {"z": 1}), ranking, 10, 0, 1.0) == []
    assert choose_negatives(Query("q", "text", {"z": 1}), ranking, 10, 0, None) == [p for p, _ in ranking]


def test_a_share_of_the_positive_s_score_and_a_highest_score():
    def of(ranking, **rule):
        return choose_negatives(QUERY, ranking, 10, 0, rule=rule)

    assert of(RANKING, relative_margin=0.0625) == ["b", "c", "d"]  # 7.5 is 93.75% of 8
    assert of(RANKING, relative_margin=0.07) == ["c", "d"]
    assert of(RANKING, max_score=6.0) == ["c", "d"]
    assert of(RANKING, max_score=6.0, relative_margin=0.5) == ["d"]
    # Below 0 the ceiling is further away from 0 than the positive.
    log_probs = [("a", -0.5), ("right", -1.0), ("b", -1.05), ("c", -1.2), ("d", -4.0)]
    assert of(log_probs, relative_margin=0.1) == ["c", "d"]
    assert of(log_probs, relative_margin=0.0) == ["b", "c", "d"]


def test_the_thresholds_read_the_teacher_s_scores_and_the_ranks_stay():
    teacher = {"a": 1.0, "right": 4.0, "b": 5.0, "c": 3.0, "d": math.nan, "elsewhere": 9.0}

    def of(limit=10, query=QUERY, **rule):
        rule = NegativesRule(limit, **rule)
        return mined.choose_negatives(query, RANKING, rule, teacher_scores=teacher)

    assert of(margin=0.0) == Chosen("q", ["a", "c"], [1.0, 3.0], 4.0)
    assert of(margin=0.0, skip_top=1) == Chosen("q", ["c"], [3.0], 4.0)
    assert of(max_score=2.0).negatives == ["a"]
    # A positive that was not found has the teacher's score; without thresholds, scores are not needed.
    assert of(query=Query("q", "text", {"elsewhere": 1}), margin=4.5).negatives == ["a", "right", "c"]
    assert of().negatives == ["a", "b", "c", "d"]


def test_negatives_are_drawn_by_the_seed_and_the_query():
    ranking = [(f"p{rank}", -float(rank)) for rank in range(40)]
    query = Query("q", "text", {"p3": 1})
    rule = {"sample": True, "max_score": -2.0}
    drawn = choose_negatives(query, ranking, 5, 0, rule=rule)
    allowed = [passage for passage, score in ranking if score <= -2 and passage != "p3"]
    assert [passage for passage in allowed if passage in drawn] == drawn  # hardest first
    assert choose_negatives(query, ranking, 5, 0, rule=rule) == drawn
    assert choose_negatives(query, ranking, 5, 0, rule=rule | {"seed": 1}) != drawn
    assert choose_negatives(query, ranking, 99, 0, rule=rule) == allowed
    counts = dict.fromkeys(allowed, 0)
    for n in range(2000):
        for passage in choose_negatives(Query(f"q{n}", "text", {"p3": 1}), ranking, 5, 0, rule=rule):
            counts[passage] += 1
    expected = 2000 * 5 / len(allowed)
    assert np.abs(np.array([*counts.values()]) - expected).max() < 5 * np.sqrt(expected)


def test_a_copy_of_a_positive_sets_the_margin():
    ranking = [("copy", 9.0), ("other", 8.5), ("far", 2.0)]
    query = Query("q", "text", {"right": 1})
    assert choose_negatives(query, ranking, 9, 0, 1.0, first_copies={"copy": "right"}) == ["far"]
    assert choose_negatives(query, ranking, 9, 0, None, first_copies={"right": "copy"}) == ["other", "far"]
    assert choose_negatives(
        query, ranking, 9, 0, None, other_positives=["right"], first_copies={"copy": "right"}
    ) == [
        "other",
        "far",
    ]


def test_what_is_written_tells_how_scores_are_distributed(tmp_path, capsys):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 3)).astype(np.float32)
    chosen = [Chosen(f"q{n}", ["a", "b", "c"], row.tolist(), float(n)) for n, row in enumerate(scores)]
    chosen += [Chosen("few", ["a"], [math.nan], None), Chosen("none", [], [], None)]
    facts = mined.write(tmp_path, "train", iter(chosen), 3)
    lines = (tmp_path / "qrels.train.tsv").read_text().splitlines()
    assert lines[:3] == ["q0\ta\t0", "q0\tb\t0", "q0\tc\t0"]
    assert lines[-1] == "few\ta\t0"
    counts = ("queries", "with_negatives", "fewer_than_wanted", "negatives")
    assert [facts[name] for name in counts] == [52, 51, 2, 151]
    for name, values in {"negatives": scores.ravel(), "positives": np.arange(50)}.items():
        count, mean, *quantiles = facts["distribution"][name].values()
        assert count == len(values)
        np.testing.assert_allclose(mean, values.mean(), rtol=1e-6)
        np.testing.assert_allclose(quantiles, np.quantile(values, QUANTILES), rtol=1e-6)
    mined.log_scores(facts, 3)
    err = capsys.readouterr().err.splitlines()
    assert err[1].split() == ["5%", "25%", "50%", "75%", "95%"]
    assert err[2].split() == ["positives", "2.45", "12.25", "24.5", "36.75", "46.55"]
    assert err[-1] == "2 of 52 queries have fewer than 3 negatives, 1 of them none"
    mined.log_scores(mined.write(tmp_path, "dev", [], 3), 3)
    assert capsys.readouterr().err == "0 of 0 queries have fewer than 3 negatives, 0 of them none\n"
