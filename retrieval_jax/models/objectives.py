"""Objectives of models that write tokens, in float32. Those of dual encoders are in contrastive.py."""

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.models.softmax import SoftmaxStats


def cross_entropy(
    softmax: SoftmaxStats,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    outputs: int | None = None,
    sum_of_logits: jax.Array | None = None,
) -> jax.Array:
    """Each token's negative log-likelihood in nats, with T5X's label smoothing and z-loss.

    Args:
      softmax: of the tokens.
      z_loss: times log_z², which keeps log_z near 0 (Shazeer et al. 2018, and T5 1.1's training: 1e-4).
      label_smoothing: s; the target's probability is to be 1 - s, each other output's s / (outputs - 1). The
        entropy of these is subtracted, so that the least loss is 0 (Szegedy et al. 2016, section 7).
      outputs, sum_of_logits: of the softmax, and each token's; needed for label smoothing only.
    """
    loss = softmax.log_z - softmax.target
    if label_smoothing:
        sure, other = 1.0 - label_smoothing, label_smoothing / (outputs - 1)
        loss = softmax.log_z - (sure - other) * softmax.target - other * sum_of_logits
        loss += sure * np.log(sure) + (outputs - 1) * other * np.log(other)
    return loss + z_loss * jnp.square(softmax.log_z)


def symmetric_kl(logits_a: jax.Array, logits_b: jax.Array) -> jax.Array:
    """½ [KL(a‖b) + KL(b‖a)] in nats, over the last axis of float32 logits (R-Drop, Liang et al. 2021, eq. 2).

    It equals ½ Σ (p_a - p_b) (log p_a - log p_b), whose terms are all finite and none negative, where
    p log(p / q) of probabilities divides by what has become 0.
    """
    log_a, log_b = jax.nn.log_softmax(logits_a), jax.nn.log_softmax(logits_b)
    return 0.5 * jnp.sum((jnp.exp(log_a) - jnp.exp(log_b)) * (log_a - log_b), axis=-1)
