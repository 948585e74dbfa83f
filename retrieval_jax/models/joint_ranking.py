"""The objective of a retriever that ranks by two scores at once: of docids, and of sets of tokens (PAG).

Letters in shapes: B queries, C candidates of each, T positions of a docid, V pieces of the text vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegativeFloat, Positive, PositiveFloat
from retrieval_jax.models.distillation import Distillation, dense_margin_mse
from retrieval_jax.models.lexical import flops
from retrieval_jax.models.objectives import Predict, Predictions
from retrieval_jax.models.pairs import margins
from retrieval_jax.models.ranking import (
    DocidGroups,
    checked_groups,
    total_and_count,
    whole_and_prefixes,
)
from retrieval_jax.models.retriever import Batch, Metrics


class _Part(NamedTuple):
    """Scores that are to be the teacher's: their name, and where they count."""

    name: str
    scores_BxC: jax.Array
    teacher_BxC: jax.Array
    counts_BxC: jax.Array


@gin.configurable(denylist=["predict", "batch", "rng"])
def joint_ranking(
    predict: Predict,
    batch: Batch,
    rng: jax.Array | None,
    distillation: Distillation = dense_margin_mse,
    prefix_lengths: Sequence[Positive] = (),
    shares: Sequence[float] | None = None,
    sequential_weight: PositiveFloat = 1.0,
    flops_weight: NonNegativeFloat = 0.0,
    cross_entropy_weight: NonNegativeFloat = 0.0,
) -> Metrics:
    """Distils a teacher into both scores of a candidate and into their sum: PAG (Zeng et al. 2024, 3.3).

    The lexical score is that of the candidate's set docid (`Predictions.lexical_BxC`), the sequential one of
    a docid's first n tokens is S_n, as in `margin_mse`. What a distillation compares with the teacher:

        lexical    the lexical scores
        prefix     S_n at each prefix length n, for the different prefixes among the candidates
        sum        sequential_weight · S_T + the lexical score

    The loss is the mean over queries of the sum of these three and of the weighted FLOPS regulariser (Paria
    et al. 2020): Σ over the vocabulary of the square of the mean weight of the batch's queries. A candidate
    without a teacher's score stays out.

    A search with a plan ranks by such a sum, too, with a weight of its own (`make_index.sequential_weight`),
    which is by default chosen on dev queries.

    Args:
      predict: see `Objective`.
      batch: see `Objective`; with `score` and `set_tokens`.
      rng: see `Objective`.
      distillation: how scores are compared with the teacher's: @dense_margin_mse, as in PAG, or @dense_kl.
      prefix_lengths: the lengths n below the whole docid's, in tokens; PAG has (4,) of 8.
      shares: the teacher's score at each prefix length as a share of that of the whole docid, as in PAG:
        (0.5,) at (4,); None: the teacher's scores of prefixes (see `DocidGroupTargets`).
      sequential_weight: what the sequential score is multiplied by, in the sum and at each prefix length.
        (A LexicalEncoder with `DataConfig.sets` trains the lexical part alone.)
      flops_weight: of the FLOPS regulariser, whose mean over the batch is that of each microbatch. It does
        not rise, as training begins with a trained head.
      cross_entropy_weight: of the cross-entropy of the first positive's docid.

    Raises:
      UserError: the batch lacks groups, scores or set docids, the model has no lexical head, or the arguments
        do not go together.
    """
    if shares is not None and len(shares) != len(prefix_lengths):
        raise UserError(
            f"joint_ranking.shares: {len(shares)} for {len(prefix_lengths)} prefix_lengths: give one for each"
        )
    predictions = predict(_with_sets(batch), rng)
    group, lexical_BxC, teacher_BxCxT = DocidGroups.of(predictions), _lexical(predictions), batch["score"]
    there_BxC = batch["grade"] >= 0
    sums_BxCxT = sequential_weight * group.sums(predictions.scores_BxT)
    whole_and_prefixes(prefix_lengths, sums_BxCxT.shape[-1], "joint_ranking")
    sum_BxC = sums_BxCxT[..., -1] + lexical_BxC
    parts = [
        _Part("lexical", lexical_BxC, teacher_BxCxT[..., -1], there_BxC),
        _Part("sum", sum_BxC, teacher_BxCxT[..., -1], there_BxC),
    ]
    for n, share in zip(prefix_lengths, shares or [None] * len(prefix_lengths), strict=True):
        teacher_BxC = teacher_BxCxT[..., n - 1] if share is None else share * teacher_BxCxT[..., -1]
        parts.append(_Part(f"prefix/{n}", sums_BxCxT[..., n - 1], teacher_BxC, group.different(n)))

    query_B = jnp.any(batch["grade"] > 0, axis=1)
    queries = jnp.sum(query_B, dtype=jnp.float32)
    of_queries = flops(predictions.lexical_weights_BxV, query_B)
    losses_B, told = flops_weight * of_queries * query_B, {"flops": (of_queries * queries, queries)}
    for part in parts:
        teacher_BxC = jnp.where(part.counts_BxC, part.teacher_BxC, jnp.nan)
        of_part_B, counted_B = distillation(part.scores_BxC, teacher_BxC, batch["grade"] > 0)
        losses_B += of_part_B
        told[f"{part.name}_loss"] = (jnp.sum(of_part_B), jnp.sum(counted_B, dtype=jnp.float32))
        if not part.name.startswith("prefix"):
            right_BxCxC = margins(part.scores_BxC) > 0
            told[f"{part.name}_ordered"] = total_and_count(right_BxCxC, group.pairs_BxCxC)
    return told | group.loss_and_metrics(losses_B, cross_entropy_weight, sums_BxCxT)


joint_ranking.unbounded_loss = True  # of sums of logits
joint_ranking.reads_sets = True
joint_ranking.examples_interact = True  # by the FLOPS regulariser


def _with_sets(batch: Batch) -> Batch:
    """Gives the batch, if it has set docids, groups and scores."""
    if "set_tokens" not in checked_groups(batch, "joint_ranking", scores=True):
        raise UserError("joint_ranking: needs set docids: `retrieval-jax sets`, then --SETS=NAME")
    return batch


def _lexical(predictions: Predictions) -> jax.Array:
    """Gives the candidates' lexical scores, if the model has them."""
    if predictions.lexical_BxC is None:
        raise UserError("joint_ranking: the model has no lexical head: --gin.T5Config.lexical_head=True")
    return predictions.lexical_BxC
