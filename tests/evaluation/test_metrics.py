import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core.errors import UserError
from retrieval_jax.evaluation import metrics
from retrieval_jax.evaluation.metrics import (
    METRICS,
    chosen_metrics,
    compute_metrics,
    cutoff,
    evaluate_run,
    register_metric,
)

QIDS = st.sampled_from(["q1", "q2", "q3", "q4"])
PIDS = st.sampled_from([f"p{i}" for i in range(24)])
# Lists of up to 24 results: both sides of every metric's cut-off at 10.
RANKINGS = st.lists(PIDS, max_size=24, unique=True)
QRELS = st.dictionaries(QIDS, st.dictionaries(PIDS, st.integers(0, 3), max_size=12), min_size=1)


def reference(qrels, run, threshold=1):
    """The metrics from their textbook definitions, written out as slowly and plainly as possible."""
    sums = dict.fromkeys(METRICS, 0.0)
    for qid, grades in qrels.items():
        pids = [pid for pid, _ in run.get(qid, [])]
        relevant = {pid for pid, grade in grades.items() if grade >= threshold}
        ranks = [rank for rank, pid in enumerate(pids, start=1) if pid in relevant]
        sums["MRR@10"] += 1 / ranks[0] if ranks and ranks[0] <= 10 else 0
        for k in 10, 100:
            sums[f"Recall@{k}"] += sum(rank <= k for rank in ranks) / len(relevant) if relevant else 0
        for k in 1, 10:
            sums[f"Hits@{k}"] += any(rank <= k for rank in ranks)

        def dcg(gains):
            return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:10], start=1))

        ideal = dcg(sorted(grades.values(), reverse=True))
        sums["nDCG@10"] += dcg([grades.get(pid, 0) for pid in pids]) / ideal if ideal else 0
    return {name: total / len(qrels) for name, total in sums.items()}


@settings(deadline=None, max_examples=200)
@given(
    qrels=QRELS,
    rankings=st.dictionaries(QIDS | st.just("unjudged"), RANKINGS),
    value=st.sampled_from([lambda i: 0.0, lambda i: 1 - i * 1e-12, lambda i: float(i), lambda i: -1e30 * i]),
    threshold=st.integers(1, 4),
)
def test_equals_the_definitions_whatever_the_scores(qrels, rankings, value, threshold):
    # Ties, differences below float32's and even ascending scores: the list's order is the ranking.
    run = {qid: [(pid, value(i)) for i, pid in enumerate(pids)] for qid, pids in rankings.items()}
    scores = compute_metrics(qrels, run, threshold)
    assert list(scores) == list(METRICS)
    assert scores == pytest.approx(reference(qrels, run, threshold))


@pytest.mark.parametrize("name", METRICS)
def test_cut_offs(name):
    # Random lists rarely have their first relevant passage just at a cut-off, so each is tried here.
    cut = int(name.split("@")[1])
    run = {"q": [(f"p{rank}", 0.0) for rank in range(1, 121)]}
    assert compute_metrics({"q": {f"p{cut}": 1}}, run)[name] > 0
    assert compute_metrics({"q": {f"p{cut + 1}": 1}}, run)[name] == 0


def test_missing_and_empty_queries_count_zero():
    qrels = {"hit": {"p": 1}, "missing": {"p": 1}, "empty": {"p": 1}, "nothing relevant": {"p": 0}}
    scores = compute_metrics(qrels, {"hit": [("p", 1.0)], "empty": [], "nothing relevant": [("p", 1.0)]})
    assert scores == dict.fromkeys(METRICS, 0.25)
    assert compute_metrics(qrels, {}) == dict.fromkeys(METRICS, 0.0)


def test_ndcg_takes_the_grade_as_the_gain():
    # (1/log2(2) + 3/log2(3)) / (3/log2(2) + 1/log2(3)), worked out by hand.
    assert compute_metrics({"q": {"a": 3, "b": 1}}, {"q": [("b", 2.0), ("a", 1.0)]})[
        "nDCG@10"
    ] == pytest.approx(0.796707, abs=1e-6)


def test_undefined_inputs_are_refused():
    with pytest.raises(ValueError, match="no judged query"):
        compute_metrics({}, {})
    with pytest.raises(ValueError, match="'q': a passage is ranked twice"):
        compute_metrics({"q": {"a": 1}}, {"q": [("a", 2.0), ("a", 1.0)]})


