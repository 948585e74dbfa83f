"""A search of docids gives the scores of training, in every variant of the network."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_t5 import (
    CONFIG,
    PAWA,
    parameters,
    random_batch,
)
from test_t5 import jit

from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.models.generative import GenerativeRetriever


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("config", [CONFIG, PAWA], ids=["plain", "pawa"])
def test_the_search_of_every_variant_scores_as_its_training_does(config, scan: bool):
    """As many beams as docids: each docid's score is the sum of its targets' log-probabilities."""
    model = GenerativeRetriever(dataclasses.replace(config, scan_layers=scan))
    params = parameters(model)
    docids = np.unique(np.random.default_rng(0).integers(1, 24, (15, 3)), axis=0).astype(np.int32)
    trie = jax.device_put(build_trie(docids)[0])
    inputs = random_batch(1, 2)["encoder_input_tokens"]
    search = jit(functools.partial(model.predict_batch_with_aux, beams=len(docids)))
    rows, aux = search(params, {"encoder_input_tokens": inputs}, trie=trie)
    for query in range(2):
        batch = {
            "encoder_input_tokens": np.tile(inputs[query], (len(docids), 1)),
            "decoder_input_tokens": np.pad(docids, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": docids,
            "decoder_loss_weights": np.ones_like(docids),
        }
        exact = np.asarray(jit(model.score_batch)(params, batch))
        assert sorted(rows[query].tolist()) == list(range(len(docids)))
        np.testing.assert_allclose(aux["scores"][query], exact[rows[query]], atol=1e-4)
