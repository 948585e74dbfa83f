"""Objectives of models that write tokens, in float32. Those of dual encoders are in contrastive.py.

An objective says what a model is trained for. It is a function of the model's predictions, chosen by gin:
`--gin.GenerativeRetriever.objective=@NAME`. CONTRIBUTING.md has an example of one from another package.

Letters in shapes: B rows of a batch, T target positions, E embedding, V outputs of the softmax.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import gin
import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.retriever import Batch, Metrics
from retrieval_jax.models.softmax import SoftmaxStats, exact_products

POSITIONS_SHOWN = 16  # how many first positions of the target have an accuracy of their own


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model predicts for each target of a batch, given the targets before it (teacher forcing).

    Where a batch has groups of C docids to be ranked, B×T in these shapes is B×C×T.

    Attributes:
      batch: the batch that was read; see `EncoderDecoder`.
      hidden_BxTxE: the vectors that the softmax reads, in the dtype of the computation.
      kernel_ExV: the matrix of the softmax, float32.
      softmax: the targets' logits and log-sum-exps, each B×T.
      logits_BxTxV: all logits, float32; None where the softmax is computed in blocks, because they are too
        many for the memory.
      sums_log_probs: whether a search with the model adds up log-probabilities; else it adds up logits.
      lexical_weights_BxV: the lexical weights of each input over the text vocabulary, float32; None without a
        lexical head, or where the batch has no set docids.
    """

    batch: Batch
    hidden_BxTxE: jax.Array
    kernel_ExV: jax.Array
    softmax: SoftmaxStats
    logits_BxTxV: jax.Array | None
    sums_log_probs: bool = True
    lexical_weights_BxV: jax.Array | None = None

    @property
    def lexical_BxC(self) -> jax.Array | None:
        """The lexical score of each candidate, float32; None without a lexical head or set docids.

        It is the sum of the weights of the tokens in its set docid, times their impacts where the sets have
        them (PAG, Zeng et al. 2024, section 3.2).
        """
        if self.lexical_weights_BxV is None or "set_tokens" not in self.batch:
            return None
        tokens_BxCxM = self.batch["set_tokens"]
        flat = tokens_BxCxM.reshape(len(tokens_BxCxM), -1)
        weights = jnp.take_along_axis(self.lexical_weights_BxV, flat, axis=1).reshape(tokens_BxCxM.shape)
        impacts = self.batch.get("set_impacts", 1.0)
        return jnp.sum(jnp.where(tokens_BxCxM > 0, weights * impacts, 0.0), axis=-1)

    @property
    def weights_BxT(self) -> jax.Array:
        """How much each target counts, float32; 0 for padding."""
        return self.batch["decoder_loss_weights"].astype(jnp.float32)

    @property
    def positions_BxT(self) -> jax.Array:
        """The position of each target within its own example, from 0; a packed row holds several examples."""
        return self.batch.get("decoder_positions", jnp.arange(self.hidden_BxTxE.shape[-2]))

    @property
    def log_probs_BxT(self) -> jax.Array:
        """The targets' log-probabilities."""
        return self.softmax.target - self.softmax.log_z

    @property
    def scores_BxT(self) -> jax.Array:
        """What a search with the model adds up for the targets: their log-probabilities or raw logits."""
        return self.log_probs_BxT if self.sums_log_probs else self.softmax.target

    @property
    def sums_of_logits_BxT(self) -> jax.Array:
        """The sum of all V logits of each target, computed without the logits."""
        with exact_products():  # a product with one vector: it costs nothing
            return self.hidden_BxTxE.astype(jnp.float32) @ jnp.sum(self.kernel_ExV, axis=1)

    def whole_logits(self) -> jax.Array:
        """Gives all logits B×T×V, float32.

        Raises:
          UserError: the softmax is computed in blocks.
        """
        if self.logits_BxTxV is None:
            raise UserError(
                "the objective reads whole softmaxes, which max_logits_per_block forbids: set "
                "max_logits_per_block=None, or choose another objective"
            )
        return self.logits_BxTxV


