"""Layers against their definitions, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.layers import Attention, RMSNorm, T5Config, relpos_bucket

CONFIG = T5Config(40, 6, 2, 4, 10, 1, 1, dropout_rate=0.0)  # E 6, H 2, D 4
B, S = 3, 5


def attend(params: dict, x_BxTxE, keys_BxSxE, mask_BxTxS, bias_HxTxS) -> np.ndarray:
    """Multi-head attention, one head of one row at a time."""
    heads = {name: params[name]["kernel"].reshape(6, 2, 4) for name in ("query", "key", "value")}
    out = np.zeros((*x_BxTxE.shape[:2], 2, 4))
    for b in range(len(x_BxTxE)):
        for h in range(2):
            query, key, value = (
                side[b] @ np.asarray(heads[name][:, h], np.float64)
                for name, side in (("query", x_BxTxE), ("key", keys_BxSxE), ("value", keys_BxSxE))
            )
            logits = np.where(mask_BxTxS[b], query @ key.T + bias_HxTxS[h], -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ value
    return out.reshape(*out.shape[:2], 8) @ np.asarray(params["out"]["kernel"], np.float64)


def test_attention_and_its_decode_step_equal_the_definition():
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(B, S, 6)), rng.normal(size=(2, S, S))
    mask = np.tril(np.ones((S, S), bool)) & (rng.random((B, 1, S)) > 0.3) | np.eye(S, dtype=bool)
    module = Attention(CONFIG)
    x32, bias32 = jnp.float32(x), jnp.float32(bias)

    def whole(module):
        return module(x32, module.keys_values(x32), mask, True, bias32)

    variables = module.init(jax.random.key(0), method=whole)
    params = variables["params"]
    params = {name: {"kernel": x["kernel"].value} for name, x in params.items()}
    expected = attend(params, x, x, mask, bias)
    np.testing.assert_allclose(module.apply({"params": params}, method=whole), expected, atol=1e-5)

    def last(module):
        """The last position of each row as the newest token of a beam."""
        cache = tuple(jnp.moveaxis(kv, 1, 2)[:, None] for kv in module.keys_values(x32))
        return module.decode_self_attention(x32[:, -1:], cache, bias32[:, -1])

    expected = attend(params, x, x, np.ones((B, S, S), bool), bias)[:, -1:]
    np.testing.assert_allclose(module.apply({"params": params}, method=last), expected, atol=1e-5)


def test_rms_norm_equals_its_definition():
    x, scale = np.random.default_rng(0).normal(size=(2, 3, 6)), np.arange(6.0)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    found = RMSNorm().apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match=r"T5Config.mlp_activations: no 'swish': gelu, relu, linear"):
        T5Config(40, 6, 2, 4, 10, 1, 1, mlp_activations=("swish",))


def slow_bucket(distance: int, bidirectional: bool) -> int:
    """The bucket of one distance from the definition, in whole numbers so that no edge is rounded.

    Of n buckets for a direction, n/2 hold one distance each; the k-th after these starts where
    distance / (n/2) reaches (128 / (n/2)) ** (k / (n/2)), and the last has no end.
    """
    n, offset = 32, 0
    if bidirectional:
        n = 16
        offset = n if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    half = n // 2
    if distance < half:
        return offset + distance
    k = 0
    while k + 1 < half and distance**half * half ** (k + 1) >= 128 ** (k + 1) * half**half:
        k += 1
    return offset + half + k


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relpos_bucket(bidirectional):
    distances = np.arange(-300, 301)
    expected = [slow_bucket(int(d), bidirectional) for d in distances]
    np.testing.assert_array_equal(relpos_bucket(distances, bidirectional), expected)
