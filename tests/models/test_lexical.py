"""The lexical head against SPLADE's formula in NumPy, and what it gives from random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import compiled, initial_params, random_params

from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.lexical import POSITIONS, max_products
from retrieval_jax.models.t5 import T5

CONFIG = T5Config(384, 256, 2, 8, 32, 1, 1, branch_init_scale=1e-3, embedding_init_std=0.05)
LEXICAL = dataclasses.replace(CONFIG, lexical_head=True)
S = 2 * POSITIONS + 5  # the last block is not full


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(2, 384, (3, S)).astype(np.int32)
    tokens[1, 4:], tokens[0, -1], tokens[1, 3] = 0, 1, 1
    tokens[:, 1] = 2  # unknown
    return tokens


@pytest.fixture(scope="module")
def params() -> dict:
    """Parameters with gains, as training gives them."""
    made = random_params(GenerativeRetriever(LEXICAL))
    assert made["lexical_head"]["gain"].shape == (384,)
    made["lexical_head"]["gain"] = jnp.asarray(np.random.default_rng(1).uniform(1, 9, 384), jnp.float32)
    return made


def test_weights_are_splades(texts: np.ndarray, params: dict):
    """SPLADE v2, equations 1 and 6, in float64, of the encoder's states."""
    gain = params["lexical_head"]["gain"].at[7].set(-1)
    params = params | {"lexical_head": params["lexical_head"] | {"bias": jnp.float32(0.3), "gain": gain}}
    states = jax.jit(lambda params: T5(CONFIG).apply({"params": params}, texts, method="encode"))(params)
    logits = np.asarray(states, np.float64) @ np.asarray(params["token_embedder"]["embedding"], np.float64).T
    head = {name: np.asarray(x, np.float64) for name, x in params["lexical_head"].items()}
    logits = head["scale"] * logits / (0.05 * 256) + head["bias"]
    every_position = np.where(texts[..., None] > 0, np.log(1 + np.maximum(logits, 0)), 0)
    wanted = head["gain"] * every_position.max(1)
    assert (every_position.max(1)[:, 7] > 0).any()
    wanted[:, [0, 1, 2, 7]] = 0  # not text, and a gain below 0
    got = GenerativeRetriever(LEXICAL).lexical_weights(params, {"encoder_input_tokens": texts})
    assert got.dtype == jnp.float32
    assert 0.2 < (wanted > 0).mean() < 1
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "tolerance"), [(0, 0.2), (1, 0.4)])
def test_random_weights_give_the_gain_of_a_texts_own_tokens_alone(
    texts: np.ndarray, params: dict, layers: int, tolerance: float
):
    """Before the first training step, with as many positions as the head reads in several blocks."""
    model = GenerativeRetriever(dataclasses.replace(LEXICAL, num_encoder_layers=layers))
    begun = initial_params(model)
    begun["lexical_head"]["gain"] = params["lexical_head"]["gain"]
    got = np.asarray(compiled(model, "lexical_weights")(begun, {"encoder_input_tokens": texts}))
    is_own = np.zeros((3, 384), bool)
    for row, text in zip(is_own, texts, strict=True):
        row[text] = True
    is_own[:, :3] = False
    assert (got[~is_own] == 0).all()
    gains = np.broadcast_to(params["lexical_head"]["gain"], is_own.shape)
    np.testing.assert_allclose(got[is_own], gains[is_own], rtol=tolerance)
    padded = np.pad(texts, ((0, 0), (0, 40)))
    np.testing.assert_allclose(
        compiled(model, "lexical_weights")(begun, {"encoder_input_tokens": padded}), got, rtol=1e-4, atol=1e-5
    )


def test_gradient_of_the_largest_products(texts: np.ndarray):
    """That of the formula with all products in memory; no position of the last text counts."""
    rng = np.random.default_rng(2)
    x, table, weights = (rng.normal(size=size).astype(np.float32) for size in ((3, S, 8), (50, 8), (3, 50)))
    real = texts != 0
    real[2] = False

    def simple(x, table):
        products = jnp.where(real[..., None], jnp.einsum("bse,ve->bsv", x, table), -1e30)
        return jnp.sum(weights * jnp.maximum(products.max(1), 0.5))

    def blockwise(x, table):
        return jnp.sum(weights * jnp.maximum(max_products(x, table, real), 0.5))

    wanted, got = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, table) for f in (simple, blockwise))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)
    assert np.abs(got[1][0]).sum() > 0
