"""Gradient caching: a batch's texts are encoded in chunks, to save memory (Gao et al. 2021, section 3.2).

When the gradient with respect to all vectors is known, each chunk is encoded again, with the same dropout,
for its part of the gradient. Letters in shapes: N texts, S tokens, E vector size; D, m, M, T: see
text_groups.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.text_groups import encode_in_groups

Encode = Callable[[jax.Array, jax.Array | None], jax.Array]
"""(int32 tokens B×S, the key for dropout or None) -> vectors B×E."""


def encode_texts(
    encode: Encode,
    tokens_NxS: jax.Array,
    rng: jax.Array | None,
    chunk_size: int | None,
    *,
    length: int | None = None,
    shards: int = 1,
) -> jax.Array:
    """Encodes texts; the activations of one chunk are in memory at a time.

    Args:
      encode: the encoder.
      tokens_NxS: int32, 0 is padding.
      rng: the key for dropout; None for no dropout.
      chunk_size: about how many texts are encoded at a time; None: all at once.
      length: the length at which all but the longest texts are encoded (see `encode_in_groups`); None: S.
      shards: see there.

    Returns:
      The vectors N×E, in the order of the texts.

    Raises:
      UserError: the chunks do not divide the texts, where these are not in groups.
    """
    N, S = tokens_NxS.shape
    if length is None or length == S:
        count = _chunks(N, chunk_size)
        if N % count:
            raise UserError(
                f"gradcache_chunk_size: {chunk_size} does not cut {N} texts into equal parts: "
                "choose a divisor of the batch"
            )
        return _in_chunks(encode, tokens_NxS, rng, count)

    def encode_group(tokens_MxT: jax.Array, number: int) -> jax.Array:
        key = None if rng is None else jax.random.fold_in(rng, number)
        M, T = tokens_MxT.shape
        # Each shard of a group is filled up with empty texts, so that its chunks are of equal size.
        m = M // shards
        count = min(_chunks(M, chunk_size), m)
        missing = -m % count
        filled_DxmxT = jnp.pad(tokens_MxT.reshape(shards, m, T), ((0, 0), (0, missing), (0, 0)))
        vectors = _in_chunks(encode, filled_DxmxT.reshape(-1, T), key, count)
        return vectors.reshape(shards, m + missing, -1)[:, :m].reshape(M, -1)

    return encode_in_groups(encode_group, tokens_NxS, length, shards)


def _chunks(texts: int, chunk_size: int | None) -> int:
    """Gives the number of chunks in which so many texts are encoded."""
    return -(-texts // (chunk_size or texts))


def _in_chunks(encode: Encode, tokens_NxS: jax.Array, rng: jax.Array | None, count: int) -> jax.Array:
    """Encodes texts in `count` chunks, which divides N.

    Chunk i takes texts i, i + count, …, so that each device keeps its own texts.
    """
    if count == 1:
        return encode(tokens_NxS, rng)

    def encode_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        tokens_CxS, number = chunk
        return encode(tokens_CxS, None if rng is None else jax.random.fold_in(rng, number))

    chunks = jnp.moveaxis(tokens_NxS.reshape(-1, count, tokens_NxS.shape[1]), 1, 0)
    encode_chunk = jax.checkpoint(encode_chunk, prevent_cse=False)
    vectors = jax.lax.map(encode_chunk, (chunks, np.arange(count, dtype=np.uint32)))
    return jnp.moveaxis(vectors, 0, 1).reshape(len(tokens_NxS), -1)
