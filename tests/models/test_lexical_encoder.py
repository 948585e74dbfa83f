"""The lexical encoder: its vectors, its regularisers and its training on sets, against NumPy."""

import ast
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_folders import compiled, random_params, write_model_folder

from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.model_folder import describe, load_model, model_from_description
from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.distillation import dense_margin_mse
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.lexical_encoder import LexicalEncoder, set_vectors
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step

CONFIG = T5Config(256, 64, 2, 8, 32, 0, 1, branch_init_scale=1e-3, embedding_init_std=0.05, dropout_rate=0.0)
B, G, S = 4, 2, 6


@pytest.fixture(scope="module")
def batch() -> dict:
    rng = np.random.default_rng(0)
    return {
        "left_encoder_input_tokens": rng.integers(2, 256, (B, S)).astype(np.int32),
        "right_encoder_input_tokens": rng.integers(2, 256, (B, G, 2 * S)).astype(np.int32),
        "passage": np.arange(B * G, dtype=np.int32).reshape(B, G),
        "grade": np.tile(np.array([1, 0], np.int32), (B, 1)),
        "score": rng.normal(size=(B, G)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def params() -> dict:
    made = random_params(LexicalEncoder(CONFIG))
    assert made.keys() == {"token_embedder", "encoder", "lexical_head"}
    made["lexical_head"]["bias"] = jnp.float32(0.1)  # most weights are above 0
    return made


def test_vectors_are_those_of_a_retrievers_lexical_head(batch: dict, params: dict):
    """Queries have gains and passages have none; model.json holds the settings that change them."""
    model = LexicalEncoder(CONFIG, scale=0.5, query_prompt="q: ", flops_weight=0.1)
    retriever = GenerativeRetriever(dataclasses.replace(CONFIG, lexical_head=True))
    tokens = batch["left_encoder_input_tokens"]
    queries = compiled(model, "encode_queries")(params, tokens)
    np.testing.assert_allclose(
        queries, compiled(retriever, "lexical_weights")(params, {"encoder_input_tokens": tokens}), rtol=1e-5
    )
    gains = np.asarray(model.gain(params))
    assert np.ptp(gains) > 0.5
    np.testing.assert_allclose(queries, gains * compiled(model, "encode_passages")(params, tokens), rtol=1e-5)
    opened = model_from_description(describe(model))
    assert isinstance(opened, LexicalEncoder)
    assert (
        opened.settings
        == model.settings
        == {
            "query_prompt": "q: ",
            "scale": 0.5,
            "learn_scale": False,
            "shared_towers": True,
        }
    )


def test_the_tower_of_passages_has_no_gains(batch: dict, params: dict, collection, tmp_path: Path):
    """Weights of towers that have them are read all the same; a training that begins with them says how."""
    model = LexicalEncoder(CONFIG, shared_towers=False)
    own = random_params(model)
    assert own["left_tower"]["lexical_head"].keys() == {"gain", "scale", "bias"}
    assert own["right_tower"]["lexical_head"].keys() == {"scale", "bias"}
    tokens = batch["left_encoder_input_tokens"]
    shared, towers = LexicalEncoder(CONFIG), dict.fromkeys(("left_tower", "right_tower"), params)
    for encode in ("encode_queries", "encode_passages"):
        found = getattr(model, encode)(towers, tokens)
        np.testing.assert_array_equal(found, getattr(shared, encode)(params, tokens))
    write_model_folder(tmp_path, model, towers, collection)
    opened = load_model(tmp_path).params
    assert "gain" not in opened["right_tower"]["lexical_head"]
    gains = params["lexical_head"]["gain"]
    np.testing.assert_array_equal(opened["left_tower"]["lexical_head"]["gain"], gains)
    with pytest.raises(UserError, match=r"has besides right_tower/lexical_head/gain: accept it by") as told:
        InitialCheckpoint(str(tmp_path)).arrays_for(model)
    accepted = ast.literal_eval(str(told.value).partition('unexpected_ok="')[2].rstrip('"'))
    arrays = InitialCheckpoint(str(tmp_path), unexpected_ok=accepted).arrays_for(model)
    assert "left_tower/lexical_head/gain" in arrays
    assert "right_tower/lexical_head/gain" not in arrays


def test_flops_regularisers_rise_quadratically(batch: dict, params: dict):
    """Against the formula in float64, before, within and after the steps in which the weights rise."""
    plain = LexicalEncoder(CONFIG)
    model = LexicalEncoder(CONFIG, flops_weight=0.3, passage_flops_weight=0.02, flops_steps=10)
    queries = np.asarray(
        compiled(plain, "encode_queries")(params, batch["left_encoder_input_tokens"]), np.float64
    )
    texts = batch["right_encoder_input_tokens"].reshape(B * G, -1)
    passages = np.asarray(compiled(plain, "encode_passages")(params, texts), np.float64)
    flops = [np.sum(np.mean(vectors, axis=0) ** 2) for vectors in (queries, passages)]
    without, _ = compiled(plain, "loss_fn")(params, batch, None)
    loss_fn = jax.jit(model.loss_fn)
    for step, share in ((0, 0), (5, 0.25), (10, 1), (99, 1)):
        loss, metrics = loss_fn(params, batch | {"step": np.full(B, step, np.int32)}, None)
        wanted = without + share * (0.3 * flops[0] + 0.02 * flops[1])
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-6)
    for name, value in zip(("query_flops", "passage_flops"), flops, strict=True):
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, value, rtol=1e-5)
    evaluated, _ = compiled(model, "loss_fn")(params, batch, None)
    np.testing.assert_allclose(evaluated, loss, rtol=1e-6)


