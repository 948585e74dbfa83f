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
    queries_BxE: jax.Array,
    passages_MxE: jax.Array,
    passage_BxG: jax.Array,
    grade_BxG: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Bidirectional in-batch softmax of GTR (Ni et al. 2021, section 3.1), with hard negatives.

    Row b's positive is its first candidate. Every other candidate of the batch (M = B·G, in rows of G) is its
    negative, except padding (passage < 0) and what is known to answer it: the same passage again, and its
    other positives. The other direction, from a positive to its query, has no hard negatives. Gives (the sum
    over the rows of both directions' negative log-likelihoods, in nats; rows whose positive scores highest).
    """
    B, G = passage_BxG.shape
    logits_BxM = scale * jnp.einsum("be,me->bm", queries_BxE, passages_MxE).astype(jnp.float32)
    passage_M = passage_BxG.reshape(-1)
    known_BxG = jnp.where(grade_BxG > 0, passage_BxG, -1)
    answers_BxM = jnp.any(known_BxG[:, :, None] == passage_M, axis=1)
    own_BxM = jnp.arange(B * G) == G * jnp.arange(B)[:, None]
    logits_BxM = jnp.where((answers_BxM | (passage_M < 0)) & ~own_BxM, -jnp.inf, logits_BxM)
    logits_BxB = logits_BxM[:, ::G]
    positive_B = jnp.diagonal(logits_BxB)
    to_passage = jax.nn.logsumexp(logits_BxM, axis=1) - positive_B
    to_query = jax.nn.logsumexp(logits_BxB, axis=0) - positive_B
    return jnp.sum(to_passage + to_query), jnp.sum(positive_B >= jnp.max(logits_BxM, axis=1))
