"""What training shows of itself in the collection's own words: dev samples, and the examples of a batch."""

import gin
import numpy as np
import pytest
from model_folders import compiled, exact_scores, random_params
from tables import KINDS, docids_of

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.term_weights import write_sets
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.targets import DocidTargets, PassageTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.joint_ranking import joint_ranking
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.training import evaluators
from retrieval_jax.training.evaluators import DenseEvaluator, GenerativeEvaluator
from retrieval_jax.training.families import family_of
from retrieval_jax.training.pool import EvaluationCost
from retrieval_jax.training.run import docid_softmax
from retrieval_jax.training.settings import TrainSettings


def test_samples_tell_what_was_found_for_the_first_dev_queries(work, collection):
    table = KINDS["naive"](collection)
    vocabulary = Vocabulary(collection.vocabulary_path)
    model = GenerativeRetriever(T5Config(vocabulary.size, 16, 2, 8, 32, 1, 1))
    params = random_params(model)
    examples = TrainDataset(DataConfig(input_length=16), work, collection, DocidTargets, table)
    dev = GenerativeEvaluator(model, examples, TrainSettings(), beams=4)
    assert set(dev(params)) == {"Hits@1", "Hits@10", "MRR@10"}
    assert len(dev.samples) == 5
    positives = {q.text: q.positives for q in collection.queries("dev")}
    for sample in dev.samples:
        assert [one["id"] for one in sample["right"]] == [*positives[sample["query"]]]
        scores = [one["score"] for one in sample["found"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 4
        for one in (*sample["right"], *sample["found"]):
            assert one["docid"] == list(docids_of(table)[one["id"]])


def brute_force(model, params, examples, queries, rows) -> dict[str, float]:
    """Searches the passages of these rows with numpy in float64, one text at a time without padding."""
    config, vocabulary, passages = examples.config, examples.vocabulary, examples.collection.get(rows)

    def encode(method: str, text: str, length: int) -> np.ndarray:
        tokens = np.array([[*vocabulary.encode(text)[: length - 1], 1]])
        return np.float64(compiled(model, method)(params, tokens)[0])

    vectors = [encode("encode_passages", p.full_text, config.passage_length) for p in passages]
    ranks = []
    for query in queries:
        scores = np.stack(vectors) @ encode("encode_queries", query.text, config.input_length)
        order = [passages[i].id for i in np.argsort(-scores, kind="stable")]
        ranks.append(min(order.index(passage) for passage in query.positives) + 1)
    ranks = np.array(ranks)
    hits = {f"Hits@{k}": np.mean(ranks <= k) for k in (1, 10)}
    return hits | {"MRR@10": np.mean(np.where(ranks <= 10, 1 / ranks, 0))}


def test_metrics_of_a_pool_are_those_of_brute_force(work, collection, capsys, monkeypatch):
    data = DataConfig(input_length=16, passage_length=24)
    examples = TrainDataset(data, work, collection, PassageTargets)
    model = DualEncoder(T5Config(examples.vocabulary.size, 16, 2, 8, 20, 1, 0), vector_dim=8)
    params = random_params(model)
    settings = TrainSettings(steps=10, batch_size=24, eval_every=5)

    dev = DenseEvaluator(model, examples, settings)
    most = EvaluationCost.of(data, settings, len(dev.queries)).passages_within(0.05)
    assert len(dev.rows) == most == int(0.05 * 3 * 120 * 40 - 10 * 16) // 24
    assert most < collection.passage_count
    told = capsys.readouterr().err
    assert f"10 dev queries are searched among {most} of {collection.passage_count} passages" in told
    assert "about 4.9% of the training's computation\n" in told
    assert dev.prefix == "dev_pool"
    found = dev(params)
    assert found.pop("passages") == most
    digest = found.pop("pool_digest")
    assert DenseEvaluator(model, examples, settings, pool_size=most)(params)["pool_digest"] == digest
    assert DenseEvaluator(model, examples, settings, pool_size=most - 1)(params)["pool_digest"] != digest
    capsys.readouterr()
    assert found == pytest.approx(brute_force(model, params, examples, dev.queries, dev.rows))
    assert {passage["id"] for sample in dev.samples for passage in sample["found"]} <= {
        collection.ids[int(row)].as_py() for row in dev.rows
    }
    whole = DenseEvaluator(model, examples, settings, pool_size=0)
    assert "more than 5%: set a larger train.eval_every" in capsys.readouterr().err
    assert whole.prefix == "dev"
    expected = brute_force(model, params, examples, dev.queries, range(collection.passage_count))
    assert whole(params) == pytest.approx(expected)
    assert whole(params)["MRR@10"] < found["MRR@10"]

    monkeypatch.setattr(evaluators, "_POOL_BYTES", 4 * 8 * (most - 1))
    assert len(DenseEvaluator(model, examples, settings).rows) == most - 1
    assert len(DenseEvaluator(model, examples, settings, pool_size=most).rows) == most
    monkeypatch.undo()
    capsys.readouterr()

    longer = DenseEvaluator(model, examples, TrainSettings(steps=100, batch_size=24, eval_every=50))
    assert longer.prefix == "dev"  # what 5% of more steps pay for is the whole collection
    assert len(longer.rows) == collection.passage_count
    assert not capsys.readouterr().err
    few = DenseEvaluator(model, examples, TrainSettings(steps=1, batch_size=1))
    assert len(few.rows) == len({passage for query in few.queries for passage in query.positives})
    assert "more than 5%" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sets_work(collection, tmp_path_factory) -> Workspace:
    """A work folder with sets of few tokens, of which no passage has all of its words."""
    work = Workspace(tmp_path_factory.mktemp("sets") / "work")
    recipe, make = {"of": "few"}, lambda tmp: write_sets(tmp, collection, "bm25", 6, True)
    storage.build_once(work.sets("few"), recipe, make)
    return work


@pytest.mark.parametrize("weight", [None, 0.25])
def test_a_training_with_sets_is_evaluated_by_them(sets_work, collection, weight: float | None):
    """A lexical encoder, and (with the weight of its docids' scores) a model of both scores."""
    data, tables = DataConfig({"labelled": 1.0}, input_length=16, negatives=1, sets="few"), KINDS["atomic"]
    table = tables(collection) if weight else None
    examples = TrainDataset(
        data, sets_work, collection, DocidGroupTargets if weight else PassageTargets, table
    )
    sizes = (examples.vocabulary.size, 16, 2, 8, 32, 1, 1)
    if weight:
        model = GenerativeRetriever(
            T5Config(*sizes, lexical_head=True, **docid_softmax(table)), objective=joint_ranking
        )
    else:
        model = LexicalEncoder(T5Config(*sizes))
    params = random_params(model)
    params["lexical_head"] = {
        "gain": np.ones(sizes[0], np.float32),
        "scale": np.float32(1),
        "bias": np.float32(0),
    }
    with gin.config_scope("rank"), gin.unlock_config():
        gin.bind_parameter("rank/joint_ranking.sequential_weight", weight or 1.0)
        dev = family_of(type(model)).evaluator(model, examples, TrainSettings(), None)
    gin.clear_config()
    assert weight is None or dev.generative.sequential_weight == weight
    sets, ranks = examples.sets, []
    for query in dev.queries:
        tokens = examples.vocabulary.batch([query.text], 16)
        weights = np.float64(compiled(model, "lexical_weights")(params, {"encoder_input_tokens": tokens})[0])
        added = np.where(sets.tokens_PxM > 0, weights[sets.tokens_PxM], 0) * sets.impacts_PxM
        scores = added.sum(axis=1) * sets.impact_scale
        if weight:
            scores += weight * exact_scores(model, params, tokens[0], table.tokens_NxL)
        order = [collection.ids[int(row)].as_py() for row in np.argsort(-scores, kind="stable")]
        ranks.append(min(order.index(passage) for passage in query.positives) + 1)
    ranks = np.array(ranks)
    expected = {f"Hits@{k}": np.mean(ranks <= k) for k in (1, 10)}
    expected["MRR@10"] = np.mean(np.where(ranks <= 10, 1 / ranks, 0))
    assert dev.prefix == "dev"
    assert dev(params) == pytest.approx(expected)
    assert 0 < expected["MRR@10"] < 1
