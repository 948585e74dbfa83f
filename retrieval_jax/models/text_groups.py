"""Texts in two groups by length, so that little of what an encoder computes is padding.

In a batch of many texts one is nearly always long, and all would be padded to it. So an eighth of the texts,
the longest, are encoded at the full length, and all others at one of a few lengths that holds them. The
vectors come back in the texts' order: a loss does not depend on the groups but for rounding (and for which
dropout is drawn). Letters in shapes: N texts, S tokens, E vector size, D shards, n texts of a shard.
"""

import bisect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.data.vocabulary import PAD, round_up

LEVELS = 4  # the most lengths for texts
_LONG = 8  # one in so many texts is encoded at the full length
_EIGHTHS = (2, 3, 5)  # of the full length, for the other texts: each is about 1.6 times the last


class TextGroups(NamedTuple):
    """The lengths at which the texts of a batch are encoded: a static argument of a loss.

    Attributes:
      lengths: for each of a model's arrays of texts (`Retriever.text_arrays`), the length for all but the
        longest eighth of the texts; the full length stands for no groups.
      shards: the equal parts of a batch that lie on different devices. Each is grouped by itself, so that no
        text moves to another device.
    """

    lengths: tuple[int, ...]
    shards: int


def few_lengths(full: int) -> tuple[int, ...]:
    """Gives the lengths at which texts of at most `full` tokens are encoded: at most four, ascending.

    The last is `full`.
    """
    return tuple(sorted({*(min(round_up(full * part // 8, 8), full) for part in _EIGHTHS), full}))


def level_of(full: int, length: int) -> int:
    """Gives the lowest of LEVELS levels at which texts of so many tokens are encoded (see `length_at`)."""
    lengths = few_lengths(full)
    place = bisect.bisect_left(lengths, length)
    return place + LEVELS - len(lengths) if place else 0


def length_at(full: int, level: int) -> int:
    """Gives the length at a level for texts of at most `full` tokens; at the highest level it is `full`."""
    lengths = few_lengths(full)
    return lengths[max(level - LEVELS + len(lengths), 0)]


def long_texts(count: int) -> int:
    """Gives how many of `count` texts are encoded at the full length."""
    return -(-count // _LONG)


def needed_lengths(tokens: np.ndarray) -> np.ndarray:
    """Gives the smallest length for the texts that are not among the longest.

    Args:
      tokens: int32, … × n × S, 0 is padding.

    Returns:
      int64, one for each leading index; S where there are no texts but the longest.
    """
    *_, n, S = tokens.shape
    shorter = n - long_texts(n)
    if not shorter:
        return np.full(tokens.shape[:-2], S)
    lengths = np.max((tokens != PAD) * np.arange(1, S + 1), axis=-1)
    return np.partition(lengths, shorter - 1, axis=-1)[..., shorter - 1]


def encode_in_groups(
    encode: Callable[[jax.Array, int], jax.Array], tokens_NxS: jax.Array, length: int, shards: int
) -> jax.Array:
    """Encodes the longest texts of each shard at their full length, and the others at `length`.

    Args:
      encode: (tokens of a group M×T, the number of the group) -> vectors M×E.
      tokens_NxS: int32, 0 is padding. Shard after shard; `shards` divides N.
      length: holds all but the longest eighth of each shard (see `needed_lengths`): others would be cut. Each
        shard has several texts.
      shards: D.

    Returns:
      The vectors N×E, in the order of the texts.
    """
    N, S = tokens_NxS.shape
    k = long_texts(N // shards)
    tokens_DxnxS = tokens_NxS.reshape(shards, -1, S)
    lengths_Dxn = jnp.max(jnp.where(tokens_DxnxS != PAD, jnp.arange(1, S + 1), 0), axis=-1)
    order_Dxn = jnp.argsort(-lengths_Dxn, axis=1)
    sorted_DxnxS = jnp.take_along_axis(tokens_DxnxS, order_Dxn[..., None], axis=1)

    def encode_group(tokens_DxmxT: jax.Array, number: int) -> jax.Array:
        return encode(tokens_DxmxT.reshape(-1, tokens_DxmxT.shape[-1]), number).reshape(
            shards, tokens_DxmxT.shape[1], -1
        )

    groups = encode_group(sorted_DxnxS[:, :k], 0), encode_group(sorted_DxnxS[:, k:, :length], 1)
    back_Dxn = jnp.argsort(order_Dxn, axis=1)
    vectors_DxnxE = jnp.take_along_axis(jnp.concatenate(groups, axis=1), back_Dxn[..., None], axis=1)
    return vectors_DxnxE.reshape(N, -1)