Predict = Callable[[Batch, jax.Array | None], Predictions]
"""Runs the network on a batch, with dropout if a key is given. An objective may run it on another batch than
the one it is given: on repeated rows, or on the docids of a query as rows of their own."""


class Objective(Protocol):
    """Computes what is minimised.

    If it has a true attribute `unbounded_loss`, its loss has no natural scale, and a rise is not taken for a
    fault (see `LossSpikeGuard.on_spike`). If it has a true attribute `reads_log_probs`, a teacher's scores
    must be log-probabilities of docids; if it has a true attribute `reads_sets`, it reads the candidates' set
    docids; `examples_interact` is that of `Retriever`. One that is added to another, its argument
    `objective`, passes the other's on (see `objective_says`).

    Args:
      predict: runs the network.
      batch: see `EncoderDecoder`.
      rng: the key for dropout, and for what the objective itself draws; None when evaluating.

    Returns:
      Metrics, name -> (total, count), each a float32 scalar. The metric `loss` is what is minimised: its
      total over its count, in nats. Totals and counts are summed over the parts of a batch that is cut into
      microbatches, so that padding and parts of different length count right.
    """

    def __call__(self, predict: Predict, batch: Batch, rng: jax.Array | None) -> Metrics:
        """Computes the metrics."""
        ...


@gin.configurable(allowlist=["label_smoothing", "z_loss"])
def cross_entropy(
    predict: Predict,
    batch: Batch,
    rng: jax.Array | None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Metrics:
    """Computes the mean negative log-likelihood of the target tokens: maximum-likelihood training.

    Args:
      predict: see `Objective`.
      batch: see `Objective`.
      rng: see `Objective`.
      label_smoothing: see `token_cross_entropy`.
      z_loss: see `token_cross_entropy`.
    """
    predictions = predict(batch, rng)
    losses_BxT = token_cross_entropy(
        predictions.softmax,
        z_loss,
        label_smoothing,
        predictions.kernel_ExV.shape[1],
        predictions.sums_of_logits_BxT if label_smoothing else None,
    )
    return token_metrics(predictions, losses_BxT)


@gin.configurable(allowlist=["weight", "objective"])
def rdrop(
    predict: Predict,
    batch: Batch,
    rng: jax.Array | None,
    weight: float = 1.0,
    objective: Objective = cross_entropy,
) -> Metrics:
    """Adds R-Drop to another objective: two dropout passes over an example are to agree.

    Liang et al. 2021, equation 4; NCI (Wang et al. 2022, equation 7) calls it consistency. Every row of the
    batch is read twice, in one pass through the network. The metrics are averages over both, and `rdrop`, the
    mean of `symmetric_kl` over the target tokens, is added. When evaluating, without dropout, this is the
    other objective. The other objective must compute the loss of each row by itself, of the batch that it is
    given: rows that it would compare come twice.

    Args:
      predict: see `Objective`.
      batch: see `Objective`.
      rng: see `Objective`.
      weight: the weight of the divergence.
      objective: what it is added to.

    Raises:
      UserError: the softmax is computed in blocks, or the other objective returns no metrics or predicts on a
        batch of its own.
    """
    if rng is None:
        return objective(predict, batch, rng)
    twice = {name: jnp.repeat(x, 2, axis=0) for name, x in batch.items()}
    predictions = predict(twice, rng)

    def predict_again(batch: Batch, rng: jax.Array | None) -> Predictions:
        if batch is not twice:
            raise UserError("rdrop.objective: it predicts on another batch than the one that it is given")
        return predictions

    metrics = objective(predict_again, twice, rng)
    total, count = loss_of(metrics, objective)
    logits, weights_BxT = predictions.whole_logits(), predictions.weights_BxT
    divergence = jnp.sum(symmetric_kl(logits[::2], logits[1::2]) * weights_BxT[::2])
    tokens = jnp.sum(weights_BxT)
    loss = total + 2 * weight * divergence * (count / jnp.maximum(tokens, 1))
    return metrics | {"loss": (loss, count), "rdrop": (divergence, tokens / 2)}


def loss_of(metrics: Metrics, objective: Objective) -> tuple[jax.Array, jax.Array]:
    """Returns (total, count) of the loss among the metrics that an objective returned.

    Raises:
      UserError: they are not metrics, or the loss is not among them.
    """
    whole = isinstance(metrics, Mapping) and "loss" in metrics
    if not whole or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in metrics.values()):
        name = getattr(objective, "__name__", "of the model")
        raise UserError(
            f"objective {name}: what it returns is not metrics: give {{'loss': (total, count), …}}, as "
            "token_metrics does"
        )
    return metrics["loss"]


