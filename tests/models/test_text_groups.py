"""Texts in two groups by length: the lengths, and that every text gets its own vector, whole."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.models.text_groups import encode_in_groups, few_lengths, long_texts, needed_lengths


def texts(seed: int, rows: int, length: int) -> np.ndarray:
    """Int32 rows × length: texts of 0 to `length` tokens, most of them short. One has a 0 within it."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.3, rows) - 1, length)
    tokens = np.where(np.arange(length) < lengths[:, None], rng.integers(1, 100, (rows, length)), 0)
    tokens[0, -1:], tokens[0, :1] = 7, 0
    return tokens.astype(np.int32)


def test_the_lengths_are_few():
    assert few_lengths(96) == (24, 40, 64, 96)
    assert few_lengths(256) == (64, 96, 160, 256)
    assert few_lengths(32) == (8, 16, 24, 32)
    assert few_lengths(5) == (5,)
    for full in range(1, 600):
        lengths = few_lengths(full)
        assert len(lengths) <= 4
        assert lengths[-1] == full
        assert lengths == tuple(sorted(set(lengths)))


@settings(max_examples=10, deadline=None)  # each compiles
@given(seed=st.integers(0, 999), shards=st.integers(1, 4), rows=st.integers(2, 20), full=st.integers(1, 24))
def test_groups_give_every_text_the_vector_that_it_has_alone(seed, shards, rows, full):
    tokens_NxS = texts(seed, shards * rows, full)
    needed_D = needed_lengths(tokens_NxS.reshape(shards, rows, full))
    for shard, needed in enumerate(needed_D):
        own = [
            1 + int(np.flatnonzero(text)[-1]) if text.any() else 0
            for text in tokens_NxS[shard * rows :][:rows]
        ]
        shorter = sorted(own)[: rows - long_texts(rows)]
        assert needed == (shorter[-1] if shorter else full)
        assert len(shorter) <= 7 * rows / 8
    length, shapes = max(int(needed_D.max()), 1), []

    def encode(tokens_MxT, number):  # depends on each token and its place
        shapes.append(tokens_MxT.shape)
        places = jnp.arange(1, tokens_MxT.shape[1] + 1)
        return jnp.stack([jnp.sum(tokens_MxT * places, 1), jnp.sum(tokens_MxT**2, 1)], axis=1)

    grouped = encode_in_groups(encode, jnp.asarray(tokens_NxS), length, shards)
    count = shards * long_texts(rows)
    assert shapes == [(count, full), (len(tokens_NxS) - count, length)]
    np.testing.assert_array_equal(grouped, encode(jnp.asarray(tokens_NxS), 0))
