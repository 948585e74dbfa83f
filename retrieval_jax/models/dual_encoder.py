"""The dual encoder: a T5 makes vectors of queries and passages; relevance is their dot product."""

import functools
from collections.abc import Mapping, Sequence

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import NonNegativeFloat, Positive, PositiveFloat
from retrieval_jax.data.vocabulary import Prompts
from retrieval_jax.models.contrastive import Objective, info_nce
from retrieval_jax.models.distillation import Distillation
from retrieval_jax.models.dual_encoder_loss import VectorLoss
from retrieval_jax.models.dual_encoder_network import TOWERS, DualEncoderNetwork, shorten
from retrieval_jax.models.gradient_cache import encode_texts
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.retriever import (
    Batch,
    Metrics,
    Retriever,
    objective_says,
    register_retriever,
)
from retrieval_jax.models.text_groups import TextGroups

MAX_SCALE = 100.0  # of a learned scale (CLIP, Radford et al. 2021, section 2.5): keeps training stable


@register_retriever
@gin.configurable(denylist=["config", "optimizer_def"])
class DualEncoder(Retriever):
    """T5X's model interface over a dual encoder.

    A batch holds, in int32, left_encoder_input_tokens B×S (queries), right_encoder_input_tokens B×G×P (each
    query's candidates), passage B×G (their rows, -1 is padding), grade B×G (> 0 positive, 0 negative) and
    other_positives B×K (rows of other passages that answer the query, -1 is padding; may be left out). With a
    teacher it also holds score B×G float32, the teacher's scores of the candidates; NaN where it gave none.
    For self-teaching it holds copy_encoder_input_tokens B×S, int32: the queries with typos.

    A query's negatives are all candidates of the batch, those of other queries too, except the passages that
    are known to answer it. A row without a positive contributes nothing, neither as a query nor by its
    candidates.

    Args:
      config: the sizes of the towers.
      optimizer_def: the optimiser; None for a model that does not learn.
      vector_dim: the size of the vectors; None: 768 with the mean, as GTR has it, and the network's `emb_dim`
        with the decoder's state, which then has no projection.
      scale: multiplies the dot products (1 / temperature).
      learn_scale: whether the scale is learned: it is multiplied by e^log_scale, where `log_scale` is a
        parameter that begins at 0, and stays below MAX_SCALE (or below `scale`, if that is larger).
      normalize: whether vectors have unit length, so that dot products are cosines.
      pooling: what becomes a text's vector: the "mean" of the encoder's states, or the first state of the
        "decoder", with which a generative retriever can begin; see `DualEncoderNetwork`.
      shared_towers: whether one tower encodes both queries and passages. Otherwise each has a tower of its
        own; both begin with the same parameters.
      objective: a function of contrastive.py, or another of that signature.
      objective_weight: of the objective; 0 for the distillation alone.
      distillation: a function of distillation.py, or another of that signature, which compares a query's
        scores with those of a teacher (--SCORES); None for no teacher.
      distillation_weight: of the distillation, which is added to the objective.
      self_teaching_weight: of self-teaching, which is added to them: the distribution of the scores of the
        batch's passages for a query with a typo is to be that for the query (CharacterBERT-DR). It needs
        --gin.DataConfig.typo_copies=True --gin.DataConfig.typos=1.0.
      bidirectional: whether InfoNCE of the other direction is added, as in GTR: each positive is to find its
        query among the queries of the batch. A query's positives are averaged; its hard negatives take no
        part in this direction.
      in_batch_negatives: whether the candidates of the batch's other queries are negatives too.
      hardest_negative_only: whether only the negative of highest score counts, for each query.
      gradcache_chunk_size: how many texts the network encodes at a time, to save memory (gradient caching,
        Gao et al. 2021). When the gradient with respect to all vectors is known, each chunk is encoded again,
        with the same dropout, for its part of the gradient. None encodes all texts at once.
      max_logits_per_block: about how many scores a device holds at a time.
      matryoshka: sizes below `vector_dim`, such as (64, 128): the loss is added up over the whole vectors and
        their first 64 and 128 dimensions (of unit length with `normalize`), so that these can be searched
        alone (Kusupati et al. 2022, section 3). Texts are encoded once.
      matryoshka_weights: the weight of each of these sizes; None: 1, which is that of the whole vectors.
      query_prompt: the text that comes before every query, in training and in search: "query: " (E5), or an
        instruction. Its tokens count in `DataConfig.input_length`. None: that of the weights that training
        begins with, if they have one.
      passage_prompt: the same of passages.
    """

    family = "dual encoder"
    examples_interact = True  # by in-batch negatives
    text_arrays = ("left_encoder_input_tokens", "right_encoder_input_tokens")

    def __init__(
        self,
        config: T5Config,
        optimizer_def: optax.GradientTransformation | None = None,
        vector_dim: int | None = None,
        scale: float = 100.0,
        learn_scale: bool = False,
        normalize: bool = True,
        pooling: str = "mean",
        shared_towers: bool = True,
        objective: Objective = info_nce,
        objective_weight: NonNegativeFloat = 1.0,
        distillation: Distillation | None = None,
        distillation_weight: PositiveFloat = 1.0,
        self_teaching_weight: NonNegativeFloat = 0.0,
        bidirectional: bool = True,
        in_batch_negatives: bool = True,
        hardest_negative_only: bool = False,
        gradcache_chunk_size: int | None = None,
        max_logits_per_block: int = 1 << 26,
        matryoshka: Sequence[Positive] = (),
        matryoshka_weights: Sequence[PositiveFloat] | None = None,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
    ):
        name = type(self).__name__
        if bidirectional and not in_batch_negatives:
            raise UserError(
                f"{name}.bidirectional: needs other queries: set it or in_batch_negatives the other way"
            )
        if not objective_weight and not distillation:
            raise UserError(
                f"{name}.objective_weight: 0 leaves nothing to learn: set it, or {name}.distillation"
            )
        self.config, self.optimizer_def = config, optimizer_def
        self.module = self._network(config, vector_dim, normalize, pooling)
        self.scale, self.learn_scale, self.shared_towers = scale, learn_scale, shared_towers
        self.gradcache_chunk_size = gradcache_chunk_size
        self.vector_loss = VectorLoss(
            objective=objective,
            objective_weight=objective_weight,
            bidirectional=bidirectional,
            in_batch_negatives=in_batch_negatives,
            hardest_negative_only=hardest_negative_only,
            max_logits_per_block=max_logits_per_block,
            distillation=distillation,
            distillation_weight=distillation_weight,
            self_teaching_weight=self_teaching_weight,
        )
        if optimizer_def and normalize and not learn_scale and objective_says(distillation, "unbounded_loss"):
            log(
                f"DualEncoder.distillation: margins of unit vectors lie within ±{2 * scale:g} with a fixed "
                f"scale of {scale:g}, and the teacher's may not: --gin.DualEncoder.normalize=False (with "
                "scale=1), or learn_scale=True"
            )
        self.matryoshka = _checked_sizes(matryoshka, matryoshka_weights, self.module.vector_dim)
        self._prompts = {"query_prompt": query_prompt, "passage_prompt": passage_prompt}

    def _network(self, *settings: object) -> DualEncoderNetwork:
        return DualEncoderNetwork.of(*settings)

    @property
    def prompts(self) -> Prompts:
        """The texts that come before queries and before passages; "" for none."""
        return Prompts(*(prompt or "" for prompt in self._prompts.values()))

    def inherit_prompts(self, settings: Mapping) -> None:
        """Takes over prompts that were not given from another dual encoder's `settings`."""
        for name, prompt in self._prompts.items():
            if prompt is None:
                self._prompts[name] = settings.get(name)

    @property
    def settings(self) -> dict:
        """The arguments, besides `config`, on which parameters and vectors depend; some only if given."""
        given = {name: prompt for name, prompt in self._prompts.items() if prompt}
        given |= {"pooling": self.module.pooling} if self.module.pooling != "mean" else {}
        given |= {"matryoshka": list(self.matryoshka)} if self.matryoshka else {}
        return given | {
            "vector_dim": self.module.vector_dim,
            "scale": self.scale,
            "learn_scale": self.learn_scale,
            "normalize": self.module.normalize,
            "shared_towers": self.shared_towers,
        }

    @property
    def unbounded_loss(self) -> bool:
        """See `Retriever`: that of raw dot products, or as the distillation says."""
        return not self.module.normalize or objective_says(self.vector_loss.distillation, "unbounded_loss")

    @property
    def FEATURE_CONVERTER_CLS(self):
        """The seqio feature converter that makes such batches."""
        from retrieval_jax.models.feature_converters import DualEncoderFeatureConverter  # TensorFlow

        return DualEncoderFeatureConverter

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, tuple], input_types: object = None
    ) -> dict:
        """Makes random parameters, boxed with their logical axis names; T5X calls it so."""
        tokens = jnp.ones(input_shapes["left_encoder_input_tokens"], jnp.int32)

        def tower(is_query: bool) -> dict:
            return self.module.init(rng, tokens, **self._arguments(is_query))["params"]

        params = tower(is_query=True)
        if not self.shared_towers:
            params = {TOWERS[0]: params, TOWERS[1]: tower(is_query=False)}
        if self.learn_scale:
            params |= {"log_scale": jnp.zeros((), jnp.float32)}
        return {"params": params}

    def encode_queries(
        self, params: dict, tokens_BxS: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Encodes queries.

        Args:
          params: the parameters of the whole model.
          tokens_BxS: int32, 0 is padding.
          dropout_rng: None for no dropout.

        Returns:
          Float32 vectors B×vector_dim.
        """
        own = params if self.shared_towers else params[TOWERS[0]]
        return self._encode(own, tokens_BxS, dropout_rng, self._arguments(is_query=True))

    def encode_passages(
        self, params: dict, tokens_BxS: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Encodes passages; see `encode_queries`."""
        own = params if self.shared_towers else params[TOWERS[1]]
        return self._encode(own, tokens_BxS, dropout_rng, self._arguments(is_query=False))

    def _arguments(self, is_query: bool) -> dict:
        """Gives what the network takes beside the tokens, of queries and of passages."""
        return {}

    def _encode(
        self, params: dict, tokens_BxS: jax.Array, dropout_rng: jax.Array | None, arguments: dict
    ) -> jax.Array:
        own = {name: params[name] for name in params if name != "log_scale"}
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        deterministic = dropout_rng is None
        return self.module.apply(
            {"params": own}, tokens_BxS, deterministic=deterministic, rngs=rngs, **arguments
        )

    def loss_fn(
        self,
        params: dict,
        batch: Batch,
        dropout_rng: jax.Array | None,
        groups: TextGroups | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Computes the mean over the queries of the objective, or of what takes its place or is beside it.

        Args:
          params: the parameters of the whole model.
          batch: see the class.
          dropout_rng: the key for dropout and for what the objective draws; None: neither.
          groups: the lengths at which most queries and passages are encoded; None: all at their full length.

        Returns:
          (the loss, a float32 scalar; metrics, name -> (total, count): `loss`, `accuracy`, the share of
          queries whose best positive outscores all their negatives, and those of `VectorLoss`; of each size
          of `matryoshka` the same under its name, as `accuracy_first/64`).
        """
        of_queries, of_passages, drawn = (
            (None,) * 3 if dropout_rng is None else jax.random.split(dropout_rng, 3)
        )
        lengths, shards = groups or ((None, None), 1)
        queries_BxE = encode_texts(
            functools.partial(self.encode_queries, params),
            batch["left_encoder_input_tokens"],
            of_queries,
            self.gradcache_chunk_size,
            length=lengths[0],
            shards=shards,
        )
        passages_MxE = self._encode_candidates(params, batch, of_passages, length=lengths[1], shards=shards)
        copies_BxE = self._copies(params, batch, of_queries)
        loss, metrics, scale = 0.0, {}, self._multiplier(params)
        for size, weight in {self.module.vector_dim: 1.0, **self.matryoshka}.items():
            first = functools.partial(shorten, dimensions=size, normalize=self.module.normalize)
            copies = None if copies_BxE is None else scale * first(copies_BxE)
            own = self.vector_loss(scale * first(queries_BxE), first(passages_MxE), batch, drawn, copies)
            loss += weight * own["loss"][0]
            metrics |= {f"{name}_first/{size}": own[name] for name in own} if metrics else own
        count = metrics["loss"][1]
        for name, (weight, value) in self._regularizers(queries_BxE, passages_MxE, batch).items():
            loss += weight * value * count
            metrics[name] = (value * count, count)
        metrics["loss"] = (loss, count)
        return loss / jnp.maximum(count, 1.0), metrics

    def _encode_candidates(self, params: dict, batch: Batch, rng: jax.Array | None, **lengths) -> jax.Array:
        """Encodes the candidates of all queries, (B·G)×E; `lengths` are those of `encode_texts`."""
        texts_BxGxP = batch["right_encoder_input_tokens"]
        texts_MxP = texts_BxGxP.reshape(-1, texts_BxGxP.shape[-1])
        encode = functools.partial(self.encode_passages, params)
        return encode_texts(encode, texts_MxP, rng, self.gradcache_chunk_size, **lengths)

    def _regularizers(
        self, queries_BxE: jax.Array, passages_MxE: jax.Array, batch: Batch
    ) -> Mapping[str, tuple[jax.Array | float, jax.Array]]:
        """Gives what is added to the mean loss: name of the metric -> (its weight, its value)."""
        return {}

    def _copies(self, params: dict, batch: Batch, rng: jax.Array | None) -> jax.Array | None:
        """Encodes the queries' copies with typos; None without self-teaching."""
        if not self.vector_loss.self_teaching_weight:
            return None
        if "copy_encoder_input_tokens" not in batch:
            raise UserError(
                "DualEncoder.self_teaching_weight: the queries have no copies with typos: "
                "--gin.DataConfig.typo_copies=True --gin.DataConfig.typos=1.0"
            )
        encode = functools.partial(self.encode_queries, params)
        tokens_BxS = batch["copy_encoder_input_tokens"]
        rng = None if rng is None else jax.random.fold_in(rng, 1 << 30)  # other dropout than the queries'
        return encode_texts(encode, tokens_BxS, rng, self.gradcache_chunk_size)

    def _multiplier(self, params: dict) -> jax.Array | float:
        """Gives the factor of the dot products: `scale`, multiplied by what was learned."""
        if not self.learn_scale:
            return self.scale
        return self.scale * jnp.exp(
            _clip_from_above(params["log_scale"], max(np.log(MAX_SCALE / self.scale), 0.0))
        )

    def predict_batch_with_aux(
        self, params: dict, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        """Gives (the queries' vectors B×vector_dim, {}); T5X calls it so."""
        return self.encode_queries(params, batch["left_encoder_input_tokens"]), {}

    def score_batch(self, params: dict, batch: Batch) -> jax.Array:
        """Computes the dot product of each query with its first candidate, float32 B."""
        queries = self.encode_queries(params, batch["left_encoder_input_tokens"])
        passages = self.encode_passages(params, batch["right_encoder_input_tokens"][:, 0])
        return jnp.sum(queries * passages, axis=-1)


def _checked_sizes(
    sizes: Sequence[int], weights: Sequence[float] | None, vector_dim: int
) -> dict[int, float]:
    """Returns {size: weight} of the sizes below the whole one. Raises UserError where one is no such size."""
    if weights is not None and len(weights) != len(sizes):
        raise UserError(
            f"DualEncoder.matryoshka_weights: {len(weights)} for {len(sizes)} sizes: give one for each"
        )
    if not all(0 < size < vector_dim for size in sizes) or len(set(sizes)) < len(sizes):
        raise UserError(
            f"DualEncoder.matryoshka: {tuple(sizes)}: set different sizes, all below vector_dim {vector_dim}"
        )
    return dict(zip(sizes, weights or [1.0] * len(sizes), strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _clip_from_above(x: jax.Array, limit: float) -> jax.Array:
    """Gives the smaller of both. From the limit on, a gradient that would raise x further becomes 0."""
    return jnp.minimum(x, limit)


def _clip_from_above_forward(x: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(x, limit), x


def _clip_from_above_backward(limit: float, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(x < limit, gradient, jnp.maximum(gradient, 0.0)),)


_clip_from_above.defvjp(_clip_from_above_forward, _clip_from_above_backward)