def token_metrics(predictions: Predictions, losses_BxT: jax.Array) -> Metrics:
    """Averages the losses of target tokens by their weights.

    Args:
      predictions: of these tokens.
      losses_BxT: float32, in nats.

    Returns:
      Metrics: `loss`; `accuracy`, how often the target has the largest logit; and, for targets of several
      tokens, `accuracy_at/1`, `accuracy_at/2`, … of each of the first positions.

    Raises:
      UserError: the predictions are of groups of docids, some of which are wrong.
    """
    if losses_BxT.ndim > 2:
        raise UserError(
            "DataConfig.negatives: above 0, and the model's objective learns one docid a query: choose one "
            "that ranks, as --gin.GenerativeRetriever.objective=@margin_mse, or set it to 0"
        )
    weights_BxT, softmax = predictions.weights_BxT, predictions.softmax
    tokens = jnp.sum(weights_BxT)
    right_BxT = (softmax.target >= softmax.largest) * weights_BxT
    metrics = {"loss": (jnp.sum(losses_BxT * weights_BxT), tokens), "accuracy": (jnp.sum(right_BxT), tokens)}
    T = losses_BxT.shape[1]
    for n in range(min(T, POSITIONS_SHOWN)) if T > 1 else ():
        at_n = predictions.positions_BxT == n
        metrics[f"accuracy_at/{n + 1}"] = (jnp.sum(right_BxT * at_n), jnp.sum(weights_BxT * at_n))
    return metrics


def token_cross_entropy(
    softmax: SoftmaxStats,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    sums_of_logits: jax.Array | None = None,
) -> jax.Array:
    """Computes each token's negative log-likelihood, with T5X's label smoothing and z-loss.

    Args:
      softmax: of the tokens, of any shape.
      z_loss: the weight of log_z², which keeps log_z near 0 (Shazeer et al. 2018; T5 1.1 was trained with
        1e-4).
      label_smoothing: s. The target's probability is to become 1 - s, and that of each other output
        s / (V - 1). The entropy of this distribution is subtracted, so that the least loss is 0 (Szegedy et
        al. 2016, section 7).
      vocab_size: V; only label smoothing needs it.
      sums_of_logits: the sum of all V logits of each token; only label smoothing needs it.

    Returns:
      Float32, in nats, of the shape of the tokens.
    """
    loss = softmax.log_z - softmax.target
    if label_smoothing:
        sure, other = 1.0 - label_smoothing, label_smoothing / (vocab_size - 1)
        loss = softmax.log_z - (sure - other) * softmax.target - other * sums_of_logits
        loss += sure * np.log(sure) + (vocab_size - 1) * other * np.log(other)
    return loss + z_loss * jnp.square(softmax.log_z)


def symmetric_kl(logits_a: jax.Array, logits_b: jax.Array) -> jax.Array:
    """Computes ½ [KL(a‖b) + KL(b‖a)] in nats (R-Drop, Liang et al. 2021, equation 2).

    It equals ½ Σ (p_a - p_b) (log p_a - log p_b). The terms of this sum are all finite and none is negative,
    whereas p log(p / q) divides by probabilities that may have become 0.

    Args:
      logits_a: float32 …×V.
      logits_b: float32 …×V.

    Returns:
      Float32 ….
    """
    log_a, log_b = jax.nn.log_softmax(logits_a), jax.nn.log_softmax(logits_b)
    return 0.5 * jnp.sum((jnp.exp(log_a) - jnp.exp(log_b)) * (log_a - log_b), axis=-1)
