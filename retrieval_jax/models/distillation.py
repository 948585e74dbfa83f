"""Distillation for dual encoders: a query's scores of its own candidates are to be as a teacher's.

The candidates are those of the query's own group: in-batch negatives have no teacher's score, and stay in
the objective alone. A candidate without a score (NaN) stays out. Letters in shapes: B queries, G candidates
of a query; s are the student's scores, t the teacher's. Docids learn from a teacher by ranking.py.
"""

from typing import Protocol

import gin
import jax
import jax.numpy as jnp

from retrieval_jax.core.values import PositiveFloat
from retrieval_jax.models.pairs import divergence, margins, mean_of_pairs


class Distillation(Protocol):
    """Computes the losses B of queries, float32, and which of the queries count, bool.

    If it has a true attribute `unbounded_loss`, its loss has no natural scale; see `Objective` in
    objectives.py.

    Args:
      scores_BxG: float32, the student's scores of each query's candidates.
      teacher_BxG: float32, the teacher's; NaN where it gave none, or where there is no candidate.
      positive_BxG: bool, which of them are the query's positives.
    """

    def __call__(
        self, scores_BxG: jax.Array, teacher_BxG: jax.Array, positive_BxG: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the losses, which are 0 for queries that do not count."""
        ...


@gin.configurable(allowlist=["teacher_scale"])
def dense_margin_mse(
    scores_BxG: jax.Array,
    teacher_BxG: jax.Array,
    positive_BxG: jax.Array,
    *,
    teacher_scale: PositiveFloat = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Computes MarginMSE: the mean of ((s⁺ - s⁻) - (t⁺ - t⁻))² (Hofstätter et al. 2020, section 3.1).

    The mean is over the pairs of a positive and a negative of the query; a query without a pair does not
    count. Margins have no bound, so s should have none: see `DualEncoder`.

    Args:
      scores_BxG: see `Distillation`.
      teacher_BxG: see `Distillation`.
      positive_BxG: see `Distillation`.
      teacher_scale: multiplies the teacher's scores. Those of a fused searcher lie in 0 to 1, whose margins
        alone would give gradients near 0.
    """
    known_BxG = jnp.isfinite(teacher_BxG)
    teacher_BxG = jnp.where(known_BxG, teacher_scale * teacher_BxG, 0.0)
    pair_BxGxG = (positive_BxG & known_BxG)[:, :, None] & (~positive_BxG & known_BxG)[:, None, :]
    errors_BxGxG = jnp.square(margins(scores_BxG) - margins(teacher_BxG))
    return mean_of_pairs(errors_BxGxG, pair_BxGxG), jnp.any(pair_BxGxG, axis=(1, 2))


dense_margin_mse.unbounded_loss = True  # of margins, which unit vectors bound: `DualEncoder` says so


@gin.configurable(allowlist=["temperature"])
def dense_kl(
    scores_BxG: jax.Array,
    teacher_BxG: jax.Array,
    positive_BxG: jax.Array,
    *,
    temperature: PositiveFloat = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Computes KL(softmax(t / temperature) ‖ softmax(s)) over all candidates of a query, in nats.

    It is 0 where both distributions are the same (Hinton et al. 2015, section 2, for a list of passages). A
    query with fewer than two scored candidates does not count.

    Args:
      scores_BxG: see `Distillation`.
      teacher_BxG: see `Distillation`.
      positive_BxG: not used: the teacher alone says which candidates are better.
      temperature: divides the teacher's scores: the lower, the more the best candidate has of the whole. The
        student's is 1 / `DualEncoder.scale`.
    """
    return divergence(teacher_BxG / temperature, scores_BxG, jnp.isfinite(teacher_BxG))
