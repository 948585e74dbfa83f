"""Top-k sampling of texts from a decoder, with a key for each row, so that a row's samples are its own.

Letters in shapes: B rows, N samples of each, V tokens of the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from retrieval_jax.data.vocabulary import EOS

SampleStep = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""The decoder: (newest tokens B×N int32, their position (traced), cache) -> (float32 logits B×N×V of the next
tokens, the cache with the newest tokens)."""


def sample_top_k(
    step: SampleStep, cache: Any, keys_B: jax.Array, count: int, length: int, temperature: float, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """Samples sequences of tokens for each of B rows.

    Each token is drawn from the softmax of logits / temperature over the `top_k` most probable tokens (Fan et
    al. 2018, section 5.2). The samples of a row depend on the row's key and logits alone, not on other rows.
    One step is compiled, not `length` of them, and the loop ends when all samples have ended.

    Args:
      step: the decoder, which reads one token of each sample; see `SampleStep`.
      cache: what the first step is given: any pytree of arrays whose shapes stay.
      keys_B: typed PRNG keys, one a row.
      count: N, how many samples a row.
      length: how many tokens a sample has at most.
      temperature: divides the logits.
      top_k: among how many tokens is drawn.

    Returns:
      (tokens B×N×length int32: each sample ends with EOS and is padded with 0, or is cut off at `length`;
      log-probabilities B×N of the samples under the model's full softmax, float32).
    """
    shape = (keys_B.shape[0], count)
    keys_at = jax.vmap(jax.random.fold_in, (0, None))
    draw = jax.vmap(jax.random.categorical)

    def is_unfinished(state) -> jax.Array:
        position, _, _, _, _, ended = state
        return (position < length) & ~jnp.all(ended)

    def advance(state):
        position, tokens, cache, written, scores, ended = state
        logits_BxNxV, cache = step(tokens, position, cache)
        best_BxNxk, token_of = jax.lax.top_k(logits_BxNxV, top_k)
        nth = draw(keys_at(keys_B, position), best_BxNxk / temperature)[..., None]
        log_prob = jnp.take_along_axis(best_BxNxk, nth, axis=-1)[..., 0]
        log_prob -= jax.nn.logsumexp(logits_BxNxV, axis=-1)
        tokens = jnp.where(ended, 0, jnp.take_along_axis(token_of, nth, axis=-1)[..., 0])
        scores += jnp.where(ended, 0.0, log_prob)
        ended |= tokens == EOS
        return position + 1, tokens, cache, written.at[..., position].set(tokens), scores, ended

    start = jnp.zeros(shape, jnp.int32)  # T5 starts its targets with the padding token
    written = jnp.zeros((*shape, length), jnp.int32)
    nothing = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    _, _, _, written, scores, _ = jax.lax.while_loop(
        is_unfinished, advance, (jnp.int32(0), start, cache, written, *nothing)
    )
    return written, scores
