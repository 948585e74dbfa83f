"""The query generator (doc2query): a T5 that reads a passage and writes queries that it answers."""

import gin
import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.decoding.sampling import sample_top_k
from retrieval_jax.models.encoder_decoder import Batch, EncoderDecoder, Metrics
from retrieval_jax.models.t5 import MASKED, T5, DecoderLayer, KeysValues


@gin.configurable(denylist=["config", "optimizer_def"])
class QueryGenerator(EncoderDecoder):
    """Passage -> query, as docT5query (Nogueira and Lin 2019)."""

    family = "query generator"
    answer = "query"

    def sample(
        self,
        params: dict,
        passages_BxS: jax.Array,
        keys_B: jax.Array,
        count: int,
        length: int,
        temperature: float = 1.0,
        top_k: int = 10,
    ) -> tuple[jax.Array, jax.Array]:
        """(tokens B×count×length int32, their log-probabilities B×count) of sampled queries.

        See `sample_top_k`. A passage is encoded once for all its queries.
        """
        c, variables = self.config, {"params": params}
        cross = self.module.apply(variables, passages_BxS, method="start")
        empty = jnp.zeros((len(passages_BxS), count, length, c.num_heads, c.head_dim), c.dtype)
        cache = [(empty, empty)] * c.num_decoder_layers

        def step(tokens, position, cache):
            return self.module.apply(
                variables, tokens, position, cache, cross, passages_BxS, method=cached_step
            )

        return sample_top_k(step, cache, keys_B, count, length, temperature, top_k)

    def predict_batch_with_aux(
        self, params: dict, batch: Batch, rng: jax.Array, *, count: int, length: int
    ) -> tuple[jax.Array, Metrics]:
        """`count` sampled queries a passage: (tokens B×count×length, {"scores": log-probabilities})."""
        passages_BxS = batch["encoder_input_tokens"]
        keys_B = jax.random.split(rng, len(passages_BxS))
        tokens, scores = self.sample(params, passages_BxS, keys_B, count, length)
        return tokens, {"scores": scores}


def cached_step(
    t5: T5,
    tokens_BxN: jax.Array,
    position: jax.Array,
    cache: list[KeysValues],
    cross: list[KeysValues],
    inputs_BxS: jax.Array,
) -> tuple[jax.Array, list[KeysValues]]:
    """`T5.step` at a traced position: next-token logits B×N×V, and the cache with the tokens in it.

    The cache holds each layer's keys and values of all T positions, B×N×T×H×D, so that its shape stays and a
    loop around the step compiles one step.
    """
    decoder, positions = t5.decoder, np.arange(cache[0][0].shape[2])
    bias_1xHxTxT = decoder.relpos_bias(positions, positions)
    self_bias = jax.lax.dynamic_slice_in_dim(bias_1xHxTxT, position, 1, axis=2)
    self_bias += jnp.where(positions <= position, 0.0, MASKED)
    cross_bias = jnp.where(inputs_BxS > 0, 0.0, MASKED)[:, None, None, :]
    x_BxNxE = t5.token_embedder(tokens_BxN)
    longer = []
    for layer, kept, shared in zip(decoder.layers, cache, cross, strict=True):
        x_BxNxE, kept = _cached_layer(layer, x_BxNxE, position, kept, shared, self_bias, cross_bias)
        longer.append(kept)
    return decoder._logits(x_BxNxE, deterministic=True), longer


def _cached_layer(
    layer: DecoderLayer, x_BxNxE, position, kept: KeysValues, cross: KeysValues, self_bias, cross_bias
) -> tuple[jax.Array, KeysValues]:
    """`DecoderLayer.step` with its keys and values written into the cache."""
    B, N, E = x_BxNxE.shape
    h = layer.pre_self_attention_layer_norm(x_BxNxE)
    kept = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None], position, axis=2),
        kept,
        layer.self_attention.keys_values(h),
    )
    flat = jax.tree.map(lambda a: a.reshape(B * N, *a.shape[2:]), kept)
    attended = layer.self_attention(h.reshape(B * N, 1, E), flat, self_bias, deterministic=True)
    x_BxNxE += attended.reshape(B, N, E)
    return layer._after_self_attention(x_BxNxE, cross, cross_bias, deterministic=True), kept
