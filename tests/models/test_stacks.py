"""Scanned and recomputed layers are the layers that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import initial_params
from small_t5 import (
    CONFIG,
    PAWA,
    SHAPES,
    close,
    loss_and_gradients,
    parameters,
    random_batch,
    stacked,
)
from test_t5 import jit

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.stacks import is_stacked, unstack_layers


@pytest.mark.parametrize("config", [CONFIG, PAWA], ids=["plain", "pawa"])
def test_a_scanned_network_is_the_same(config):
    plain = GenerativeRetriever(config)
    scanned = GenerativeRetriever(dataclasses.replace(config, scan_layers=True))
    params, batch = parameters(plain), random_batch()
    shapes = jax.tree.map(jnp.shape, parameters(scanned))
    assert shapes == jax.tree.map(jnp.shape, stacked(params))
    assert shapes["encoder"]["encoder"]["attention"]["key"]["kernel"] == (2, 12, 8)
    boxed = jax.eval_shape(lambda: scanned.get_initial_variables(jax.random.key(0), SHAPES))["params"]
    assert boxed["decoder"]["decoder"]["mlp"]["wo"]["kernel"].names == ("layers", "mlp", "embed")
    close(unstack_layers(stacked(params)), params, 0)
    loss, gradients = loss_and_gradients(plain, params, batch)
    scanned_loss, scanned_gradients = loss_and_gradients(scanned, stacked(params), batch)
    np.testing.assert_allclose(scanned_loss, loss, rtol=1e-5)
    close(scanned_gradients, stacked(gradients))
    assert is_stacked(("encoder", "encoder", "mlp", "wo", "kernel"))
    assert not is_stacked(("encoder", "encoder_norm", "scale"))


def test_a_scanned_layer_begins_as_one_that_is_not():
    """Each layer's parameters are drawn anew, and as wide as those of a layer of its own."""
    config = dataclasses.replace(CONFIG, emb_dim=64, num_encoder_layers=4, scan_layers=True)
    kernel = initial_params(GenerativeRetriever(config))["encoder"]["encoder"]["mlp"]["wi_0"]["kernel"]
    for i in range(4):
        assert np.std(kernel[i]) == pytest.approx(64**-0.5, rel=0.2)
        assert i == 0 or np.abs(kernel[i] - kernel[0]).max() > 0.01


@pytest.mark.parametrize(("scan", "remat"), [(False, "full"), (True, "dots"), (True, "full")])
def test_what_is_computed_again_is_the_same(scan: bool, remat: str):
    batch, results = random_batch(), []
    for policy in ("none", remat):
        model = GenerativeRetriever(dataclasses.replace(CONFIG, scan_layers=scan, remat=policy))
        results.append(loss_and_gradients(model, parameters(model), batch, jax.random.key(1)))
    close(*results)
    with pytest.raises(UserError, match=r"T5Config.remat: no policy 'fully': none, dots, full"):
        dataclasses.replace(CONFIG, remat="fully")


def test_a_scanned_dual_encoder_is_the_same():
    scanned = DualEncoder(dataclasses.replace(CONFIG, scan_layers=True, remat="full"), vector_dim=6)
    plain = DualEncoder(CONFIG, vector_dim=6)
    tokens = random_batch()["encoder_input_tokens"]
    params = parameters(plain)
    close(jit(scanned.encode_queries)(stacked(params), tokens), jit(plain.encode_queries)(params, tokens))
