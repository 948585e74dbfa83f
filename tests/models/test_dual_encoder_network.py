"""The network of a dual encoder: the mean, and the decoder's first state; losses: test_dual_encoder.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import compiled, flat, random_params

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config

CONFIG = T5Config(64, 16, 2, 8, 32, 2, 2)


def texts(length: int = 7) -> np.ndarray:
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 64, (4, 7))
    tokens[1, 3:] = 0
    return np.pad(tokens, ((0, 0), (0, length - 7))).astype(np.int32)


@pytest.mark.parametrize("tied", [False, True])
def test_the_decoders_state_is_what_a_softmax_reads_first(tied: bool):
    """Of the same parameters as a generative retriever's, whose parameters but the softmax they are."""
    config = dataclasses.replace(CONFIG, logits_via_embedding=tied)
    generative = GenerativeRetriever(dataclasses.replace(config, output_size=9))  # reads token 0 as texts do
    dense = DualEncoder(config, pooling="decoder", normalize=False)
    params = random_params(generative)
    del params["decoder"]["logits_dense"]
    assert flat(random_params(dense)).keys() == flat(params).keys()
    assert dense.settings["vector_dim"] == 16
    vectors = compiled(dense, "encode_passages")(params, texts())
    np.testing.assert_allclose(
        vectors, compiled(generative, "first_states")(params, texts()), rtol=1e-5, atol=1e-6
    )
    assert np.ptp(np.linalg.norm(vectors, axis=1)) > 1e-2


@pytest.mark.parametrize("pooling", ["mean", "decoder"])
def test_padding_changes_nothing_and_vectors_are_float32(pooling: str):
    model = DualEncoder(dataclasses.replace(CONFIG, dtype="bfloat16"), pooling=pooling, vector_dim=6)
    params = random_params(model)
    assert params["projection_layer"]["kernel"].shape == (16, 6)
    vectors, padded = (compiled(model, "encode_queries")(params, texts(length)) for length in (7, 12))
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(vectors, padded, atol=2e-2)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    exactly = DualEncoder(CONFIG, pooling=pooling, vector_dim=6)
    exact = compiled(exactly, "encode_queries")(params, texts())
    np.testing.assert_allclose(vectors, exact, atol=5e-2)
    # A text of nothing but padding fills up a batch, and has a gradient all the same.
    of_nothing = jax.grad(lambda p: jnp.sum(model.encode_queries(p, np.zeros((2, 7), np.int32))))
    empty = jax.jit(of_nothing)(params)
    assert all(np.isfinite(x).all() for x in flat(empty).values())


def test_unknown_pooling_is_refused():
    assert DualEncoder(CONFIG).settings["vector_dim"] == 768
    with pytest.raises(UserError, match=r"DualEncoder.pooling: no 'lexical': choose 'mean' or 'decoder'"):
        DualEncoder(CONFIG, pooling="lexical")
    with pytest.raises(UserError, match=r"DualEncoder.pooling: no 'max': choose 'mean' or 'decoder'"):
        DualEncoder(CONFIG, pooling="max")
    with pytest.raises(UserError, match=r"'decoder' needs a decoder: set T5Config.num_decoder_layers"):
        DualEncoder(dataclasses.replace(CONFIG, num_decoder_layers=0), pooling="decoder")
