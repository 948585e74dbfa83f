"""A small T5 with docids of its own, its random batches, and what is compared of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from model_folders import random_params
from test_t5 import jit

from retrieval_jax.models.layers import T5Config

CONFIG = T5Config(
    vocab_size=40,
    emb_dim=12,
    num_heads=2,
    head_dim=4,
    mlp_dim=10,
    num_encoder_layers=2,
    num_decoder_layers=2,
    output_size=24,
    separate_target_embedding=True,
)
PAWA = dataclasses.replace(CONFIG, pawa_layers=2)
SHAPES = {"encoder_input_tokens": (4, 9), "decoder_input_tokens": (4, 5)}


def parameters(model) -> dict:
    return random_params(model)


def random_batch(seed: int = 0, rows: int = 4) -> dict[str, np.ndarray]:
    """Inputs of 1 to 9 tokens and targets of 1 to 5."""
    rng = np.random.default_rng(seed)

    def padded(length: int, size: int) -> np.ndarray:
        lengths = rng.integers(1, length + 1, rows)
        return np.where(np.arange(length) < lengths[:, None], rng.integers(1, size, (rows, length)), 0)

    inputs, targets = padded(9, 40), padded(5, 24)
    return {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def random_groups(seed: int = 0, rows: int = 4, candidates: int = 5) -> dict[str, np.ndarray]:
    """`rows` inputs, each with up to `candidates` targets of 1 to 5 tokens, of few tokens, positives first.

    Some targets are equal, and many begin alike. The teacher's score of a target's first n tokens is
    score[..., n - 1]; some are unknown.
    """
    rng = np.random.default_rng(seed)
    many = random_batch(seed, rows * candidates)
    count = rng.integers(2, candidates + 1, rows)
    count[0], good = candidates, rng.integers(1, 3, rows)
    there = np.arange(candidates) < count[:, None]
    lengths = (many["decoder_target_tokens"] > 0).sum(-1).reshape(rows, candidates) * there
    drawn = rng.integers(1, 4, (rows, candidates, 5))
    drawn[:, -1] = drawn[:, 0]
    targets = np.where(np.arange(5) < lengths[..., None], drawn, 0).astype(np.int32)
    score = rng.normal(size=(rows, candidates, 5)).astype(np.float32)
    score[~there | (rng.random(there.shape) < 0.15)] = np.nan
    return {
        "encoder_input_tokens": many["encoder_input_tokens"][:rows],
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1],
        "decoder_loss_weights": (targets > 0).astype(np.int32),
        "grade": np.where(there, np.arange(candidates) < good[:, None], -1).astype(np.int32),
        "score": score,
    }


def stacked(params: dict) -> dict:
    """The parameters of a scanned T5, of those of one that is not."""
    flat, layers = {}, {}
    for (stack, *rest), x in flatten_dict(params).items():
        if rest and rest[0].startswith("layers_"):
            inner = "encoder" if stack == "encoder" else "decoder"
            layers.setdefault((stack, inner, *rest[1:]), {})[int(rest[0].removeprefix("layers_"))] = x
        else:
            flat[stack, *rest] = x
    flat |= {k: jnp.stack([xs[i] for i in range(len(xs))]) for k, xs in layers.items()}
    return unflatten_dict(flat)


def close(a: object, b: object, atol: float = 1e-5) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4)


def loss_and_gradients(model, params: dict, batch: dict, key=None) -> tuple:
    return jit(jax.value_and_grad(lambda p: model.loss_fn(p, batch, key)[0]))(params)


def loss_and_metrics(model, params: dict, batch: dict, key=None) -> tuple:
    return jit(model.loss_fn)(params, batch, key)
