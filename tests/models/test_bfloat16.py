"""Whole models in bfloat16: loss, gradients, scores, search and its bound are of float32 logits.

The reference takes what the network gives before its softmax, in bfloat16, and does the rest in float64.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import initial_params

from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.t5 import output_kernel

V, B, S, T = 4096, 3, 6, 3
SMALL = {
    "emb_dim": 32,
    "num_heads": 2,
    "head_dim": 16,
    "mlp_dim": 48,
    "dropout_rate": 0.0,
    "dtype": "bfloat16",
}


def model_and_params(tied: bool = False, **settings):
    config = T5Config(V, num_encoder_layers=1, num_decoder_layers=1, logits_via_embedding=tied, **SMALL)
    model = GenerativeRetriever(config, None, **settings)
    return model, initial_params(model)


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = rng.integers(1, V, (B, T), np.int32)
    return {
        "encoder_input_tokens": rng.integers(1, V, (B, S), np.int32),
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones((B, T), np.int32),
    }


def with_hidden(model, function):
    """(params, batch) -> what the function gives, and what the softmax reads: the same states, and rounded.

    XLA otherwise leaves out some of the roundings to bfloat16.
    """
    strictly = {"xla_allow_excess_precision": False}
    return jax.jit(lambda *of: (function(*of), model.hidden(*of)), compiler_options=strictly)


def reference(model, params, hidden: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64: what the softmax reads B×T×E, its kernel E×V, and the log-probabilities B×T×V."""
    assert hidden.dtype == jnp.bfloat16
    x, kernel = np.asarray(hidden, np.float64), np.asarray(output_kernel(model.config, params), np.float64)
    logits = x @ kernel
    return x, kernel, logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_logits_per_block", [None, B * T * 64])
def test_loss_and_gradients_of_both_paths(tied: bool, max_logits_per_block: int | None):
    model, params = model_and_params(tied, max_logits_per_block=max_logits_per_block)
    given = batch()
    gradient_of = jax.value_and_grad(lambda params, batch: model.loss_fn(params, batch, None)[0])
    (loss, gradients), hidden = with_hidden(model, gradient_of)(params, given)
    x, _, log_probs = reference(model, params, hidden)
    target = np.take_along_axis(log_probs, given["decoder_target_tokens"][..., None], -1)
    np.testing.assert_allclose(loss, -target.mean(), rtol=1e-6)
    if not tied:  # of the embedding there is another gradient, too
        of_logits = np.exp(log_probs)
        np.put_along_axis(
            of_logits,
            given["decoder_target_tokens"][..., None],
            np.exp(target) - 1,
            -1,
        )
        expected = np.einsum("bte,btv->ev", x, of_logits) / (B * T)
        np.testing.assert_allclose(
            gradients["decoder"]["logits_dense"]["kernel"], expected, atol=1e-7, rtol=1e-4
        )


@pytest.mark.parametrize("tied", [False, True])
def test_scores(tied: bool):
    model, params = model_and_params(tied)
    given = batch()
    scores, hidden = with_hidden(model, model.score_batch)(params, given)
    _, _, log_probs = reference(model, params, hidden)
    expected = np.take_along_axis(log_probs, given["decoder_target_tokens"][..., None], -1)[..., 0].sum(1)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.parametrize("score", ["log_prob", "logits"])
def test_search_and_its_bound(score: str):
    """Against every docid's score; teacher forcing, which makes that, rounds as the search's steps do."""
    rng = np.random.default_rng(1)
    docids = np.unique(rng.integers(1, V, (40, T), np.int32), axis=0)
    docids[20:, 0] = docids[0, 0]  # many begin alike
    docids = np.unique(docids, axis=0)
    model, params = model_and_params(score=score)
    query = batch()["encoder_input_tokens"][:1]
    teacher = {
        "encoder_input_tokens": np.repeat(query, len(docids), 0),
        "decoder_input_tokens": np.pad(docids[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": docids,
        "decoder_loss_weights": np.ones_like(docids),
    }
    _, hidden = with_hidden(model, lambda *_: ())(params, teacher)
    x, kernel, log_probs = reference(model, params, hidden)
    of_tokens = log_probs if score == "log_prob" else x @ kernel
    exactly = np.take_along_axis(of_tokens, docids[..., None], -1)[..., 0].sum(1)

    trie, _ = build_trie(docids)
    predict = jax.jit(model.predict_batch_with_aux, static_argnames="beams")

    def search(beams: int):
        rows, aux = predict(params, {"encoder_input_tokens": query}, trie=trie, beams=beams)
        return (
            np.asarray(rows[0]),
            np.asarray(aux["scores"][0], np.float64),
            float(aux["pruned_upper_bound"][0]),
        )

    rows, scores, _ = search(len(docids))
    np.testing.assert_allclose(scores, exactly[rows], atol=2e-2)  # attention's sums differ in their order
    assert len(np.unique(scores)) == len(scores)  # of rounded logits many would be equal
    rows, scores, bound = search(4)
    assert (bound == np.inf) == (score == "logits")
    left_out = np.setdiff1d(np.arange(len(docids)), rows)
    assert exactly[left_out].max() <= bound + 2e-2


def products(text: str) -> list[str]:
    """The lines of a lowered program's products of float32."""
    return [line for line in text.splitlines() if "dot_general" in line and "xbf16>" not in line]


def test_programs_ask_for_products_that_round_nothing():
    """A CPU rounds nothing anyway, so this is read off the programs that a TPU or a GPU would get."""
    model, params = model_and_params()
    given = batch()
    trie, _ = build_trie(given["decoder_target_tokens"])
    queries = {"encoder_input_tokens": given["encoder_input_tokens"]}
    programs = {
        "score": jax.jit(model.score_batch).lower(params, given),
        "search": jax.jit(model.predict_batch_with_aux, static_argnames="beams").lower(
            params, queries, trie=trie, beams=2
        ),
        "atomic": jax.jit(model.rank_atomic, static_argnums=3).lower(params, queries, np.ones(V, bool), 5),
    }
    encoder = DualEncoder(T5Config(V, num_encoder_layers=1, num_decoder_layers=0, **SMALL), vector_dim=8)
    towers = initial_params(encoder)
    programs["vectors"] = jax.jit(encoder.encode_queries).lower(towers, given["encoder_input_tokens"])
    for name, program in programs.items():
        exact = [line for line in products(program.as_text()) if f"x{V}xf32" in line or "x8xf32" in line]
        assert exact, name
        for line in exact:
            assert re.search(r"precision = \[HIGHEST, HIGHEST\]", line), (name, line)
    # Training's is T5X's: the default, accumulated in float32.
    training = jax.jit(jax.grad(lambda p: model.loss_fn(p, given, None)[0])).lower(params).as_text()
    of_softmax = [line for line in products(training) if f"x{V}xf32" in line]
    assert of_softmax
    assert not any("HIGHEST" in line for line in of_softmax)
