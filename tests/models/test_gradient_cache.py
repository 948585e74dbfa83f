"""Gradient caching, also of texts in groups by length: the gradients are those of all texts at once."""

import jax
import jax.numpy as jnp
import pytest
from test_dual_encoder import (
    OBJECTIVES,
    close,
    network,
    parameters,
    random_batch,
    value_and_gradients,
    with_short_texts,
)

from retrieval_jax.core.errors import UserError
from retrieval_jax.models import gradient_cache
from retrieval_jax.models.contrastive import joint_lh
from retrieval_jax.models.text_groups import TextGroups


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_caching_gives_the_same_gradients(name: str):
    """Without layers, for the time that compiling takes; the tests below have them."""
    batch, plain = random_batch(), network(objective=OBJECTIVES[name], layers=0)
    params = parameters(plain)
    key = jax.random.key(3) if name == "rand1" else None  # the same draw
    chunked = network(objective=OBJECTIVES[name], layers=0, gradcache_chunk_size=2, max_logits_per_block=16)
    close(*(value_and_gradients(model, params, batch, key) for model in (chunked, plain)))


@pytest.mark.parametrize(("chunk_size", "pooling"), [(None, "mean"), (8, "mean"), (8, "decoder")])
def test_texts_in_groups_by_length_give_the_same_gradients(chunk_size: int | None, pooling: str):
    batch, plain = with_short_texts(random_batch(B=16)), network(objective=joint_lh, pooling=pooling)
    params = parameters(plain)
    model = network(objective=joint_lh, pooling=pooling, gradcache_chunk_size=chunk_size)
    groups = TextGroups((2, 3), 2)
    assert plain.eval_fn(params, batch)[0] != plain.eval_fn(params, random_batch(B=16))[0]
    close(value_and_gradients(model, params, batch, groups=groups), value_and_gradients(plain, params, batch))
    # Longer texts than the lengths hold would be cut.
    cut = value_and_gradients(model, params, random_batch(B=16), groups=groups)
    assert abs(cut[0] - value_and_gradients(plain, params, random_batch(B=16))[0]) > 1e-4


@pytest.mark.parametrize("chunk_size", [5, 1])
def test_groups_that_no_chunk_size_divides_are_filled_up(chunk_size: int, monkeypatch):
    """Of 11 queries 2 are long and 9 short, of their 44 passages 6 and 38: 19 and 2 are prime."""
    batch = {name: x[:11] for name, x in with_short_texts(random_batch(B=16)).items()}
    plain = network(objective=joint_lh)
    params, chunks = parameters(plain), []
    model, in_chunks = network(objective=joint_lh, gradcache_chunk_size=chunk_size), gradient_cache._in_chunks

    def recorded(encode, tokens, rng, count):
        chunks.append((len(tokens), count))
        return in_chunks(encode, tokens, rng, count)

    monkeypatch.setattr(gradient_cache, "_in_chunks", recorded)
    got = value_and_gradients(model, params, batch, groups=TextGroups((2, 3), 1))
    sizes = {5: [(2, 1), (10, 2), (6, 2), (40, 8)], 1: [(2, 2), (9, 9), (6, 6), (38, 38)]}
    assert chunks[:4] == sizes[chunk_size]
    close(got, value_and_gradients(plain, params, batch))


def test_gradient_caching_draws_the_same_dropout_in_both_passes(monkeypatch):
    """As chunks encoded one by one, each with its own key, by plain differentiation."""
    model, plain = network(0.3, gradcache_chunk_size=4), network(0.3)
    params, batch, key = parameters(model), random_batch(G=2), jax.random.key(5)

    def one_by_one(encode, tokens, rng, count):
        assert count == 1  # of a model without chunks
        count = len(tokens) // 4
        parts = [encode(tokens[i::count], jax.random.fold_in(rng, i)) for i in range(count)]
        return jnp.stack(parts, axis=1).reshape(len(tokens), -1)

    got = value_and_gradients(model, params, batch, key)
    assert abs(got[0] - value_and_gradients(model, params, batch)[0]) > 1e-3  # dropout does something
    monkeypatch.setattr(gradient_cache, "_in_chunks", one_by_one)
    close(got, value_and_gradients(plain, params, batch, key))


def test_chunks_must_divide_the_batch():
    with pytest.raises(UserError, match=r"gradcache_chunk_size: 3 does not cut 8 texts into equal parts"):
        network(gradcache_chunk_size=3).eval_fn(parameters(network()), random_batch())
