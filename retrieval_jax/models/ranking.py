"""Objectives by which a model learns to rank a query's docids, in float32. See `Objective` in objectives.py.

    margin_mse         margins between the scores of docids' prefixes are to be the teacher's: RIPOR (Zeng et
                       al. 2024), PAG (Zeng et al. 2024)
    kl                 the distribution over the docids of a query is to be the teacher's
    pairwise_margin    wrong docids are to score lower than right ones by a margin: LTRGR (Li et al. 2024)
    dpo                right docids are to gain on wrong ones, compared with a frozen reference model: DPO
                       (Rafailov et al. 2023), DDRO (Mekonnen et al. 2025)

They read the batches that `DataConfig.negatives` above 0 gives: queries with a group of docids each, the
positives first (see `EncoderDecoder`). Each but `kl` compares the pairs of a positive and a negative of a
query. The loss is the mean over queries of: the mean over the query's pairs (or the query's divergence), plus
the weighted cross-entropy of its first positive's docid (the mean over the docid's tokens). A query without
pairs, as a synthetic one, adds its cross-entropy alone.

A pair of docids that share their first n tokens does not count at length n, and equal docids never do. The
papers compare two different prefixes: equal ones have the same score whatever the parameters, and the
difference that dropout makes between them is no error of the ranking.

Letters in shapes: B queries, C candidates of each (in pairs: positives × negatives), T positions of a docid.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegativeFloat, Positive, PositiveFloat
from retrieval_jax.models.objectives import Predict, Predictions, token_cross_entropy, token_metrics
from retrieval_jax.models.pairs import divergence, margins, mean_of_pairs
from retrieval_jax.models.retriever import Batch, Metrics


@gin.configurable(allowlist=["prefix_lengths", "weights", "shares", "teacher_scale", "cross_entropy_weight"])
def margin_mse(
    predict: Predict,
    batch: Batch,
    rng: jax.Array | None,
    prefix_lengths: Sequence[Positive] | None = None,
    weights: Sequence[NonNegativeFloat] | None = None,
    shares: Sequence[float] | None = None,
    teacher_scale: PositiveFloat = 1.0,
    cross_entropy_weight: NonNegativeFloat = 0.0,
) -> Metrics:
    """Distils the teacher's margins: at each prefix length n the mean of ((S_n⁺ - S_n⁻) - (t_n⁺ - t_n⁻))².

    S_n is the score of a docid's first n tokens, as the model's search adds it up: in RIPOR and PAG the sum
    of their raw logits, which `GenerativeRetriever.score="logits"` says. t_n is the teacher's score of these
    n tokens, the largest score of the passages whose docids begin with them (RIPOR). Pairs of which a score
    is unknown do not count.

    Args:
      predict: see `Objective`.
      batch: see `Objective`; with `score`.
      rng: see `Objective`.
      prefix_lengths: the lengths n, in tokens. That of the whole docid is always added to them: a token that
        tells colliding docids apart adds to their scores, too.
      weights: of the prefix_lengths' losses, which are added up; None: 1 each, as an added length has.
      shares: the teacher's margin at each length as a share of that of the whole docids, as in PAG: (0.5, 1)
        at the lengths (4, 8), as an added length has 1; None: that of the teacher's scores of prefixes.
      teacher_scale: multiplies the teacher's scores. Those of a fused searcher lie in 0 to 1, those of BM25
        reach 20 and more, and the margins between sums of logits are what they were when training begins.
      cross_entropy_weight: of the cross-entropy of the first positive's docid.

    Raises:
      UserError: the batch has no groups or no scores, or the arguments do not go together.
    """
    group = DocidGroups.of(predict(checked_groups(batch, "margin_mse", scores=True), rng))
    T = batch["score"].shape[-1]
    lengths = whole_and_prefixes(prefix_lengths, T, "margin_mse")
    count = len(prefix_lengths or lengths)
    weights, shares = weights or [1.0] * count, shares or [None] * count
    for name, given in (("weights", weights), ("shares", shares)):
        if len(given) != count:
            raise UserError(f"margin_mse.{name}: {len(given)} for {count} prefix_lengths: give one for each")
    if len(lengths) > count:
        weights, shares = [*weights, 1.0], [*shares, None if shares[0] is None else 1.0]
    sums_BxCxT = group.sums(group.predictions.scores_BxT)
    losses_B, told = jnp.zeros(len(batch["score"])), {}
    for n, weight, share in zip(lengths, weights, shares, strict=True):
        teacher_BxCxC = teacher_scale * margins(batch["score"][..., (n if share is None else T) - 1])
        counts_BxCxC = group.pairs(n) & jnp.isfinite(teacher_BxCxC)
        teacher_BxCxC = (1.0 if share is None else share) * jnp.where(counts_BxCxC, teacher_BxCxC, 0.0)
        errors_BxCxC = jnp.square(margins(sums_BxCxT[..., n - 1]) - teacher_BxCxC)
        losses_B += weight * mean_of_pairs(errors_BxCxC, counts_BxCxC)
        told[f"margin_mse_at/{n}"] = total_and_count(errors_BxCxC, counts_BxCxC)
    return group.loss_and_metrics(losses_B, cross_entropy_weight, sums_BxCxT) | told


@gin.configurable(allowlist=["prefix_lengths", "temperature", "cross_entropy_weight"])
def kl(
    predict: Predict,
    batch: Batch,
    rng: jax.Array | None,
    prefix_lengths: Sequence[Positive] | None = None,
    temperature: PositiveFloat = 1.0,
    cross_entropy_weight: NonNegativeFloat = 0.0,
) -> Metrics:
    """Distils the teacher's distribution: at each length n the KL(softmax(t_n / temperature) ‖ softmax(S_n)).

    S_n and t_n are those of `margin_mse`; both distributions are over the different prefixes of length n
    among the query's candidates whose score is known. The student is asked for the teacher's order, and for
    margins that are large where the teacher is sure, and may have scores that are unlike the teacher's. The
    lengths' losses, in nats, are added up.

    Args:
      predict: see `Objective`.
      batch: see `Objective`; with `score`.
      rng: see `Objective`.
      prefix_lengths: see `margin_mse`.
      temperature: divides the teacher's scores; 0.1 suits those of a fused searcher that lie in 0 to 1.
      cross_entropy_weight: see `margin_mse`.

    Raises:
      UserError: the batch has no groups or no scores, or a length is too large.
    """
    group = DocidGroups.of(predict(checked_groups(batch, "kl", scores=True), rng))
    sums_BxCxT = group.sums(group.predictions.scores_BxT)
    losses_B, told = jnp.zeros(len(batch["score"])), {}
    for n in whole_and_prefixes(prefix_lengths, batch["score"].shape[-1], "kl"):
        teacher_BxC = batch["score"][..., n - 1] / temperature
        counts_BxC = group.different(n) & jnp.isfinite(teacher_BxC)
        of_length_B, several_B = divergence(teacher_BxC, sums_BxCxT[..., n - 1], counts_BxC)
        losses_B += of_length_B
        told[f"kl_at/{n}"] = (jnp.sum(of_length_B), jnp.sum(several_B).astype(jnp.float32))
    return group.loss_and_metrics(losses_B, cross_entropy_weight, sums_BxCxT) | told


@gin.configurable(allowlist=["margin", "cross_entropy_weight"])
def pairwise_margin(
    predict: Predict,
    batch: Batch,
    rng: jax.Array | None,
    margin: PositiveFloat = 1.0,
    cross_entropy_weight: NonNegativeFloat = 1.0,
) -> Metrics:
    """Learns from the model's own wrong results: the mean of max(0, margin - s⁺ + s⁻), beside cross-entropy.

    The negatives are what a search with the model found (`retrieval-jax mine`), and s is the score that it
    gives to docids (`GenerativeRetriever.score`). LTRGR draws its pairs from those that are averaged here. No
    teacher is needed.

    Args:
      predict: see `Objective`.
      batch: see `Objective`.
      rng: see `Objective`.
      margin: by how much the score of a positive is to exceed that of a negative.
      cross_entropy_weight: of the cross-entropy of the first positive's docid.

    Raises:
      UserError: the batch has no groups.
    """
    group = DocidGroups.of(predict(checked_groups(batch, "pairwise_margin"), rng))
    sums_BxCxT = group.sums(group.predictions.scores_BxT)
    losses_BxCxC = jax.nn.relu(margin - margins(sums_BxCxT[..., -1]))
    losses_B = mean_of_pairs(losses_BxCxC, group.pairs())
    return group.loss_and_metrics(losses_B, cross_entropy_weight, sums_BxCxT)


@gin.configurable(allowlist=["beta", "cross_entropy_weight"])
def dpo(
    predict: Predict,
    batch: Batch,
    rng: jax.Array | None,
    beta: PositiveFloat = 0.1,
    cross_entropy_weight: NonNegativeFloat = 0.0,
) -> Metrics:
    """Prefers positives: the mean of -log σ(β [(log π⁺ - log π_ref⁺) - (log π⁻ - log π_ref⁻)]).

    log π is the log-probability of a docid, log π_ref that of the frozen reference model, whose searcher is
    the teacher of the batch's scores (`retrieval-jax score`). Pairs of which a score is unknown do not count.

    Args:
      predict: see `Objective`.
      batch: see `Objective`; with `score`.
      rng: see `Objective`.
      beta: β; the smaller it is, the further the model may move away from its reference.
      cross_entropy_weight: of the cross-entropy of the first positive's docid.

    Raises:
      UserError: the batch has no groups or no scores.

    A training refuses scores that are known to be something else (see `reads_log_probs`).
    """
    group = DocidGroups.of(predict(checked_groups(batch, "dpo", scores=True), rng))
    sums_BxCxT = group.sums(group.predictions.log_probs_BxT)
    reference_BxCxC = margins(batch["score"][..., -1])
    counts_BxCxC = group.pairs() & jnp.isfinite(reference_BxCxC)
    reference_BxCxC = jnp.where(counts_BxCxC, reference_BxCxC, 0.0)
    losses_BxCxC = jax.nn.softplus(-beta * (margins(sums_BxCxT[..., -1]) - reference_BxCxC))
    losses_B = mean_of_pairs(losses_BxCxC, counts_BxCxC)
    return group.loss_and_metrics(losses_B, cross_entropy_weight, sums_BxCxT)


# Their losses are squares or differences of scores of any size.
margin_mse.unbounded_loss = pairwise_margin.unbounded_loss = True
dpo.reads_log_probs = True  # of the teacher's scores, by docid


def whole_and_prefixes(prefix_lengths: Sequence[int] | None, most: int, name: str) -> Sequence[int]:
    """Gives the lengths of prefixes that an objective learns: those that are set, and the whole docid's.

    Args:
      prefix_lengths: those that are set, in tokens.
      most: the tokens of a whole docid.
      name: of the objective, for the message.

    Raises:
      UserError: a length is above `most`.
    """
    lengths = tuple(prefix_lengths or ())
    lengths += (most,) * (most not in lengths)
    if max(lengths) > most:
        raise UserError(
            f"{name}.prefix_lengths: {max(lengths)} is more than a docid's {most} tokens: set at most {most}"
        )
    return lengths


def checked_groups(batch: Batch, name: str, scores: bool = False) -> Batch:
    """Gives the batch, if it has what an objective that ranks reads.

    Args:
      batch: see `Objective`.
      name: of the objective, for the message.
      scores: whether the objective reads a teacher's scores.

    Raises:
      UserError: the batch has no groups of docids, or no scores.
    """
    if "grade" not in batch:
        raise UserError(
            f"{name}: ranks several docids of a query, and the batch has one of each: set "
            "--gin.DataConfig.negatives=N, above 0"
        )
    if scores and "score" not in batch:
        raise UserError(f"{name}: needs a teacher's scores: `retrieval-jax score`, then --SCORES=NAME")
    return batch


class DocidGroups(NamedTuple):
    """What a model predicts for the groups of docids of a batch.

    Attributes:
      predictions: the predictions, whose arrays are B×C×T.
      pairs_BxCxC: bool, whether the first is a positive and the second a negative.
      shared_BxCxCxT: bool, whether two docids share their first n + 1 tokens.
    """

    predictions: Predictions
    pairs_BxCxC: jax.Array
    shared_BxCxCxT: jax.Array

    @classmethod
    def of(cls, predictions: Predictions) -> "DocidGroups":
        """Compares the docids of each group."""
        grade_BxC = predictions.batch["grade"]
        docids_BxCxT = predictions.batch["decoder_target_tokens"]
        equal_BxCxCxT = docids_BxCxT[:, :, None] == docids_BxCxT[:, None, :]
        shared = jnp.cumsum(~equal_BxCxCxT, axis=-1) == 0
        return cls(predictions, (grade_BxC > 0)[:, :, None] & (grade_BxC == 0)[:, None, :], shared)

    def pairs(self, length: int | None = None) -> jax.Array:
        """Gives the pairs B×C×C whose docids differ within their first `length` tokens; None: at all."""
        return self.pairs_BxCxC & ~self.shared_BxCxCxT[..., -1 if length is None else length - 1]

    def different(self, length: int) -> jax.Array:
        """Gives B×C: whether a candidate is there, and no earlier one has its first `length` tokens."""
        C = self.shared_BxCxCxT.shape[1]
        earlier_CxC = np.tri(C, k=-1, dtype=bool)
        repeated_BxC = jnp.any(self.shared_BxCxCxT[..., length - 1] & earlier_CxC, axis=2)
        return (self.predictions.batch["grade"] >= 0) & ~repeated_BxC

    def sums(self, scores_BxCxT: jax.Array) -> jax.Array:
        """Adds up the scores of the first n + 1 tokens: B×C×T; nothing is added after a docid's end."""
        return jnp.cumsum(scores_BxCxT * self.predictions.weights_BxT, axis=-1)

    def first(self) -> Predictions:
        """Gives the predictions B×T of each query's first positive; without weight where there is none."""
        whole = self.predictions
        weights_BxT = whole.weights_BxT[:, 0] * (whole.batch["grade"][:, :1] > 0)
        logits = whole.logits_BxTxV
        return dataclasses.replace(
            whole,
            batch={"decoder_loss_weights": weights_BxT},
            hidden_BxTxE=whole.hidden_BxTxE[:, 0],
            softmax=jax.tree.map(lambda x: x[:, 0], whole.softmax),
            logits_BxTxV=None if logits is None else logits[:, 0],
        )

    def loss_and_metrics(
        self, losses_B: jax.Array, cross_entropy_weight: float, sums_BxCxT: jax.Array
    ) -> Metrics:
        """Adds the cross-entropy to each query's loss, and says what tells whether the model learns.

        Args:
          losses_B: the loss of each query's pairs; 0 where it has none.
          cross_entropy_weight: of the first positive's docid.
          sums_BxCxT: the scores of the docids' prefixes.

        Returns:
          Metrics: `loss`; `cross_entropy` in nats a token, `accuracy` and `accuracy_at/n` of the first
          positives' docids, as `token_metrics` has them; and `ordered_at/n` for n = 1, 2, 4, … and the whole
          docid: of the pairs whose first n tokens differ, the share of which the positive's score higher.
        """
        first = self.first()
        nats_BxT, weights_BxT = token_cross_entropy(first.softmax), first.weights_BxT
        metrics = token_metrics(first, nats_BxT)
        metrics["cross_entropy"] = metrics.pop("loss")
        of_docid_B = jnp.sum(nats_BxT * weights_BxT, axis=1) / jnp.maximum(jnp.sum(weights_BxT, axis=1), 1)
        queries = jnp.sum(self.predictions.batch["grade"][:, 0] > 0, dtype=jnp.float32)  # no padding
        metrics["loss"] = (jnp.sum(losses_B + cross_entropy_weight * of_docid_B), queries)
        T = sums_BxCxT.shape[-1]
        for n in (*(1 << i for i in range((T - 1).bit_length())), T):
            right_BxCxC = margins(sums_BxCxT[..., n - 1]) > 0
            metrics[f"ordered_at/{n}"] = total_and_count(right_BxCxC, self.pairs(n))
        return metrics


def total_and_count(x_BxCxC: jax.Array, pairs_BxCxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives what averages over pairs (bool) as a metric does: (the sum, how many there are)."""
    total = jnp.sum(jnp.where(pairs_BxCxC, x_BxCxC, 0), dtype=jnp.float32)
    return total, jnp.sum(pairs_BxCxC, dtype=jnp.float32)
