"""Which checkpoints of a run stay on disk: its newest ones, and the best of those evaluated on dev."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.mesh import multihost

LOWER_IS_BETTER = ("loss",)


class RetentionPolicy:
    """Orbax's preservation policy: the newest checkpoints, and beside them the best one on dev.

    A checkpoint is written before it is evaluated, so its score is not part of it: the learning curve has the
    scores, which outlive the process.

    Args:
      curve: learning_curve.jsonl, which tells of earlier evaluations.
      keep: how many of the newest checkpoints stay.
      metric: of dev, by which the best one is chosen (of equals the newest); None: no other one stays.
    """

    def __init__(self, curve: Path, keep: int, metric: str | None):
        self.keep, self.metric = keep, metric
        self.scores: dict[int, float] = {}  # by step; of a damaged or deleted checkpoint, too
        if metric and curve.exists():
            for point in read_curve(curve):
                dev = {name.removeprefix("dev/"): x for name, x in point.items() if name.startswith("dev/")}
                self.add(point["step"], dev)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes an evaluation's metrics."""
        score = metrics.get(self.metric, math.nan)
        if math.isfinite(score):
            self.scores[step] = score

    def forget(self, after: int) -> None:
        """Forgets the steps after one from which training goes on: they will be others."""
        self.scores = {step: score for step, score in self.scores.items() if step <= after}

    def best(self, steps: Iterable[int]) -> int | None:
        """The best of some steps, on all processes the first one's; None where none was evaluated."""
        scored = [step for step in steps if step in self.scores]
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        best = multihost.broadcast_from_process_0(
            max(scored, key=lambda step: (sign * self.scores[step], step), default=-1)
        )
        return None if best < 0 else best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Which of the checkpoints stay, oldest first, as Orbax asks after each save."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = {*steps[-self.keep :], self.best(steps)}
        return [step in stay for step in steps]
