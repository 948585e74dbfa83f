"""Search with atomic docids: one decoding step, then the docids of highest log-probability."""

import jax
import jax.numpy as jnp


def top_docids(logits_BxV: jax.Array, docids: jax.Array | int, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most probable docid rows B×k and their log-probabilities, best first.

    Token 0 is padding and token r + 1 names row r; tokens above `docids` only pad the softmax, so they take
    part in its normalisation (as in training) and cannot be found.
    """
    log_probs = jax.nn.log_softmax(logits_BxV)
    token = jnp.arange(logits_BxV.shape[-1])
    real = (token > 0) & (token <= docids)
    scores, tokens = jax.lax.top_k(jnp.where(real, log_probs, -jnp.inf), k)
    return tokens - 1, scores
