"""The generative retriever: a T5 that reads a query and writes a docid."""

from collections.abc import Mapping

import gin
import jax
import jax.numpy as jnp
import optax

from retrieval_jax.decoding.atomic import top_docids
from retrieval_jax.decoding.beam_search import constrained_beam_search
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.models.objectives import token_cross_entropy
from retrieval_jax.models.t5 import T5, T5Config

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@gin.configurable(denylist=["config", "optimizer_def"])
class GenerativeRetriever:
    """T5X's model interface over a T5 whose softmax is the text vocabulary or the docids (atomic).

    A batch holds encoder_input_tokens B×S, decoder_input_tokens, decoder_target_tokens and
    decoder_loss_weights, each B×T int32 (seqio's EncDecFeatureConverter).
    """

    family = "generative"
    reads_docids = True  # its targets are docids, not passages

    def __init__(self, config: T5Config, optimizer_def: optax.GradientTransformation | None = None):
        self.config = config
        self.module = T5(config)
        self.optimizer_def = optimizer_def

    @property
    def FEATURE_CONVERTER_CLS(self):
        import seqio  # imports TensorFlow, which a searcher does not need

        return seqio.EncDecFeatureConverter

    @staticmethod
    def feature_lengths(input_length: int, passage_length: int, docid_length: int) -> dict[str, int]:
        """seqio feature -> tokens, for the feature converter."""
        return {"inputs": input_length, "targets": docid_length}

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
        """Mean negative log-likelihood (nats) a docid token; metrics as sums with their weight."""
        weights = batch["decoder_loss_weights"]
        logits = self.logits(params, batch, dropout_rng)
        nll, right = token_cross_entropy(logits, batch["decoder_target_tokens"], weights)
        tokens = jnp.maximum(jnp.sum(weights), 1)
        loss = nll / tokens
        return loss, {"loss": loss, "accuracy": right / tokens}

    def eval_fn(self, params: dict, batch: Batch) -> tuple[jax.Array, Metrics]:
        """`loss_fn` without dropout."""
        return self.loss_fn(params, batch, None)

    def predict_batch_with_aux(
        self, params: dict, batch: Batch, rng: jax.Array | None = None, *, trie: Trie, beams: int
    ) -> tuple[jax.Array, Metrics]:
        """Constrained beam search: (docid rows of the trie B×beams, {"scores": log-probabilities}).

        Best first; where there are fewer docids than beams, row -1 and score -inf. Cross-attention's keys and
        values are made once a query.
        """
        variables, inputs_BxS = {"params": params}, batch["encoder_input_tokens"]
        cross = self.module.apply(variables, inputs_BxS, method="start")

        def step(tokens, position, past):
            return self.module.apply(variables, tokens, position, past, cross, inputs_BxS, method="step")

        rows, scores = constrained_beam_search(step, trie, len(inputs_BxS), beams)
        return rows, {"scores": scores}

    def rank_atomic(
        self, params: dict, batch: Batch, docids: jax.Array | int, k: int
    ) -> tuple[jax.Array, Metrics]:
        """The same for atomic docids: one step, then the best k of the docid softmax."""
        start = jnp.zeros((len(batch["encoder_input_tokens"]), 1), jnp.int32)
        logits_Bx1xV = self.logits(params, {**batch, "decoder_input_tokens": start})
        rows, scores = top_docids(logits_Bx1xV[:, 0], docids, k)
        return rows, {"scores": scores}

    def score_batch(self, params: dict, batch: Batch) -> jax.Array:
        """Log-probability of each example's docid, B."""
        log_probs = jax.nn.log_softmax(self.logits(params, batch))
        targets = batch["decoder_target_tokens"]
        token = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(token * batch["decoder_loss_weights"], axis=-1)
