"""What variations do to runs: the loss, the paired test over all, the overlap by hand."""

import json

import numpy as np
import pytest

from retrieval_jax.evaluation import robustness
from retrieval_jax.evaluation.robustness import MethodRun
from retrieval_jax.evaluation.significance import holm_bonferroni, randomization_test

QUERIES = [f"q{i}" for i in range(12)]


def ranked(*passages: str) -> list[tuple[str, float]]:
    return [(passage, -float(i)) for i, passage in enumerate(passages)]


def test_the_overlap_is_of_the_first_results():
    one = {"a": ranked("x", "y", "z"), "b": ranked("x", "y"), "d": ranked(*(f"p{i}" for i in range(12)))}
    other = {"a": ranked("z", "y", "w"), "b": ranked("x"), "d": ranked(*(f"p{i}" for i in range(5, 17)))}
    queries = ["a", "b", "c", "d"]
    assert robustness.overlap(one, other, queries) == pytest.approx((2 / 3 + 1 / 2 + 1 + 5 / 10) / 4)
    assert robustness.overlap(one, other, ["a"], depth=1) == 0
    assert robustness.overlap(one, one, queries) == 1


def test_losses_are_paired_and_corrected_over_all_methods_and_kinds():
    random = np.random.default_rng(0)
    clean = {name: MethodRun({}, random.random(12), certain) for name, certain in (("a", None), ("b", 0.5))}
    varied = {
        kind: {name: MethodRun({}, clean[name].values_Q * random.random(12), 0.25) for name in names}
        for kind, names in (("typo", "ab"), ("shuffle", "b"))
    }
    found = robustness.effects(QUERIES, clean, varied)
    assert {name: list(kinds) for name, kinds in found.items()} == {"a": ["typo"], "b": ["typo", "shuffle"]}
    order = [("a", "typo"), ("b", "typo"), ("b", "shuffle")]
    losses = np.stack([varied[kind][name].values_Q - clean[name].values_Q for name, kind in order])
    p_S = holm_bonferroni(randomization_test(losses))
    for (name, kind), loss_Q, p in zip(order, losses, p_S, strict=True):
        effect = found[name][kind]
        assert effect.difference.mean == pytest.approx(loss_Q.mean())
        assert effect.difference.p_holm == pytest.approx(p)
        assert effect.relative_loss == pytest.approx(-loss_Q.mean() / clean[name].values_Q.mean())
    facts = json.loads(json.dumps(robustness.facts(found, "nDCG@10", "test", 12)))
    told = facts["methods"]["b"]["typo"]
    assert (told["certain_clean"], told["certain"], told["overlap@10"]) == (0.5, 0.25, 1.0)
    assert facts["methods"]["a"]["typo"]["certain_clean"] is None


def test_what_is_still_certain_is_a_share_of_what_was_certain():
    values = np.ones(12)
    clean = {
        "proven": MethodRun({}, values, 0.25, {"q0", "q1", "q2"}),
        "none": MethodRun({}, values, 0.0, set()),
        "of_before": MethodRun({}, values, 0.25),  # a run that does not say which queries they are
        "bm25": MethodRun({}, values),
    }
    varied = {"typo": clean | {"proven": MethodRun({}, values, 0.5, {"q1", *QUERIES[3:8]})}}
    found = robustness.effects(QUERIES, clean, varied)
    shares = {name: kinds["typo"].still_certain for name, kinds in found.items()}
    assert shares == {"proven": pytest.approx(1 / 3), "none": None, "of_before": None, "bm25": None}
    (told,) = robustness.facts({"proven": found["proven"]}, "m", "test", 12)["methods"]["proven"].values()
    assert (told["certain_clean"], told["certain"], told["still_certain"]) == (
        0.25,
        0.5,
        pytest.approx(1 / 3),
    )


def test_a_plan_is_the_run_of_the_lexical_half():
    """Of the same model and the same sets; no further than the plan goes, and compared as a whole."""
    model = {"model": "m", "step": 3, "checksum": "c", "sets_fingerprint": "s"}

    def run(kind: str, *passages: str, **others: object) -> tuple[dict, dict]:
        recipe = {"kind": kind} | model | others
        return {"q": ranked(*passages)}, {"recipe": {"searcher": recipe}, "summary": {}}

    planned = run("planned", "a", planned_by={"plan_size": 3})
    others = {"of_another_model": run("lexical", "x", checksum="d"), "tool": ({"q": ranked("y")}, None)}
    assert robustness.plans_of(planned[1], others) == {}
    runs = others | {"half": run("lexical", "a", "b", "c", "d"), "planned": planned}
    plans = robustness.plans_of(planned[1], runs)
    assert plans == {"half": {"q": ranked("a", "b", "c")}}
    assert [robustness.plans_of(facts, runs) for _, facts in (*runs.values(),)[:3]] == [{}] * 3
    clean = {"planned": MethodRun(planned[0], np.ones(1), plans=plans)}
    some = {"q": ranked("c", "d", "e")}
    varied = {
        kind: {"planned": MethodRun(planned[0], np.ones(1), plans=plans)}
        for kind, plans in {"typo": {"half": some}, "unknown": {}, "of_another": {"other": some}}.items()
    }
    effects = robustness.effects(["q"], clean, varied)
    assert effects["planned"]["typo"].plan_overlap == pytest.approx(1 / 3)
    assert effects["planned"]["unknown"].plan_overlap is None
    assert effects["planned"]["of_another"].plan_overlap is None


def test_nothing_found_is_no_relative_loss():
    run = MethodRun({}, np.zeros(12))
    (effect,) = robustness.effects(QUERIES, {"a": run}, {"typo": {"a": run}})["a"].values()
    assert (effect.difference.p, effect.difference.significant) == (1, False)
    facts = robustness.facts({"a": {"typo": effect}}, "m", "test", 12)
    assert facts["methods"]["a"]["typo"]["relative_loss"] is None
    assert robustness.effects(QUERIES, {"a": run}, {"typo": {"b": run}}) == {}
