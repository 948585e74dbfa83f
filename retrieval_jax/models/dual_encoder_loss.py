"""The loss of a dual encoder's batch, given the vectors of its texts. Letters in shapes: see negatives.py."""

import dataclasses

import jax
import jax.numpy as jnp

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.contrastive import Objective
from retrieval_jax.models.distillation import Distillation
from retrieval_jax.models.negatives import NEG_INF, Negatives, batch_negatives, within_group_negatives
from retrieval_jax.models.pairs import divergence
from retrieval_jax.models.retriever import Batch, Metrics


@dataclasses.dataclass(frozen=True)
class VectorLoss:
    """What is minimised, summed over queries: an objective, a teacher's distillation, or both.

    Attributes: see `DualEncoder`.
    """

    objective: Objective
    objective_weight: float
    bidirectional: bool
    in_batch_negatives: bool
    hardest_negative_only: bool
    max_logits_per_block: int
    distillation: Distillation | None
    distillation_weight: float
    self_teaching_weight: float = 0.0

    def __call__(
        self,
        queries_BxE: jax.Array,
        passages_MxE: jax.Array,
        batch: Batch,
        rng: jax.Array | None,
        copies_BxE: jax.Array | None = None,
    ) -> Metrics:
        """Computes totals over the queries.

        Args:
          queries_BxE: float32, the queries' vectors, multiplied by the scale of scores.
          passages_MxE: float32, the vectors of all their candidates.
          batch: see `DualEncoder`.
          rng: the key for what the objective draws; None gives the expectation.
          copies_BxE: float32, the vectors of the queries' copies with typos, multiplied by the scale; None
            without `self_teaching_weight`.

        Returns:
          Metrics, name -> (total, count): `loss`, whose count is that of the queries that either part says
          something about (a positive for the objective, unless its weight is 0; scores for the distillation);
          `accuracy`, of the queries with a positive; with a teacher `distillation`, and with copies
          `self_teaching`, both before their weights.

        Raises:
          UserError: there is a distillation, and the batch has no scores.
        """
        scores_BxG = jnp.einsum(
            "be,bge->bg",
            queries_BxE,
            passages_MxE.reshape(*batch["passage"].shape, -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        passage_BxG, positive_BxG, known_BxK = _candidates(batch)
        answered_B = jnp.any(positive_BxG, axis=1)
        negatives = self._negatives(queries_BxE, passages_MxE, scores_BxG, known_BxK, passage_BxG)
        losses_B, counted_B, told = jnp.zeros(len(scores_BxG)), jnp.zeros_like(answered_B), {}
        if self.objective_weight:
            losses_B = self.objective_weight * self._contrastive(scores_BxG, positive_BxG, negatives, rng)
            counted_B = answered_B
        if self.distillation:
            distilled_B, of_teacher_B = self.distillation(scores_BxG, _teacher(batch), positive_BxG)
            losses_B += self.distillation_weight * distilled_B
            counted_B |= of_teacher_B
            told = {"distillation": (jnp.sum(distilled_B), _count(of_teacher_B))}
        if copies_BxE is not None:
            taught_B, has_typo_B = self._self_teaching(queries_BxE, copies_BxE, passages_MxE, batch)
            losses_B += self.self_teaching_weight * taught_B
            counted_B |= has_typo_B
            told |= {"self_teaching": (jnp.sum(taught_B), _count(has_typo_B))}
        best_B = jnp.max(jnp.where(positive_BxG, scores_BxG, NEG_INF), axis=1)
        right = jnp.sum(answered_B & (best_B >= negatives.largest))
        return {
            "loss": (jnp.sum(losses_B), _count(counted_B)),
            "accuracy": (right, _count(answered_B)),
            **told,
        }

    def _self_teaching(
        self, queries_BxE: jax.Array, copies_BxE: jax.Array, passages_MxE: jax.Array, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Computes KL(softmax(s) ‖ softmax(s')) over the batch's passages, in nats.

        s are a query's scores, which are taken as given, and s' those of its copy (Zhuang and Zuccon 2022,
        "CharacterBERT and self-teaching for improving the robustness of dense retrievers on queries with
        typos", section 4.2). A few queries' scores exist at a time, and are computed again for the gradient.

        Returns:
          (the divergences, 0 for queries whose copy is the query; which copies have a typo), each B.
        """
        count_M = batch["passage"].reshape(-1) >= 0

        def of_chunk(vectors: tuple[jax.Array, jax.Array]) -> jax.Array:
            teacher_CxM, scores_CxM = (
                jnp.matmul(x, passages_MxE.T, precision=jax.lax.Precision.HIGHEST) for x in vectors
            )
            counts_CxM = jnp.broadcast_to(count_M, scores_CxM.shape)
            return divergence(jax.lax.stop_gradient(teacher_CxM), scores_CxM, counts_CxM)[0]

        B, M = len(queries_BxE), len(passages_MxE)
        chunks = next(
            n for n in range(1, B + 1) if n == B or (B % n == 0 and B // n * M <= self.max_logits_per_block)
        )
        # Chunk i has the queries i, i + chunks, …, so that each device keeps its own.
        in_chunks = (
            jnp.moveaxis(x.reshape(B // chunks, chunks, -1), 1, 0) for x in (queries_BxE, copies_BxE)
        )
        losses_NxC = jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), tuple(in_chunks))
        same = batch["left_encoder_input_tokens"] == batch["copy_encoder_input_tokens"]
        has_typo_B = ~jnp.all(same, axis=1)
        return jnp.where(has_typo_B, losses_NxC.T.reshape(B), 0.0), has_typo_B

    def _negatives(self, queries_BxE, passages_MxE, scores_BxG, known_BxK, passage_BxG) -> Negatives:
        """Gives the log-sum-exps of the negatives: of the whole batch only where the objective reads them."""
        if self.in_batch_negatives and self.objective_weight:
            static = self.hardest_negative_only, self.max_logits_per_block
            return batch_negatives(queries_BxE, passages_MxE, known_BxK, passage_BxG.reshape(-1), *static)
        return within_group_negatives(scores_BxG, known_BxK, passage_BxG, self.hardest_negative_only)

    def _contrastive(self, scores_BxG, positive_BxG, negatives: Negatives, rng) -> jax.Array:
        """Computes the objective's losses B, of the other direction, too, where that is asked for."""
        losses_B = self.objective(scores_BxG, positive_BxG, negatives.of_queries, rng)
        if self.bidirectional:
            to_query_BxG = jax.nn.softplus(negatives.of_passages.reshape(scores_BxG.shape) - scores_BxG)
            positives_B = jnp.maximum(jnp.sum(positive_BxG, axis=1), 1)
            losses_B += jnp.sum(jnp.where(positive_BxG, to_query_BxG, 0.0), axis=1) / positives_B
        return losses_B


def _candidates(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads the candidates of a batch.

    Returns:
      (rows of the candidates B×G; which of them are positives B×G; rows of all passages that are known to
      answer the query B×K). A row without a positive has -1 everywhere.
    """
    positive_BxG = (batch["grade"] > 0) & (batch["passage"] >= 0)
    answered_Bx1 = jnp.any(positive_BxG, axis=1, keepdims=True)
    known_BxK = jnp.where(positive_BxG, batch["passage"], -1)
    if "other_positives" in batch:
        known_BxK = jnp.concatenate(
            [known_BxK, jnp.where(answered_Bx1, batch["other_positives"], -1)], axis=1
        )
    return jnp.where(answered_Bx1, batch["passage"], -1), positive_BxG, known_BxK


def _teacher(batch: Batch) -> jax.Array:
    """Reads the teacher's scores B×G, NaN where there is no candidate."""
    if "score" not in batch:
        raise UserError(
            "distillation: the examples have no teacher's scores: make them by `retrieval-jax "
            "score`, and train with --SCORES=NAME"
        )
    return jnp.where(batch["passage"] >= 0, batch["score"], jnp.nan)


def _count(which_B: jax.Array) -> jax.Array:
    return jnp.sum(which_B).astype(jnp.float32)
