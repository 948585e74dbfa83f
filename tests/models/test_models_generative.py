"""A search of docids gives the scores of training, in every variant of the network, by either score."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from model_folders import exact_scores
from small_t5 import (
    CONFIG,
    PAWA,
    parameters,
    random_batch,
)
from test_t5 import jit

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.core.errors import UserError
from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.models.generative import GenerativeRetriever


@pytest.mark.parametrize("score", ["log_prob", "logits"])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("config", [CONFIG, PAWA], ids=["plain", "pawa"])
def test_the_search_of_every_variant_scores_as_its_training_does(config, scan: bool, score: str):
    """As many beams as docids: each docid's score is the sum of its tokens', also where it ends early."""
    model = GenerativeRetriever(dataclasses.replace(config, scan_layers=scan), score=score)
    params = parameters(model)
    rng = np.random.default_rng(0)
    docids = rng.integers(2, 24, (15, 4)) * (np.arange(4) < rng.integers(1, 5, (15, 1)))
    docids = np.unique(np.where(np.cumsum(docids == 0, 1) == 1, 1, docids), axis=0)  # each ends with a 1
    docids[:, 3] = np.where(docids[:, 2] > 1, 1, docids[:, 3])
    docids = np.unique(docids, axis=0).astype(np.int32)
    trie = jax.device_put(build_trie(docids)[0])
    inputs = random_batch(1, 2)["encoder_input_tokens"]
    search = jit(functools.partial(model.predict_batch_with_aux, beams=len(docids) + 1))
    rows, aux = search(params, {"encoder_input_tokens": inputs}, trie=trie)
    assert (aux["pruned_upper_bound"] == -np.inf).all()
    for query, row_K, score_K in zip(inputs, rows[:, :-1], aux["scores"][:, :-1], strict=True):
        exact = exact_scores(model, params, query, docids)
        assert row_K.tolist() == np.argsort(-exact).tolist()
        np.testing.assert_allclose(score_K, exact[row_K], atol=1e-4)
        batch = {
            "encoder_input_tokens": np.tile(query, (len(docids), 1)),
            "decoder_input_tokens": np.pad(docids, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": docids,
            "decoder_loss_weights": (docids > 0).astype(np.int32),
        }
        np.testing.assert_allclose(jit(model.score_batch)(params, batch), exact, atol=1e-4)


def test_the_score_is_a_property_of_the_model_and_log_prob_where_nothing_is_said():
    for score, said in (("log_prob", {}), ("logits", {"score": "logits"})):
        description = model_folder.describe(GenerativeRetriever(CONFIG, score=score))
        assert description["settings"] == said
        assert model_folder.model_from_description(description).score == score
    with pytest.raises(UserError, match=r"GenerativeRetriever.score: no score 'sum': log_prob or logits"):
        GenerativeRetriever(CONFIG, score="sum")
