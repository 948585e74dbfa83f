"""Training objectives: pure functions of arrays, in float32."""

import jax
import jax.numpy as jnp


def token_cross_entropy(
    logits_BxTxV: jax.Array, targets_BxT: jax.Array, weights_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums over the weighted positions: (negative log-likelihood in nats, tokens whose argmax is right)."""
    weights = weights_BxT.astype(jnp.float32)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits_BxTxV), targets_BxT[..., None], axis=-1)[..., 0]
    right = jnp.argmax(logits_BxTxV, axis=-1) == targets_BxT
    return jnp.sum(nll * weights), jnp.sum(right * weights)


def in_batch_softmax(
    queries_BxE: jax.Array, passages_BxE: jax.Array, passage_B: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Bidirectional in-batch softmax of GTR (Ni et al. 2021, section 3.1).

    Row i's passage is its positive; the other rows' passages are its negatives, except those that are the
    same passage (equal numbers in `passage_B`), which are left out. Gives (the sum over the rows of both
    directions' negative log-likelihoods, in nats; rows whose positive scores highest).
    """
    B = queries_BxE.shape[0]
    logits_BxB = scale * jnp.einsum("be,ce->bc", queries_BxE, passages_BxE).astype(jnp.float32)
    same_BxB = (passage_B[:, None] == passage_B[None, :]) & ~jnp.eye(B, dtype=bool)
    logits_BxB = jnp.where(same_BxB, -jnp.inf, logits_BxB)
    positive_B = jnp.diagonal(logits_BxB)
    to_passage = jax.nn.logsumexp(logits_BxB, axis=1) - positive_B
    to_query = jax.nn.logsumexp(logits_BxB, axis=0) - positive_B
    return jnp.sum(to_passage + to_query), jnp.sum(positive_B >= jnp.max(logits_BxB, axis=1))
