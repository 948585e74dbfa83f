"""T5X's model interface over a T5: what every model that reads a text and writes tokens shares."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.objectives import cross_entropy, symmetric_kl
from retrieval_jax.models.retriever import Batch, Metrics, Retriever
from retrieval_jax.models.softmax import blockwise_softmax_stats, exact_products, softmax_stats
from retrieval_jax.models.t5 import T5, Segments, output_kernel, unstack_layers

POSITIONS_TOLD = 16  # first positions of the target whose accuracy is told


class EncoderDecoder(Retriever):
    """Learns by teacher forcing; subclasses say what is read and written, and how to write it.

    A batch holds encoder_input_tokens B×S, decoder_input_tokens, decoder_target_tokens and
    decoder_loss_weights, each B×T int32 (seqio's EncDecFeatureConverter); packed rows also
    encoder_segment_ids B×S, decoder_segment_ids and decoder_positions B×T.

    Args:
      config: sizes of the network.
      optimizer_def: None for a model that does not learn.
      label_smoothing, z_loss: see `cross_entropy`.
      consistency: weight of the consistency loss (R-Drop, as in NCI): each example is read twice, with
        different dropout, and the two answers shall be alike; see `symmetric_kl`.
      max_logits_per_block: about how many output logits a device holds at a time; None: those of the whole
        batch. See `blockwise_softmax_stats`.
    """

    def __init__(
        self,
        config: T5Config,
        optimizer_def: optax.GradientTransformation | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        consistency: float = 0.0,
        max_logits_per_block: int | None = None,
    ):
        self.config = config
        self.module = T5(config)
        # Searching steps through a decoder layer by layer, and keeps nothing for a gradient.
        self.decode_module = T5(dataclasses.replace(config, scan_layers=False, remat="none"))
        self.optimizer_def = optimizer_def
        self.label_smoothing, self.z_loss, self.consistency = label_smoothing, z_loss, consistency
        self.max_logits_per_block = max_logits_per_block
        if consistency and max_logits_per_block:
            raise UserError(
                "consistency compares whole softmaxes: set max_logits_per_block=None, or consistency=0"
            )

    @property
    def FEATURE_CONVERTER_CLS(self):
        import seqio  # imports TensorFlow, which a searcher does not need

        return seqio.EncDecFeatureConverter

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, tuple], input_types: object = None
    ) -> dict:
        """Random parameters, boxed with their logical axis names."""
        inputs = jnp.ones(input_shapes["encoder_input_tokens"], jnp.int32)
        targets = jnp.ones(input_shapes["decoder_input_tokens"], jnp.int32)
        return self.module.init(rng, inputs, targets)

    def decode_variables(self, params: dict) -> dict:
        """What `decode_module` is applied to."""
        return {"params": unstack_layers(params) if self.config.scan_layers else params}

    def hidden(self, params: dict, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
        """B×T×E, from which the softmax reads; with dropout where a key is given."""
        segments = None
        if "encoder_segment_ids" in batch:
            segments = Segments(batch["encoder_segment_ids"], batch["decoder_segment_ids"])
        return self.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            deterministic=dropout_rng is None,
            segments=segments,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
            method="hidden",
        )

    def logits(self, params: dict, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Float32 logits B×T×V for search and scoring, of products that round nothing; see `exact_products`.

        With dropout where a key is given.
        """
        x_BxTxE = self.hidden(params, batch, dropout_rng)
        with exact_products():
            return self._logits(params, x_BxTxE)

    def _logits(self, params: dict, x_BxTxE: jax.Array) -> jax.Array:
        return self.module.apply({"params": params}, x_BxTxE, method="logits")

    def loss_fn(self, params: dict, batch: Batch, dropout_rng: jax.Array | None) -> tuple[jax.Array, Metrics]:
        """Mean loss (nats) a target token; metrics: loss, accuracy, and accuracy at each first position.

        With a consistency loss, its own mean too; all others are then of both readings.
        """
        twice = bool(self.consistency) and dropout_rng is not None
        if twice:
            batch = {name: jnp.repeat(x, 2, axis=0) for name, x in batch.items()}
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"].astype(jnp.float32)
        x_BxTxE = self.hidden(params, batch, dropout_rng)
        kernel_ExV = output_kernel(self.config, params)
        if self.max_logits_per_block is None:
            logits_BxTxV = self._logits(params, x_BxTxE)
            softmax = softmax_stats(logits_BxTxV, targets)
        else:
            x_NxE = x_BxTxE.reshape(-1, x_BxTxE.shape[-1])
            flat = blockwise_softmax_stats(x_NxE, kernel_ExV, targets.reshape(-1), self.max_logits_per_block)
            softmax = jax.tree.map(lambda x: x.reshape(targets.shape), flat)
        sums_BxT = None
        if self.label_smoothing:  # the sum of all logits, without the logits
            with exact_products():  # a vector: it costs nothing
                sums_BxT = x_BxTxE.astype(jnp.float32) @ jnp.sum(kernel_ExV, axis=1)
        losses_BxT = cross_entropy(softmax, self.z_loss, self.label_smoothing, kernel_ExV.shape[1], sums_BxT)
        tokens = jnp.sum(weights)
        metrics = {"loss": (jnp.sum(losses_BxT * weights), tokens)}
        if twice:
            apart_BxT = symmetric_kl(logits_BxTxV[::2], logits_BxTxV[1::2])
            metrics["consistency"] = (jnp.sum(apart_BxT * weights[::2]), tokens / 2)
            metrics["loss"] = (metrics["loss"][0] + 2 * self.consistency * metrics["consistency"][0], tokens)
        right_BxT = (softmax.target >= softmax.largest) * weights
        metrics["accuracy"] = (jnp.sum(right_BxT), tokens)
        positions_BxT = batch.get("decoder_positions", jnp.arange(targets.shape[1])[None])
        for n in range(min(targets.shape[1], POSITIONS_TOLD)) if targets.shape[1] > 1 else ():
            at_n = positions_BxT == n
            metrics[f"accuracy_at/{n + 1}"] = (jnp.sum(right_BxT * at_n), jnp.sum(weights * at_n))
        return metrics["loss"][0] / jnp.maximum(tokens, 1), metrics

    def score_batch(self, params: dict, batch: Batch) -> jax.Array:
        """Log-probability of each example's target, B."""
        log_probs = jax.nn.log_softmax(self.logits(params, batch))
        targets = batch["decoder_target_tokens"]
        token = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(token * batch["decoder_loss_weights"], axis=-1)
