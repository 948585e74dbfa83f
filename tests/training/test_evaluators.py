"""What training shows of itself in the collection's own words: dev samples, and the examples of a batch."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from retrieval_jax.core import arrow_ids
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.batches import batches
from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.evaluators import GenerativeEvaluator
from retrieval_jax.verbs.train import describe_batch


@pytest.fixture(scope="module")
def table(work, arguments) -> DocidTable:
    from retrieval_jax.main import main

    assert main(["docids", *arguments, "--json"]) == 0
    return DocidTable.open(work.docids("naive"))


def docid(table: DocidTable, passage_id: str) -> list[int]:
    (row,) = arrow_ids.find_rows(table.passage_ids, [passage_id])
    return [token for token in table.tokens_NxL[row].tolist() if token]


def test_samples_tell_what_was_found_for_the_first_dev_queries(work, collection, table):
    vocabulary = Vocabulary(collection.vocabulary_path)
    model = GenerativeRetriever(T5Config(vocabulary.size, 16, 2, 8, 32, 1, 1))
    shapes = {"encoder_input_tokens": (1, 16), "decoder_input_tokens": (1, table.length)}
    params = nn.unbox(model.get_initial_variables(jax.random.key(0), shapes)["params"])
    examples = TrainDataset(DataConfig(input_length=16), work, collection, DocidTargets, table)
    dev = GenerativeEvaluator(model, examples, beams=4)
    assert set(dev(params)) == {"Hits@1", "Hits@10", "MRR@10"}
    assert len(dev.samples) == 5
    positives = {q.text: q.positives for q in collection.queries("dev")}
    for sample in dev.samples:
        assert [one["id"] for one in sample["right"]] == [*positives[sample["query"]]]
        scores = [one["score"] for one in sample["found"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 4
        for one in (*sample["right"], *sample["found"]):
            assert one["docid"] == docid(table, one["id"])


def test_a_batch_is_described_by_its_tasks_texts_and_passages(work, collection, table):
    data = DataConfig(
        mixture={"firstp": 0.5, "labelled": 0.5}, token_dropout={"firstp": 0.5}, input_length=12
    )
    examples = TrainDataset(data, work, collection, DocidTargets, table)
    made = batches(examples.stages(), examples.targets, data.token_dropout, 8, 3, position=16)
    batch = next(made)
    rows = describe_batch(examples, 8, 3, 16)
    assert {row["task"] for row in rows} == {"firstp", "labelled"}
    queries = {q.text for q in collection.queries("train")}
    for row, target in zip(rows, batch["decoder_target_tokens"], strict=True):
        assert docid(table, row["passages"][0]) == [token for token in target.tolist() if token]
        if row["task"] == "firstp":
            assert collection.ids[row["number"]].as_py() == row["passages"][0]
    texts = [row["text"] for row in rows if row["task"] == "labelled"]
    folded = {vocabulary_form(examples.vocabulary, query) for query in queries}
    assert set(texts) <= folded


def vocabulary_form(vocabulary: Vocabulary, text: str) -> str:
    return vocabulary.decode(np.array([vocabulary.encode(text)]))[0]
