"""A dual encoder's objectives: one query, several positives, any number of negatives.

Wang et al. 2026, "Training Dense Retrievers with Multiple Positive Passages", section 3. Notation: s are the
scores (dot products over the temperature), P a query's own positives, m of them, N its negatives, LSE the
log-sum-exp. Each objective is given the scores of a query's own candidates, which of them are positives, and
LSE_N (see negatives.py), and computes the query's loss in nats, which is 0 without a positive. With one
positive all of them are InfoNCE: LSE(s of the positive, s of N) - s of the positive.

With `positives_compete` a query's other positives compete with each positive, as its negatives do:
LSE_N∪P∖i takes the place of LSE_N. The paper's code does so for JointLH and SumMargLH, and not for LSEPair
and Rand1LH. Letters in shapes: B queries, G candidates of a query.
"""

from typing import Protocol

import gin
import jax
import jax.numpy as jnp

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.negatives import NEG_INF


class Objective(Protocol):
    """Computes the losses B of queries, float32, in nats.

    Args:
      scores_BxG: float32, the scores of each query's own candidates.
      positive_BxG: bool, which of them are its positives.
      negatives_B: float32, LSE_N.
      rng: the key for what is drawn; None gives the expectation.
    """

    def __call__(
        self,
        scores_BxG: jax.Array,
        positive_BxG: jax.Array,
        negatives_B: jax.Array,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the losses."""
        ...


@gin.configurable(allowlist=["mean", "positives_compete"])
def joint_lh(
    scores_BxG: jax.Array,
    positive_BxG: jax.Array,
    negatives_B: jax.Array,
    rng: jax.Array | None = None,
    *,
    mean: bool = True,
    positives_compete: bool = True,
) -> jax.Array:
    """Computes JointLH: Σ_P (LSE_P∪N - s_i), or its mean over P.

    It is least where every positive has probability 1/m.

    Args:
      scores_BxG: see `Objective`.
      positive_BxG: see `Objective`.
      negatives_B: see `Objective`.
      rng: not used.
      mean: whether the sum is divided by m.
      positives_compete: whether the query's other positives compete with a positive.
    """
    margins_BxG = _margins(scores_BxG, positive_BxG, negatives_B, positives_compete)
    total_B = jnp.sum(jax.nn.softplus(margins_BxG), axis=1)
    return total_B / _count(positive_BxG) if mean else total_B


@gin.configurable(allowlist=["positives_compete"])
def sum_marg_lh(
    scores_BxG: jax.Array,
    positive_BxG: jax.Array,
    negatives_B: jax.Array,
    rng: jax.Array | None = None,
    *,
    positives_compete: bool = True,
) -> jax.Array:
    """Computes SumMargLH: LSE_P∪N - LSE_P.

    It is least where the positives together have probability 1; a single one may have all of it.

    Args:
      scores_BxG: see `Objective`.
      positive_BxG: see `Objective`.
      negatives_B: see `Objective`.
      rng: not used.
      positives_compete: whether the query's other positives compete with a positive. Otherwise each
        positive's probability is normalised over itself and N alone, and the loss is -log of the mean of
        these probabilities.
    """
    if positives_compete:
        positives_B = jax.nn.logsumexp(jnp.where(positive_BxG, scores_BxG, NEG_INF), axis=1)
        return jnp.where(jnp.any(positive_BxG, axis=1), jax.nn.softplus(negatives_B - positives_B), 0.0)
    margins_BxG = _margins(scores_BxG, positive_BxG, negatives_B, positives_compete=False)
    log_p_BxG = jnp.where(positive_BxG, -jax.nn.softplus(margins_BxG), NEG_INF)
    loss_B = jnp.log(_count(positive_BxG)) - jax.nn.logsumexp(log_p_BxG, axis=1)
    return jnp.where(jnp.any(positive_BxG, axis=1), loss_B, 0.0)


@gin.configurable(allowlist=["positives", "positives_compete"])
def lse_pair(
    scores_BxG: jax.Array,
    positive_BxG: jax.Array,
    negatives_B: jax.Array,
    rng: jax.Array | None = None,
    *,
    positives: str = "all",
    positives_compete: bool = False,
) -> jax.Array:
    """Computes LSEPair: log(1 + Σ_P Σ_N e^(s_n - s_i)), a smooth maximum of the margins s_n - s_i.

    Args:
      scores_BxG: see `Objective`.
      positive_BxG: see `Objective`.
      negatives_B: see `Objective`.
      rng: not used.
      positives: which of a query's positives count: "all", or only that of the "min" or the "max" score.
      positives_compete: whether the query's other positives compete with a positive.

    Raises:
      UserError: `positives` is none of these.
    """
    margins_BxG = _margins(scores_BxG, positive_BxG, negatives_B, positives_compete)
    if positives == "all":
        return jax.nn.softplus(jax.nn.logsumexp(margins_BxG, axis=1))
    if positives not in ("min", "max"):
        raise UserError(f"lse_pair.positives: no {positives!r}: choose 'all', 'min' or 'max'")
    masked = jnp.where(positive_BxG, scores_BxG, -NEG_INF if positives == "min" else NEG_INF)
    chosen_B = jnp.argmin(masked, axis=1) if positives == "min" else jnp.argmax(masked, axis=1)
    return jax.nn.softplus(_take(margins_BxG, chosen_B))


@gin.configurable(allowlist=["positives_compete"])
def rand1_lh(
    scores_BxG: jax.Array,
    positive_BxG: jax.Array,
    negatives_B: jax.Array,
    rng: jax.Array | None = None,
    *,
    positives_compete: bool = False,
) -> jax.Array:
    """Computes Rand1LH: InfoNCE of one positive a query, drawn from P.

    Row b takes its positive number (b + r) modulo m, so that a batch takes first, second, … positives equally
    often. r is drawn from `rng`, which in training depends on the seed and the step.

    Args:
      scores_BxG: see `Objective`.
      positive_BxG: see `Objective`.
      negatives_B: see `Objective`.
      rng: the key; None: the mean over P.
      positives_compete: whether the query's other positives compete with a positive.
    """
    losses_BxG = jax.nn.softplus(_margins(scores_BxG, positive_BxG, negatives_B, positives_compete))
    count_B = _count(positive_BxG)
    if rng is None:
        return jnp.sum(losses_BxG, axis=1) / count_B
    turn_B = jax.random.randint(rng, (), 0, 1 << 24) + jnp.arange(len(scores_BxG))
    number_BxG = jnp.cumsum(positive_BxG, axis=1) - 1
    drawn_BxG = positive_BxG & (number_BxG == (turn_B % count_B.astype(jnp.int32))[:, None])
    return jnp.sum(jnp.where(drawn_BxG, losses_BxG, 0.0), axis=1)


@gin.configurable(allowlist=["positives_compete"])
def info_nce(
    scores_BxG: jax.Array,
    positive_BxG: jax.Array,
    negatives_B: jax.Array,
    rng: jax.Array | None = None,
    *,
    positives_compete: bool = False,
) -> jax.Array:
    """Computes InfoNCE of each query's first positive (van den Oord et al. 2018, equation 4).

    Args:
      scores_BxG: see `Objective`.
      positive_BxG: see `Objective`.
      negatives_B: see `Objective`.
      rng: not used.
      positives_compete: whether the query's other positives compete with a positive.
    """
    margins_BxG = _margins(scores_BxG, positive_BxG, negatives_B, positives_compete)
    return jax.nn.softplus(_take(margins_BxG, jnp.argmax(positive_BxG, axis=1)))


def _margins(scores_BxG, positive_BxG, negatives_B, positives_compete: bool) -> jax.Array:
    """Computes LSE(competitors) - s_i of each positive; NEG_INF without a positive, or a competitor."""
    competitors_Bx1 = negatives_B[:, None]
    if positives_compete:
        other_GxG = ~jnp.eye(scores_BxG.shape[1], dtype=bool)
        competitors_BxGxG = jnp.where(other_GxG & positive_BxG[:, None, :], scores_BxG[:, None, :], NEG_INF)
        competitors_Bx1 = jnp.logaddexp(competitors_Bx1, jax.nn.logsumexp(competitors_BxGxG, axis=2))
    return jnp.where(positive_BxG, competitors_Bx1 - scores_BxG, NEG_INF)


def _count(positive_BxG) -> jax.Array:
    """Counts each query's positives, m, as float32; 1 where there is none."""
    return jnp.maximum(jnp.sum(positive_BxG, axis=1), 1).astype(jnp.float32)


def _take(x_BxG, index_B) -> jax.Array:
    """Takes one number of each row."""
    return jnp.take_along_axis(x_BxG, index_B[:, None], axis=1)[:, 0]