def test_padding_is_left_out_of_flops(batch: dict, params: dict):
    """A missing candidate, a row without a positive and its candidates make the means no smaller."""
    model = LexicalEncoder(CONFIG, flops_weight=1.0, passage_flops_weight=1.0)
    padded = batch | {"grade": np.array([[1, -1], [1, 0], [0, 0], [1, -1]], np.int32)}
    _, metrics = compiled(model, "loss_fn")(params, padded, None)
    texts = batch["right_encoder_input_tokens"].reshape(B * G, -1)[[0, 2, 3, 6]]
    queries = compiled(model, "encode_queries")(params, batch["left_encoder_input_tokens"][[0, 1, 3]])
    passages = compiled(model, "encode_passages")(params, texts)
    for name, vectors in (("query_flops", queries), ("passage_flops", passages)):
        total, count = metrics[name]
        wanted = np.sum(np.mean(np.asarray(vectors, np.float64), axis=0) ** 2)
        np.testing.assert_allclose(total / count, wanted, rtol=1e-5)


def test_sets_are_the_vectors_of_passages(batch: dict, params: dict):
    """In-batch negatives and a teacher's margins, of scores that are summed over the sets in NumPy."""
    rng = np.random.default_rng(1)
    tokens = np.stack([rng.permutation(254)[:5] + 2 for _ in range(B * G)]).reshape(B, G, 5).astype(np.int32)
    tokens[0, 0, 3:] = 0
    impacts = rng.uniform(0.2, 1, tokens.shape).astype(np.float32)
    model = LexicalEncoder(
        CONFIG, scale=0.1, bidirectional=False, distillation=dense_margin_mse, distillation_weight=0.5
    )
    weights = 0.1 * np.asarray(
        compiled(model, "encode_queries")(params, batch["left_encoder_input_tokens"]), np.float64
    )
    for given in (impacts, None):
        known = impacts if given is not None else np.ones_like(impacts)
        scores = np.array(
            [
                [
                    sum(w[t] * i for t, i in zip(*some, strict=True) if t)
                    for some in zip(tokens.reshape(-1, 5), known.reshape(-1, 5), strict=True)
                ]
                for w in weights
            ]
        )
        # A query's negatives are all passages but its own positive.
        own = np.arange(B) * G
        positive, negative = scores[np.arange(B), own], scores[np.arange(B), own + 1]
        info_nce = np.log(np.exp(scores).sum(1)) - positive
        margins = (positive - negative) - (batch["score"][:, 0] - batch["score"][:, 1])
        sets = {"set_tokens": tokens} | ({} if given is None else {"set_impacts": given})
        loss, _ = compiled(model, "loss_fn")(params, batch | sets, None)
        np.testing.assert_allclose(loss, np.mean(info_nce + 0.5 * margins**2), rtol=1e-4)


def test_a_token_of_a_set_counts_by_its_impact():
    vectors = set_vectors(np.array([[3, 1, 0], [2, 0, 0]]), np.array([[0.5, 2.0, 9.0], [1.0, 9.0, 9.0]]), 5)
    np.testing.assert_array_equal(vectors, [[0, 2, 0, 0.5, 0], [0, 0, 1, 0, 0]])


def test_training_steps_know_their_number(batch: dict):
    """The regularisers are computed all the time, and change nothing at step 0, where their weight is 0."""
    mesh = all_devices(devices=jax.devices()[:1])
    shapes = {name: x.shape for name, x in batch.items()}
    losses = []
    for weight in (0.0, 10.0):
        model = LexicalEncoder(CONFIG, optax.sgd(0.0), passage_flops_weight=weight, flops_steps=2)
        abstract = abstract_state(model, mesh, shapes)
        state = initial_state(model, abstract, shapes, 0)
        step = make_train_step(model, mesh, abstract, 0, microbatches=2)
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[3] == losses[0] == losses[2]
    at_step_1, at_step_2 = losses[4] - losses[1], losses[5] - losses[2]
    assert at_step_1 > 0
    np.testing.assert_allclose(at_step_2, 4 * at_step_1, rtol=1e-3)
