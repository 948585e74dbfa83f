"""The lexical encoder: a learned-sparse retriever (SPLADE) whose vectors are weights of text tokens."""

import dataclasses
from collections.abc import Mapping

import gin
import jax
import jax.numpy as jnp
import optax

from retrieval_jax.core.values import NonNegative, NonNegativeFloat, PositiveFloat
from retrieval_jax.models.contrastive import Objective, info_nce
from retrieval_jax.models.distillation import Distillation
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.dual_encoder_network import LEXICAL, TOWERS, DualEncoderNetwork
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.lexical import flops
from retrieval_jax.models.retriever import Batch, register_retriever


@register_retriever
@gin.configurable(denylist=["config", "optimizer_def"])
class LexicalEncoder(DualEncoder):
    """A dual encoder whose vectors are the lexical head's weights: relevance is the sum over shared tokens.

    A query's vector has the head's gains, a passage's has not, so that a token that both have counts
    gain_t · q_t · p_t. The gains may begin as a power of the tokens' inverse document frequencies in the
    collection (`InitialCheckpoint.lexical_idf`).

    To the loss are added the FLOPS regularisers of queries and of passages (Paria et al. 2020, section 4;
    SPLADE, Formal et al. 2021): Σ_t (mean over the batch of w_t)², the number of products that a search
    computes, relaxed. It makes weights sparse and the tokens of different passages different ones.

    Where the batch has the candidates' sets of tokens (`DataConfig.sets`), these are the passages' vectors,
    and queries alone are encoded: the weights of queries are trained for the sets that are searched (PAG,
    Zeng et al. 2024, section 3.1).

    Args:
      config: see `DualEncoder`; the head is added to it.
      optimizer_def: see `DualEncoder`.
      scale: see `DualEncoder`.
      learn_scale: see `DualEncoder`.
      shared_towers: see `DualEncoder`.
      objective: see `DualEncoder`.
      objective_weight: see `DualEncoder`.
      distillation: see `DualEncoder`.
      distillation_weight: see `DualEncoder`.
      bidirectional: see `DualEncoder`.
      in_batch_negatives: see `DualEncoder`.
      hardest_negative_only: see `DualEncoder`.
      gradcache_chunk_size: see `DualEncoder`.
      max_logits_per_block: see `DualEncoder`.
      query_prompt: see `DualEncoder`.
      passage_prompt: see `DualEncoder`.
      flops_weight: of the queries' regulariser.
      passage_flops_weight: of the passages' regulariser.
      flops_steps: both weights rise with the square of the step until this one (SPLADE, section 3.3).
    """

    family = "lexical"
    reads_step = reads_sets = True

    def __init__(
        self,
        config: T5Config,
        optimizer_def: optax.GradientTransformation | None = None,
        scale: PositiveFloat = 1.0,
        learn_scale: bool = False,
        shared_towers: bool = True,
        objective: Objective = info_nce,
        objective_weight: NonNegativeFloat = 1.0,
        distillation: Distillation | None = None,
        distillation_weight: PositiveFloat = 1.0,
        bidirectional: bool = True,
        in_batch_negatives: bool = True,
        hardest_negative_only: bool = False,
        gradcache_chunk_size: int | None = None,
        max_logits_per_block: int = 1 << 26,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        flops_weight: NonNegativeFloat = 0.0,
        passage_flops_weight: NonNegativeFloat = 0.0,
        flops_steps: NonNegative = 0,
    ):
        super().__init__(
            dataclasses.replace(config, lexical_head=True),
            optimizer_def,
            scale=scale,
            learn_scale=learn_scale,
            normalize=False,
            shared_towers=shared_towers,
            objective=objective,
            objective_weight=objective_weight,
            distillation=distillation,
            distillation_weight=distillation_weight,
            self_teaching_weight=0.0,
            bidirectional=bidirectional,
            in_batch_negatives=in_batch_negatives,
            hardest_negative_only=hardest_negative_only,
            gradcache_chunk_size=gradcache_chunk_size,
            max_logits_per_block=max_logits_per_block,
            matryoshka=(),
            matryoshka_weights=None,
            query_prompt=query_prompt,
            passage_prompt=passage_prompt,
        )
        self.flops_weights = {"query_flops": flops_weight, "passage_flops": passage_flops_weight}
        self.flops_steps = flops_steps

    def _network(self, config: T5Config, *_: object) -> DualEncoderNetwork:
        return DualEncoderNetwork(config, config.vocab_size, normalize=False, pooling=LEXICAL)

    @property
    def settings(self) -> dict:
        """See `DualEncoder.settings`."""
        fixed = ("vector_dim", "normalize", "pooling")
        return {name: value for name, value in super().settings.items() if name not in fixed}

    def lexical_weights(self, params: dict, batch: Batch) -> jax.Array:
        """Computes the weights of queries' tokens, float32 B×V; see `GenerativeRetriever.lexical_weights`."""
        return self.encode_queries(params, batch["encoder_input_tokens"])

    def gain(self, params: dict) -> jax.Array:
        """Gives the gains of queries' tokens, float32 V: what a passage's weight may count at most."""
        own = params if self.shared_towers else params[TOWERS[0]]
        return jax.nn.relu(own["lexical_head"]["gain"])

    def _arguments(self, is_query: bool) -> dict:
        return {"with_gain": is_query, "method": "lexical"}

    def _encode_candidates(self, params: dict, batch: Batch, rng: jax.Array | None, **lengths) -> jax.Array:
        if "set_tokens" not in batch:
            return super()._encode_candidates(params, batch, rng, **lengths)
        tokens_NxM = batch["set_tokens"].reshape(-1, batch["set_tokens"].shape[-1])
        impacts_NxM = batch.get("set_impacts")
        return set_vectors(tokens_NxM, impacts_NxM, self.config.vocab_size)

    def _regularizers(
        self, queries_BxV: jax.Array, passages_NxV: jax.Array, batch: Batch
    ) -> Mapping[str, tuple[jax.Array | float, jax.Array]]:
        risen = 1.0
        if self.flops_steps and "step" in batch:
            risen = jnp.square(jnp.minimum(jnp.max(batch["step"]) / self.flops_steps, 1.0))
        query_B = jnp.any(batch["grade"] > 0, axis=1)
        passage_N = ((batch["grade"] >= 0) & query_B[:, None]).reshape(-1)
        of = {"query_flops": (queries_BxV, query_B), "passage_flops": (passages_NxV, passage_N)}
        weights = self.flops_weights.items()
        return {name: (weight * risen, flops(*of[name])) for name, weight in weights if weight}


def set_vectors(tokens_NxM: jax.Array, impacts_NxM: jax.Array | None, vocab_size: int) -> jax.Array:
    """Makes the vectors of passages whose sets of tokens are given.

    Args:
      tokens_NxM: int32, 0 is none.
      impacts_NxM: of any shape of N·M numbers, float32; None: each token counts 1.
      vocab_size: V.

    Returns:
      Float32 N×V.
    """
    N, M = tokens_NxM.shape
    impacts = jnp.ones((N, M)) if impacts_NxM is None else impacts_NxM.reshape(N, M)
    vectors_NxV = jnp.zeros((N, vocab_size), jnp.float32)
    return vectors_NxV.at[jnp.arange(N)[:, None], tokens_NxM].add(jnp.where(tokens_NxM > 0, impacts, 0.0))
