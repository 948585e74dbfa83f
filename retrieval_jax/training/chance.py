"""Whether a trained model knows more than chance: its dev metrics, or its loss, beside those of chance."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from retrieval_jax.checkpoints.learning_curve import curve_points
from retrieval_jax.examples.training_data import TrainDataset
from retrieval_jax.models.objectives import cross_entropy
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training.evaluators import Evaluator, RetrievalEvaluator

DEPTH = 10
SIGNIFICANT = 1e-3  # a random ranking has so many hits, or more, in one of a thousand evaluations
LEARNED = 0.9  # a loss below this part of chance's shows learning


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a model is better than chance.

    Attributes:
      left: whether it is.
      text: the numbers beside those of chance; where it is not, what to do.
    """

    left: bool
    text: str


def verdict(
    model: Retriever, examples: TrainDataset, evaluator: Evaluator, made: Mapping, loss: float | None
) -> Verdict | None:
    """Compares a model with chance: by its dev queries, or where there are none by its loss.

    Args:
      model: the model.
      examples: what it was trained on.
      evaluator: the run's.
      made: what `train_loop` returned.
      loss: the last training loss; None if it is not known.

    Returns:
      The verdict; None where nothing can be told, or nothing was trained.
    """
    if made["step"] == 0:
        return None  # nothing was trained
    told, left = [], None
    if (chance_loss := docid_loss(model, examples)) is not None and loss is not None:
        left = loss < LEARNED * chance_loss
        told.append(f"loss {loss:.2f} ({chance_loss:.2f} if each docid is as likely)")
    prefix = getattr(evaluator, "prefix", "dev")
    hits = made.get(f"{prefix}/Hits@{DEPTH}")
    if isinstance(evaluator, RetrievalEvaluator) and hits is not None:
        passages = made.get(f"{prefix}/passages", examples.collection.passage_count)
        probabilities = random_hits([len(q.positives) for q in evaluator.queries], passages)
        if luck(1.0, probabilities) < SIGNIFICANT:  # so few queries and passages may tell nothing
            left = luck(hits, probabilities) < SIGNIFICANT
        told.append(f"dev Hits@{DEPTH} {hits:.3f} ({np.mean(probabilities):.3f} of a random ranking)")
    if left is None:
        return None
    text = ", ".join(told)
    if left:
        return Verdict(True, text)
    return Verdict(False, f"NOT BETTER THAN CHANCE: {text}: {remedy(made['step'], model, examples)}")


def docid_loss(model: Retriever, examples: TrainDataset) -> float | None:
    """Gives the loss, in nats, of a model that gives each docid the same probability: ln N.

    None where a loss says nothing of that: for objectives that are no log-likelihoods of docids, and for
    docids of several tokens. Their loss is that of a softmax that no trie constrains, so that a model which
    does not know the tokens that may follow a prefix has a high loss, and may rank the docids well.
    """
    if not model.writes_docids or getattr(model, "objective", None) is not cross_entropy:
        return None
    table = examples.table
    return math.log(len(np.unique(table.tokens_NxL))) if table.length == 1 else None


def random_hits(positives: Sequence[int], passages: int) -> np.ndarray:
    """Gives the probability of each query that a random ranking has a positive among its first DEPTH.

    Args:
      positives: how many passages answer each query.
      passages: how many passages are ranked.
    """
    return 1 - stats.hypergeom.pmf(0, passages, np.minimum(positives, passages), min(DEPTH, passages))


def luck(hits: float, probabilities: Sequence[float]) -> float:
    """Gives the probability that a random ranking has such a share of hits, or more.

    The number of its hits is a sum of independent events of these probabilities (Poisson binomial).
    """
    probability_of = np.ones(1)  # by the number of hits
    for p in probabilities:
        probability_of = np.convolve(probability_of, [1 - p, p])
    return float(probability_of[round(hits * len(probabilities)) :].sum())


def remedy(steps: int, model: Retriever, examples: TrainDataset) -> str:
    """Says what to do with a model that stays at chance."""
    passages, recipes = examples.collection.passage_count, ["runs/atomic.gin", "runs/dual_encoder.gin"]
    if not model.writes_docids:
        recipes = recipes[:1]
    elif examples.table.length == 1:
        recipes = recipes[1:]
    return (
        f"after {steps} steps for {passages:,} passages: train longer, as --STEPS={4 * steps}, begin with "
        f"pretrained weights (--INITIAL_CHECKPOINT), or try {' or '.join(recipes)}"
    )


def last_loss(folder: Path) -> float | None:
    """Reads the training loss of the last point of a model's learning curve; None if there is none."""
    losses = [point["loss"] for point in curve_points(folder) if "loss" in point]
    return losses[-1] if losses else None
