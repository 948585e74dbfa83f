"""The evaluation pool: the passages among which a dual encoder searches for the dev queries in training.

To encode all passages of a large collection at each evaluation would take longer than the training.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.training.settings import TrainSettings

BUDGET = 0.05
"""The share of the training's computation that evaluations may take, where nothing else is set."""
_TRAINING_FACTOR = 3  # a training step computes about three times what the forward pass of its texts does


@dataclasses.dataclass(frozen=True)
class EvaluationCost:
    """What an evaluation computes, as a share of the training steps for which it is made.

    It counts tokens (padding included) that pass through the encoder: forward in an evaluation, forward and
    backward in training. What else both do is left out: the optimiser, the products of the vectors, reading.

    Attributes:
      trained_tokens: tokens that the training steps between two evaluations read.
      query_tokens: tokens of the dev queries of an evaluation.
      passage_length: tokens of a passage.
    """

    trained_tokens: float
    query_tokens: int
    passage_length: int

    @classmethod
    def of(cls, config: DataConfig, settings: TrainSettings, queries: int) -> "EvaluationCost":
        """Gives the cost for a run.

        Args:
          config: the lengths of the texts, and the size of a query's group.
          settings: the run's. Its last evaluation may follow the one before after fewer steps than others;
            that of a run of no steps counts as one after `eval_every` steps.
          queries: the number of dev queries.

        Returns:
          The cost.
        """
        steps = settings.steps or settings.eval_every
        evaluations = -(-steps // settings.eval_every)
        group_size = config.positives + config.negatives
        example = config.input_length + group_size * config.passage_length
        trained = steps / evaluations * settings.batch_size * example
        return cls(trained, queries * config.input_length, config.passage_length)

    def share(self, passages: int) -> float:
        """Gives the share of the training's computation that it takes to encode so many passages."""
        tokens = self.query_tokens + passages * self.passage_length
        return tokens / (_TRAINING_FACTOR * self.trained_tokens)

    def passages_within(self, share: float) -> int:
        """Gives the most passages whose evaluation takes at most a share of the training's computation."""
        tokens = share * _TRAINING_FACTOR * self.trained_tokens - self.query_tokens
        return max(int(tokens // self.passage_length), 0)


def pool_rows(
    collection: Collection, queries: Sequence[Query], mined: Mapping[str, Sequence[str]], size: int
) -> np.ndarray:
    """Chooses the passages of a pool. It is a function of the collection and the arguments alone.

    The pool has all positives of the queries. Of the places that are left, up to half go to hard negatives
    (each query's hardest first), and the others to passages that are drawn at random, without replacement.

    Args:
      collection: the passages.
      queries: the dev queries; their judged negatives are hard ones.
      mined: query id -> more hard negatives, hardest first.
      size: the number of passages; the positives are in the pool even if there are more of them.

    Returns:
      The rows of the passages, ascending; all rows if the collection has no more than `size` passages.
    """
    count = collection.passage_count
    if size >= count:
        return np.arange(count)
    positives = dict.fromkeys(_rows(collection, [id for query in queries for id in query.positives]))
    ranks = itertools.zip_longest(*((*query.negatives, *mined.get(query.id, ())) for query in queries))
    hardest = [id for rank in ranks for id in rank if id is not None]
    hard = [row for row in dict.fromkeys(_rows(collection, hardest)) if row not in positives]
    room = max(size - len(positives), 0)
    drawn = np.random.default_rng(zlib.crc32(collection.fingerprint.encode()))
    others = drawn.choice(count, size, replace=False).tolist()
    chosen = dict.fromkeys([*positives, *hard[: room // 2], *others])
    return np.sort(list(chosen)[: max(size, len(positives))]).astype(np.int64)


def _rows(collection: Collection, ids: Sequence[str]) -> list[int]:
    """Gives the rows of the passages that the collection has."""
    return [row for row in collection.find_rows(ids).tolist() if row >= 0] if ids else []
