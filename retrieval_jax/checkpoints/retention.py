"""Which checkpoints of a run stay on disk: the newest ones, and the best of those evaluated on dev."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrieval_jax.checkpoints.learning_curve import POOL_DIGEST, read_curve, split_dev_metrics
from retrieval_jax.mesh import multihost

LOWER_IS_BETTER = ("loss",)


class RetentionPolicy:
    """An Orbax preservation policy that keeps the newest checkpoints and the best one on dev.

    A checkpoint is written before it is evaluated, so its score cannot be part of it. The scores are read
    from the learning curve, which outlives the process.

    Args:
      curve: the file learning_curve.jsonl with the evaluations so far.
      keep: the number of newest checkpoints that stay.
      metric: the dev metric that chooses the best checkpoint (of equal ones the newest); None keeps the
        newest ones alone.
    """

    def __init__(self, curve: Path, keep: int, metric: str | None):
        self.keep, self.metric = keep, metric
        self.scores: dict[int, float] = {}  # by step; of a damaged or deleted checkpoint, too
        self.pool: tuple = (None, None)  # size and digest of what was searched; None for the collection
        if metric and curve.exists():
            for point in read_curve(curve):
                if dev := split_dev_metrics(point):
                    self.add(point["step"], dev[1])

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the dev metrics of an evaluated step.

        Earlier scores are dropped if they were measured among other passages: they do not compare.
        """
        score = metrics.get(self.metric, math.nan)
        if math.isfinite(score):
            if (pool := (metrics.get("passages"), metrics.get(POOL_DIGEST))) != self.pool:
                self.pool, self.scores = pool, {}
            self.scores[step] = score

    def forget(self, after: int) -> None:
        """Drops the scores of later steps, where training goes on from an earlier one."""
        self.scores = {step: score for step, score in self.scores.items() if step <= after}

    def best(self, steps: Iterable[int]) -> int | None:
        """Returns the best of the given steps, or None where none of them was evaluated.

        All processes get the answer of process 0.
        """
        scored = [step for step in steps if step in self.scores]
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        best = multihost.broadcast_from_process_0(
            max(scored, key=lambda step: (sign * self.scores[step], step), default=-1)
        )
        return None if best < 0 else best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Says for each checkpoint, oldest first, whether it stays; Orbax asks after each save."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = {*steps[-self.keep :], self.best(steps)}
        return [step in stay for step in steps]
