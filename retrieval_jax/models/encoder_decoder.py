"""T5X's model interface over a T5: what every model that reads a text and writes tokens shares."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.objectives import Objective, Predictions, cross_entropy, loss_of
from retrieval_jax.models.retriever import Batch, Metrics, Retriever, objective_says
from retrieval_jax.models.softmax import blockwise_softmax_stats, exact_products, softmax_stats
from retrieval_jax.models.stacks import unstack_layers
from retrieval_jax.models.t5 import T5, Segments, output_kernel


class EncoderDecoder(Retriever):
    """Learns by teacher forcing; subclasses say what is read and written, and how to write it.

    A batch holds encoder_input_tokens B×S, decoder_input_tokens, decoder_target_tokens and
    decoder_loss_weights, each B×T int32 (seqio's EncDecFeatureConverter). Packed rows also have
    encoder_segment_ids B×S, decoder_segment_ids B×T and decoder_positions B×T.

    Where each input comes with a group of C targets to be ranked, the decoder's arrays are B×C×T, and so are
    those of `Predictions`: an input is encoded once. Such a batch also has grade B×C int32 (> 0: a positive,
    these come first; 0: a negative; -1: no target, whose tokens are all 0) and, where there is a teacher,
    score B×C×T float32; see `DocidGroupTargets`. Where there are set docids, it has set_tokens B×C×M int32 (0
    is none) and, if these have impacts, set_impacts B×C×M float32.

    Args:
      config: sizes of the network.
      optimizer_def: None for a model that does not learn.
      objective: what is minimised; see objectives.py.
      max_logits_per_block: about how many output logits a device holds at a time; None: those of the whole
        batch. See `blockwise_softmax_stats`.
    """

    sums_log_probs = True  # whether scores are log-probabilities

    def __init__(
        self,
        config: T5Config,
        optimizer_def: optax.GradientTransformation | None = None,
        objective: Objective = cross_entropy,
        max_logits_per_block: int | None = None,
    ):
        self.config = config
        self.module = T5(config)
        # A search steps through the decoder layer by layer, and keeps nothing for a gradient.
        self.decode_module = T5(dataclasses.replace(config, scan_layers=False, remat="none"))
        self.optimizer_def = optimizer_def
        self.objective, self.max_logits_per_block = objective, max_logits_per_block

    @property
    def unbounded_loss(self) -> bool:
        """See `Retriever`: as the objective says."""
        return objective_says(self.objective, "unbounded_loss")

    @property
    def examples_interact(self) -> bool:
        """See `Retriever`: as the objective says."""
        return objective_says(self.objective, "examples_interact")

    @property
    def reads_sets(self) -> bool:
        """See `Retriever`: as the objective says."""
        return objective_says(self.objective, "reads_sets")

    @property
    def FEATURE_CONVERTER_CLS(self):
        """The seqio feature converter that makes such batches."""
        import seqio  # imports TensorFlow, which a searcher does not need

        return seqio.EncDecFeatureConverter

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, tuple], input_types: object = None
    ) -> dict:
        """Makes random parameters, boxed with their logical axis names; T5X calls it so."""
        inputs = jnp.ones(input_shapes["encoder_input_tokens"], jnp.int32)
        targets = jnp.ones(input_shapes["decoder_input_tokens"], jnp.int32)
        return self.module.init(rng, inputs, targets)

    def decode_variables(self, params: dict) -> dict:
        """Gives the variables that `decode_module` is applied to."""
        return {"params": unstack_layers(params) if self.config.scan_layers else params}

    def hidden(
        self,
        params: dict,
        batch: Batch,
        dropout_rng: jax.Array | None = None,
        encoded_BxSxE: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the vectors B×T×E (B×C×T×E) that the softmax reads; with dropout if a key is given.

        Args:
          params: the network's parameters.
          batch: see the class.
          dropout_rng: None for no dropout.
          encoded_BxSxE: what `T5.encode` gave for the inputs; None: they are encoded here.
        """
        segments = None
        if "encoder_segment_ids" in batch:
            segments = Segments(batch["encoder_segment_ids"], batch["decoder_segment_ids"])
        decoder_inputs = batch["decoder_input_tokens"]
        apply = self._applied(params, batch, dropout_rng)
        return apply("hidden", decoder_inputs, segments=segments, encoded_BxSxE=encoded_BxSxE)

    def _applied(self, params: dict, batch: Batch, dropout_rng: jax.Array | None) -> Callable:
        """Gives (method, …) -> what this method of the network gives for the inputs of the batch."""

        def apply(method: str, *args: jax.Array, **arguments: object) -> jax.Array:
            return self.module.apply(
                {"params": params},
                batch["encoder_input_tokens"],
                *args,
                deterministic=dropout_rng is None,
                rngs=None if dropout_rng is None else {"dropout": dropout_rng},
                method=method,
                **arguments,
            )

        return apply

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        """Computes float32 logits B×T×V for search and scoring, whose products round nothing.

        Training's logits are those of `predict`; see `exact_products` for the difference.

        Args:
          params: the network's parameters.
          batch: see the class.
        """
        x_BxTxE = self.hidden(params, batch)
        with exact_products():
            return self._logits(params, x_BxTxE)

    def _logits(self, params: dict, x_BxTxE: jax.Array) -> jax.Array:
        return self.module.apply({"params": params}, x_BxTxE, method="logits")

    def predict(self, params: dict, batch: Batch, dropout_rng: jax.Array | None = None) -> Predictions:
        """Predicts each target from those before it: what an objective is computed from.

        Args:
          params: the network's parameters.
          batch: see the class.
          dropout_rng: None for no dropout.
        """
        targets_BxT = batch["decoder_target_tokens"]
        encoded_BxSxE = weights_BxV = None
        if self.config.lexical_head and "set_tokens" in batch:  # both read the input, which is encoded once
            apply = self._applied(params, batch, dropout_rng)
            encoded_BxSxE = apply("encode")
            weights_BxV = apply("lexical", encoded_BxSxE=encoded_BxSxE)
        x_BxTxE = self.hidden(params, batch, dropout_rng, encoded_BxSxE)
        kernel_ExV = output_kernel(self.config, params)
        if self.max_logits_per_block is None:
            logits_BxTxV = self._logits(params, x_BxTxE)
            softmax = softmax_stats(logits_BxTxV, targets_BxT)
        else:
            logits_BxTxV = None
            x_NxE, targets_N = x_BxTxE.reshape(-1, x_BxTxE.shape[-1]), targets_BxT.reshape(-1)
            flat = blockwise_softmax_stats(x_NxE, kernel_ExV, targets_N, self.max_logits_per_block)
            softmax = jax.tree.map(lambda x: x.reshape(targets_BxT.shape), flat)
        facts = (x_BxTxE, kernel_ExV, softmax, logits_BxTxV, self.sums_log_probs, weights_BxV)
        return Predictions(batch, *facts)

    def loss_fn(self, params: dict, batch: Batch, dropout_rng: jax.Array | None) -> tuple[jax.Array, Metrics]:
        """Computes the objective.

        Args:
          params: the network's parameters.
          batch: see the class.
          dropout_rng: None for no dropout.

        Returns:
          (the loss, a float32 scalar in nats; the objective's metrics, name -> (total, count), the loss's own
          among them).

        Raises:
          UserError: what the objective returns is not such metrics.
        """
        metrics = self.objective(functools.partial(self.predict, params), batch, dropout_rng)
        total, count = loss_of(metrics, self.objective)
        return total / jnp.maximum(count, 1), metrics

    def score_batch(self, params: dict, batch: Batch) -> jax.Array:
        """Computes the score of each target sequence, B or B×C, float32: the sum of its `token_scores`."""
        scores, targets = self.token_scores(self.logits(params, batch)), batch["decoder_target_tokens"]
        token = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(token * batch["decoder_loss_weights"], axis=-1)

    def token_scores(self, logits: jax.Array) -> jax.Array:
        """Computes what tokens add to a text's score, float32 …×V: their log-probabilities."""
        return jax.nn.log_softmax(logits)
