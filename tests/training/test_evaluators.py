"""What training shows of itself in the collection's own words: dev samples, and the examples of a batch."""

import flax.linen as nn
import jax
from tables import KINDS, docids_of

from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.evaluators import GenerativeEvaluator


def test_samples_tell_what_was_found_for_the_first_dev_queries(work, collection):
    table = KINDS["naive"](collection)
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
            assert one["docid"] == list(docids_of(table)[one["id"]])
