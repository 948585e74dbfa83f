"""How a query's candidates compare: in pairs, and as a distribution. B queries, C candidates of each."""

import jax
import jax.numpy as jnp

from retrieval_jax.models.softmax import NEG_INF


def margins(x_BxC: jax.Array) -> jax.Array:
    """Subtracts the number of each candidate (on the last axis) from that of each: B×C×C."""
    return x_BxC[:, :, None] - x_BxC[:, None, :]


def mean_of_pairs(x_BxCxC: jax.Array, pairs_BxCxC: jax.Array) -> jax.Array:
    """Averages over the pairs (bool) of each query: B, 0 where there are none."""
    total_B = jnp.sum(jnp.where(pairs_BxCxC, x_BxCxC, 0.0), axis=(1, 2))
    return total_B / jnp.maximum(jnp.sum(pairs_BxCxC, axis=(1, 2)), 1)


def divergence(
    teacher_BxC: jax.Array, scores_BxC: jax.Array, counts_BxC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes KL(softmax(teacher) ‖ softmax(scores)) over the candidates that count, in nats.

    Args:
      teacher_BxC: float32; may be NaN where a candidate does not count.
      scores_BxC: float32.
      counts_BxC: bool, which candidates count.

    Returns:
      (float32 B: the divergence of each query, 0 where fewer than two candidates count; bool B: whether two
      or more do).
    """
    log_p_BxC, log_q_BxC = (
        jax.nn.log_softmax(jnp.where(counts_BxC, x, NEG_INF), axis=1) for x in (teacher_BxC, scores_BxC)
    )
    terms_BxC = jnp.where(counts_BxC, jnp.exp(log_p_BxC) * (log_p_BxC - log_q_BxC), 0.0)
    several_B = jnp.sum(counts_BxC, axis=1) > 1
    return jnp.where(several_B, jnp.sum(terms_BxC, axis=1), 0.0), several_B
