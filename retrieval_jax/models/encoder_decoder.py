"""T5X's model interface over a T5: what every model that reads a text and writes tokens shares."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from retrieval_jax.models.objectives import token_cross_entropy
from retrieval_jax.models.t5 import T5, T5Config

Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (total, count)


class EncoderDecoder:
    """Learns by teacher forcing; subclasses say what is read and written, and how to write it.

    A batch holds encoder_input_tokens B×S, decoder_input_tokens, decoder_target_tokens and
    decoder_loss_weights, each B×T int32 (seqio's EncDecFeatureConverter).
    """

    def __init__(self, config: T5Config, optimizer_def: optax.GradientTransformation | None = None):
        self.config = config
        self.module = T5(config)
        self.optimizer_def = optimizer_def

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

    def logits(self, params: dict, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Float32 logits B×T×V; with dropout where a key is given."""
        return self.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            deterministic=dropout_rng is None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )

    def loss_fn(self, params: dict, batch: Batch, dropout_rng: jax.Array | None) -> tuple[jax.Array, Metrics]:
        """Mean negative log-likelihood (nats) a target token, and the metrics loss and accuracy."""
        weights = batch["decoder_loss_weights"]
        logits = self.logits(params, batch, dropout_rng)
        nll, right = token_cross_entropy(logits, batch["decoder_target_tokens"], weights)
        tokens = jnp.sum(weights).astype(jnp.float32)
        return nll / jnp.maximum(tokens, 1), {"loss": (nll, tokens), "accuracy": (right, tokens)}

    def eval_fn(self, params: dict, batch: Batch) -> tuple[jax.Array, Metrics]:
        """`loss_fn` without dropout."""
        return self.loss_fn(params, batch, None)

    def score_batch(self, params: dict, batch: Batch) -> jax.Array:
        """Log-probability of each example's target, B."""
        log_probs = jax.nn.log_softmax(self.logits(params, batch))
        targets = batch["decoder_target_tokens"]
        token = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(token * batch["decoder_loss_weights"], axis=-1)