def test_imports_nothing_heavy():
    code = (
        "import sys, retrieval_jax.evaluation.metrics, retrieval_jax.evaluation.report\n"
        "heavy = {'jax', 'tensorflow', 'seqio', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(deadline=None, max_examples=50)
@given(qrels=QRELS, rankings=st.dictionaries(QIDS, RANKINGS), threshold=st.integers(1, 4))
def test_registered_metrics_are_computed_with_the_others(qrels, rankings, threshold):
    run = {qid: [(pid, 0.0) for pid in pids] for qid, pids in rankings.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "METRICS", dict(METRICS))
        register_metric("P@5")
        register_metric("Precision of grade 2", "P(rel=2)@5")
        register_metric("Answered", lambda qrels, run, grade: grade * sum(bool(run.get(q)) for q in qrels))
        scores = compute_metrics(qrels, run, threshold)

    def precision(grade):
        tops = {qid: [pid for pid, _ in run.get(qid, [])[:5]] for qid in qrels}
        return sum(qrels[qid].get(pid, 0) >= grade for qid in qrels for pid in tops[qid]) / 5 / len(qrels)

    assert list(scores)[len(METRICS) :] == ["P@5", "Precision of grade 2", "Answered"]
    assert scores["P@5"] == pytest.approx(precision(threshold))
    assert scores["Precision of grade 2"] == pytest.approx(precision(2))
    assert scores["Answered"] == threshold * sum(bool(run.get(qid)) for qid in qrels)


def test_a_metric_needs_a_known_name_of_its_own():
    with pytest.raises(ValueError, match=r"RR@100: RR@10 is the metric 'MRR@10': choose another name"):
        register_metric("MRR@10", "RR@100")
    names = list(METRICS)
    register_metric("MRR@10")  # the same measure again
    assert list(METRICS) == names
    for name in ("Answered", "P@", "nDCG@x"):
        with pytest.raises(ValueError, match=f"ir_measures has no measure '{name}'"):
            register_metric("mine", name)
    assert "mine" not in METRICS


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda qrels, run, grade: run["x"],
            r"metric Mine: KeyError: 'x' \(.*test_metrics\.py:\d+\): ",
        ),
        (
            lambda qrels, run, grade: None,
            "metric Mine: None is not a number: return the",
        ),
    ],
)
def test_a_function_that_fails_is_named_by_its_metric(monkeypatch, function, message: str):
    monkeypatch.setattr(metrics, "METRICS", METRICS | {"Mine": function})
    with pytest.raises(UserError, match=message):
        compute_metrics({"q": {"a": 1}}, {})


def test_measures_by_their_names_and_the_values_of_each_query():
    """As trec_eval computes them, with TREC Deep Learning's level of relevance and unjudged passages."""
    qrels = {"q1": {"a": 1, "b": 3, "x": 0}, "q2": {"c": 2}, "none": {"d": 0}}
    run = {"q1": [("u", 3.0), ("a", 2.0), ("b", 1.0)], "q2": [("c", 1.0)]}
    names = ("nDCG@10", "RR(rel=2)@10", "RR@10", "R@1000", "AP", "Judged@10", "MRR@10")
    chosen = chosen_metrics(names)
    values = evaluate_run(qrels, run, metrics=chosen)
    per_query = {
        "RR(rel=2)@10": [1 / 3, 1, 0],
        "RR@10": [1 / 2, 1, 0],
        "R@1000": [1, 1, 0],
        "AP": [(1 / 2 + 2 / 3) / 2, 1, 0],
        "Judged@10": [2 / 3, 1, 0],
        "MRR@10": [1 / 2, 1, 0],
    }
    assert list(values.means) == list(names)
    for name, expected in per_query.items():
        assert values.per_query[name] == pytest.approx(expected)
        assert values.means[name] == pytest.approx(sum(expected) / 3)
    assert evaluate_run(qrels, run, 2, chosen).means["RR@10"] == pytest.approx((1 / 3 + 1) / 3)
    assert [cutoff(metric) for metric in chosen.values()] == [10, 10, 10, 1000, None, 10, 10]
    assert chosen_metrics() == chosen_metrics(()) == METRICS
    for name in ("RR@x", "nope", "R(x=1)@3"):
        with pytest.raises(UserError, match=r"evaluate\.measures: .* is no measure .*: write it as https"):
            chosen_metrics([name])
    with pytest.raises(UserError, match=r"ir_measures fails .*: leave such measures out"):
        evaluate_run(qrels, run, metrics=chosen_metrics(["alpha_nDCG@20"]))


def test_measures_that_count_are_sums():
    """As trec_eval's num_q, num_ret and num_rel_ret; a grade is needed to be relevant alone."""
    qrels = {"q1": {"a": 1, "b": 2}, "q2": {"c": 2}}
    run = {"q1": [(p, 0.0) for p in "uavbw"], "q2": [("x", 1.0)]}
    found = evaluate_run(qrels, run, 2, chosen_metrics(["NumQ", "NumRet", "NumRet(rel=2)", "P@2"]))
    assert found.means == {"NumQ": 2, "NumRet": 6, "NumRet(rel=2)": 1, "P@2": 0}
    assert found.per_query["NumRet"].tolist() == [5, 1]
    assert found.sums == {"NumQ", "NumRet", "NumRet(rel=2)"}


@pytest.mark.parametrize("name", ["nDCG@0", "P@0", "RR@-1", "R@True"])
def test_a_cutoff_below_one_is_refused(name: str):
    with pytest.raises(UserError, match=r"evaluate.measures: .* is no measure"):
        chosen_metrics((name,))


@pytest.mark.skipif(shutil.which("perl") is None, reason="gdeval, which computes ERR, needs Perl")
def test_a_program_that_takes_numbers_alone_gets_them_for_the_queries_ids():
    """ERR@2 (Chapelle et al. 2009) with grades up to 4: a passage of grade g satisfies by (2^g - 1) / 16."""
    qrels = {"all": {"a": 3, "b": 1}, "q 2": {"a": 0, "c": 1}}
    run = {"all": [("b", 2.0), ("a", 1.0)], "q 2": [("a", 2.0), ("c", 1.0)]}
    found = evaluate_run(qrels, run, metrics=chosen_metrics(("ERR@2",)))
    first = 1 / 16 + (1 - 1 / 16) * (7 / 16) / 2
    np.testing.assert_allclose(found.per_query["ERR@2"], [first, 1 / 16 / 2], atol=1e-4)
    assert found.means["ERR@2"] == pytest.approx((first + 1 / 32) / 2, abs=1e-4)
