"""What chance gives, by counting, and when a model is told to be better."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from tables import KINDS

from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.ranking import margin_mse
from retrieval_jax.training import chance
from retrieval_jax.training.evaluators import RetrievalEvaluator
from retrieval_jax.training.settings import TrainSettings


def test_a_random_rankings_hits_are_those_of_all_rankings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chance, "DEPTH", 3)
    counted = [
        np.mean([min(first) < positives for first in itertools.permutations(range(6), 3)])
        for positives in (1, 2, 5)
    ]
    np.testing.assert_allclose(chance.random_hits([1, 2, 5], 6), counted, rtol=1e-12)
    assert chance.random_hits([1], 2) == 1  # all are found


def test_luck_is_that_of_equal_and_of_different_queries():
    for found, probability in ((0, 1.0), (1, 0.039), (2, 0.00076)):  # of 26 evaluations, one has a hit
        few = chance.luck(found / 256, chance.random_hits([1] * 256, 64_553))
        assert few == pytest.approx(stats.binom.sf(found - 1, 256, 10 / 64_553), rel=1e-9)
        assert few == pytest.approx(probability, rel=0.02)
    # A perfect model of 30 passages, which is significant, though a Poisson distribution is not.
    assert chance.luck(1.0, chance.random_hits([1] * 10, 30)) == pytest.approx((1 / 3) ** 10)
    probabilities = [0.1, 0.5, 0.9]
    counted = sum(
        math.prod(p if hit else 1 - p for p, hit in zip(probabilities, hits, strict=True))
        for hits in itertools.product((0, 1), repeat=3)
        if sum(hits) >= 2
    )
    assert chance.luck(2 / 3, probabilities) == pytest.approx(counted)


@pytest.fixture(scope="module")
def examples(work, collection) -> dict[str, TrainDataset]:
    return {
        kind: TrainDataset(DataConfig(), work, collection, DocidTargets, KINDS[kind](collection))
        for kind in ("atomic", "naive")
    }


def model(examples: TrainDataset, **settings: object) -> GenerativeRetriever:
    return GenerativeRetriever(T5Config(examples.vocabulary.size, 16, 2, 8, 32, 1, 1), **settings)


def test_the_loss_of_chance_is_that_of_equal_docids(examples: dict[str, TrainDataset]):
    """Docids of several tokens have none: their softmax is over more than the tokens that may follow."""
    atomic, naive = examples["atomic"], examples["naive"]
    passages = atomic.collection.passage_count
    assert chance.docid_loss(model(atomic), atomic) == pytest.approx(math.log(passages))
    assert chance.docid_loss(model(naive), naive) is None
    assert chance.docid_loss(model(atomic, objective=margin_mse), atomic) is None
    made = {"step": 7}
    assert chance.verdict(model(naive), naive, SimpleNamespace(), made, 0.1) is None
    searched = made | {"dev/Hits@10": 0.9}
    evaluator = NoSearch(model(naive), naive, TrainSettings())
    verdict = chance.verdict(model(naive), naive, evaluator, searched, 9.0)
    assert verdict.left
    assert "loss" not in verdict.text


def test_the_remedy_is_another_recipe_than_the_models_own(examples: dict[str, TrainDataset]):
    data = examples["atomic"]
    dense = DualEncoder(T5Config(data.vocabulary.size, 16, 2, 8, 32, 1, 0), None, vector_dim=8)
    for trained, on, recipes in (
        (model(data), data, "runs/dual_encoder.gin"),
        (dense, data, "runs/atomic.gin"),
        (model(data), examples["naive"], "runs/atomic.gin or runs/dual_encoder.gin"),
    ):
        assert chance.remedy(7, trained, on) == (
            f"after 7 steps for {data.collection.passage_count} passages: train longer, as --STEPS=28, begin "
            f"with pretrained weights (--INITIAL_CHECKPOINT), or try {recipes}"
        )


class NoSearch(RetrievalEvaluator):
    """Has the dev queries, and searches for none."""

    def prepare(self, *_):
        pass

    def searcher(self, params):
        raise NotImplementedError


@pytest.mark.parametrize(("hits", "left"), [(0.0, False), (0.9, True)])
def test_dev_queries_decide_before_the_loss(examples: dict[str, TrainDataset], hits: float, left: bool):
    data = examples["atomic"]
    evaluator = NoSearch(model(data), data, TrainSettings())
    verdict = chance.verdict(model(data), data, evaluator, {"step": 7, "dev/Hits@10": hits}, 0.1)
    assert verdict.left is left
    assert ("NOT BETTER THAN CHANCE" in verdict.text) is not left
    assert ("--STEPS=28" in verdict.text) is not left
    assert f"dev Hits@10 {hits:.3f}" in verdict.text


def test_queries_that_any_ranking_answers_tell_nothing(examples: dict[str, TrainDataset]):
    data = examples["atomic"]
    evaluator = NoSearch(model(data), data, TrainSettings())
    evaluator.prefix = "dev_pool"
    made = {"step": 7, "dev_pool/Hits@10": 1.0, "dev_pool/passages": 11}
    assert chance.verdict(model(data, objective=margin_mse), data, evaluator, made, None) is None
    assert chance.verdict(model(data), data, evaluator, made, 0.1).left  # by the loss


def test_without_dev_queries_the_loss_decides(examples: dict[str, TrainDataset], tmp_path: Path):
    data, nobody = examples["atomic"], SimpleNamespace()
    equal = math.log(data.collection.passage_count)
    assert not chance.verdict(model(data), data, nobody, {"step": 7}, equal + 0.5).left
    assert chance.verdict(model(data), data, nobody, {"step": 7}, 0.5 * equal).left
    assert chance.verdict(model(data), data, nobody, {"step": 7}, None) is None
    assert chance.last_loss(tmp_path) is None
    (tmp_path / "learning_curve.jsonl").write_text(
        '{"step": 10, "loss": 3.5}\n{"step": 10, "dev/MRR@10": 1}\n'
    )
    assert chance.last_loss(tmp_path) == 3.5
