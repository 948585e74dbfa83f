"""The dual encoder: a T5 makes vectors of queries and passages; relevance is their dot product."""

import functools
from collections.abc import Callable, Mapping

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import Prompts
from retrieval_jax.models.contrastive import Objective, info_nce
from retrieval_jax.models.dual_encoder_network import TOWERS, DualEncoderNetwork
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.negatives import NEG_INF, batch_negatives, within_group_negatives
from retrieval_jax.models.retriever import Batch, Metrics, Retriever, register_retriever
from retrieval_jax.models.text_groups import TextGroups, encode_in_groups

MAX_SCALE = 100.0  # of a learned scale (CLIP, Radford et al. 2021, section 2.5): keeps training stable


@register_retriever
@gin.configurable(denylist=["config", "optimizer_def"])
class DualEncoder(Retriever):
    """T5X's model interface over a dual encoder.

    A batch holds, all int32, left_encoder_input_tokens B×S (queries), right_encoder_input_tokens B×G×P (each
    query's candidates), passage B×G (their rows, -1 is padding), grade B×G (> 0 positive, 0 negative) and
    other_positives B×K (rows of other passages that answer the query, -1 is padding; may be left out).

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
      bidirectional: whether InfoNCE of the other direction is added, as in GTR: each positive is to find its
        query among the queries of the batch. A query's positives are averaged; its hard negatives take no
        part in this direction.
      in_batch_negatives: whether the candidates of the batch's other queries are negatives too.
      hardest_negative_only: whether only the negative of highest score counts, for each query.
      gradcache_chunk_size: how many texts the network encodes at a time, to save memory (gradient caching,
        Gao et al. 2021). When the gradient with respect to all vectors is known, each chunk is encoded again,
        with the same dropout, for its part of the gradient. None encodes all texts at once.
      max_logits_per_block: about how many scores a device holds at a time.
      query_prompt: the text that comes before every query, in training and in search (E5 has "query: ").
        None: that of the weights that training begins with, if they have one.
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
        bidirectional: bool = True,
        in_batch_negatives: bool = True,
        hardest_negative_only: bool = False,
        gradcache_chunk_size: int | None = None,
        max_logits_per_block: int = 1 << 26,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
    ):
        if bidirectional and not in_batch_negatives:
            raise UserError(
                "DualEncoder.bidirectional: needs other queries: set it or in_batch_negatives the other way"
            )
        self.config, self.optimizer_def = config, optimizer_def
        self.module = DualEncoderNetwork.of(config, vector_dim, normalize, pooling)
        self.scale, self.learn_scale, self.shared_towers = scale, learn_scale, shared_towers
        self.objective, self.bidirectional = objective, bidirectional
        self.in_batch_negatives, self.hardest_negative_only = in_batch_negatives, hardest_negative_only
        self.gradcache_chunk_size, self.max_logits_per_block = gradcache_chunk_size, max_logits_per_block
        self._prompts = {"query_prompt": query_prompt, "passage_prompt": passage_prompt}

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
        """The arguments, besides `config`, on which parameters and vectors depend; prompts only if given."""
        prompts = {name: prompt for name, prompt in self._prompts.items() if prompt}
        return prompts | {
            "vector_dim": self.module.vector_dim,
            "scale": self.scale,
            "learn_scale": self.learn_scale,
            "normalize": self.module.normalize,
            "pooling": self.module.pooling,
            "shared_towers": self.shared_towers,
        }

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
        params = self.module.init(rng, tokens)["params"]
        if not self.shared_towers:
            params = {tower: params for tower in TOWERS}
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
        return self._encode(params if self.shared_towers else params[TOWERS[0]], tokens_BxS, dropout_rng)

    def encode_passages(
        self, params: dict, tokens_BxS: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Encodes passages; see `encode_queries`."""
        return self._encode(params if self.shared_towers else params[TOWERS[1]], tokens_BxS, dropout_rng)

    def _encode(self, params: dict, tokens_BxS: jax.Array, dropout_rng: jax.Array | None) -> jax.Array:
        own = {name: params[name] for name in params if name != "log_scale"}
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        return self.module.apply({"params": own}, tokens_BxS, deterministic=dropout_rng is None, rngs=rngs)

    def loss_fn(
        self,
        params: dict,
        batch: Batch,
        dropout_rng: jax.Array | None,
        groups: TextGroups | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Computes the mean of the objective over the queries with a positive.

        Args:
          params: the parameters of the whole model.
          batch: see the class.
          dropout_rng: the key for dropout and for what the objective draws; None: neither.
          groups: the lengths at which most queries and passages are encoded; None: all at their full length.

        Returns:
          (the loss, a float32 scalar in nats; metrics, name -> (total, count): `loss`, and `accuracy`, the
          share of queries whose best positive outscores all their negatives).
        """
        of_queries, of_passages, drawn = (
            (None,) * 3 if dropout_rng is None else jax.random.split(dropout_rng, 3)
        )
        texts_BxGxP = batch["right_encoder_input_tokens"]
        B, G, P = texts_BxGxP.shape
        lengths, shards = groups or ((None, None), 1)
        queries_BxE = self._in_groups(
            functools.partial(self.encode_queries, params),
            batch["left_encoder_input_tokens"],
            of_queries,
            length=lengths[0],
            shards=shards,
        )
        queries_BxE *= self._multiplier(params)
        passages_MxE = self._in_groups(
            functools.partial(self.encode_passages, params),
            texts_BxGxP.reshape(B * G, P),
            of_passages,
            length=lengths[1],
            shards=shards,
        )
        scores_BxG = jnp.einsum(
            "be,bge->bg", queries_BxE, passages_MxE.reshape(B, G, -1), precision=jax.lax.Precision.HIGHEST
        )
        passage_BxG, positive_BxG, known_BxK = _candidates(batch)
        if self.in_batch_negatives:
            static = self.hardest_negative_only, self.max_logits_per_block
            negatives = batch_negatives(
                queries_BxE, passages_MxE, known_BxK, passage_BxG.reshape(B * G), *static
            )
        else:
            negatives = within_group_negatives(scores_BxG, known_BxK, passage_BxG, self.hardest_negative_only)

        losses_B = self.objective(scores_BxG, positive_BxG, negatives.of_queries, drawn)
        if self.bidirectional:
            to_query_BxG = jax.nn.softplus(negatives.of_passages.reshape(B, G) - scores_BxG)
            positives_B = jnp.maximum(jnp.sum(positive_BxG, axis=1), 1)
            losses_B += jnp.sum(jnp.where(positive_BxG, to_query_BxG, 0.0), axis=1) / positives_B

        answered_B = jnp.any(positive_BxG, axis=1)
        best_B = jnp.max(jnp.where(positive_BxG, scores_BxG, NEG_INF), axis=1)
        right = jnp.sum(answered_B & (best_B >= negatives.largest))
        total, rows = jnp.sum(losses_B), jnp.sum(answered_B).astype(jnp.float32)
        return total / jnp.maximum(rows, 1.0), {"loss": (total, rows), "accuracy": (right, rows)}

    def _multiplier(self, params: dict) -> jax.Array | float:
        """Gives the factor of the dot products: `scale`, multiplied by what was learned."""
        if not self.learn_scale:
            return self.scale
        return self.scale * jnp.exp(
            _clip_from_above(params["log_scale"], max(np.log(MAX_SCALE / self.scale), 0.0))
        )

    def _in_groups(
        self,
        encode: Callable,
        tokens_NxS: jax.Array,
        rng: jax.Array | None,
        *,
        length: int | None,
        shards: int,
    ) -> jax.Array:
        """Encodes texts to vectors N×E, most of them at `length`; see `encode_in_groups`."""
        if length is None or length == tokens_NxS.shape[1]:
            return self._in_chunks(encode, tokens_NxS, rng, self._chunks(len(tokens_NxS)))

        def encode_group(tokens_MxT: jax.Array, number: int) -> jax.Array:
            key = None if rng is None else jax.random.fold_in(rng, number)
            M, T = tokens_MxT.shape
            # Each shard of a group is filled up with empty texts, so that its chunks are of equal size.
            m = M // shards
            chunks = min(self._chunks(M), m)
            missing = -m % chunks
            filled_DxmxT = jnp.pad(tokens_MxT.reshape(shards, m, T), ((0, 0), (0, missing), (0, 0)))
            vectors = self._in_chunks(encode, filled_DxmxT.reshape(-1, T), key, chunks)
            return vectors.reshape(shards, m + missing, -1)[:, :m].reshape(M, -1)

        return encode_in_groups(encode_group, tokens_NxS, length, shards)

    def _chunks(self, texts: int) -> int:
        """Gives the number of chunks in which so many texts are encoded."""
        return -(-texts // (self.gradcache_chunk_size or texts))

    def _in_chunks(
        self,
        encode: Callable,
        tokens_NxS: jax.Array,
        rng: jax.Array | None,
        count: int,
    ) -> jax.Array:
        """Encodes texts to vectors N×E in `count` chunks; keeps the activations of one at a time.

        Chunk i takes texts i, i + count, …, so that each device keeps its own texts.
        """
        if count == 1:
            return encode(tokens_NxS, rng)
        if len(tokens_NxS) % count:
            raise UserError(
                f"DualEncoder.gradcache_chunk_size: {self.gradcache_chunk_size} does not cut "
                f"{len(tokens_NxS)} texts into equal parts: choose a divisor of the batch"
            )

        def encode_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
            tokens_CxS, number = chunk
            return encode(tokens_CxS, None if rng is None else jax.random.fold_in(rng, number))

        chunks = jnp.moveaxis(tokens_NxS.reshape(-1, count, tokens_NxS.shape[1]), 1, 0)
        encode_chunk = jax.checkpoint(encode_chunk, prevent_cse=False)
        vectors = jax.lax.map(encode_chunk, (chunks, np.arange(count, dtype=np.uint32)))
        return jnp.moveaxis(vectors, 0, 1).reshape(len(tokens_NxS), -1)

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _clip_from_above(x: jax.Array, limit: float) -> jax.Array:
    """Gives the smaller of both. From the limit on, a gradient that would raise x further becomes 0."""
    return jnp.minimum(x, limit)


def _clip_from_above_forward(x: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(x, limit), x


def _clip_from_above_backward(limit: float, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(x < limit, gradient, jnp.maximum(gradient, 0.0)),)


_clip_from_above.defvjp(_clip_from_above_forward, _clip_from_above_backward)


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
