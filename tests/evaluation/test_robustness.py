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


def test_nothing_found_is_no_relative_loss():
    run = MethodRun({}, np.zeros(12))
    (effect,) = robustness.effects(QUERIES, {"a": run}, {"typo": {"a": run}})["a"].values()
    assert (effect.difference.p, effect.difference.significant) == (1, False)
    facts = robustness.facts({"a": {"typo": effect}}, "m", "test", 12)
    assert facts["methods"]["a"]["typo"]["relative_loss"] is None
    assert robustness.effects(QUERIES, {"a": run}, {"typo": {"b": run}}) == {}
