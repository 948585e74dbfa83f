"""The loss-spike guard ends a run whose numbers go wrong, or leaves out the updates that would spoil it."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.errors import Diverged, UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Positive
from retrieval_jax.mesh import multihost
from retrieval_jax.training import settings_file

DescribeStep = Callable[[int], list[dict]]
"""Gives the examples of a step's batch, a row each: {"task", "number", …}."""

ON_SPIKE = ("stop", "warn", "skip")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LossSpikeGuard:
    """What counts as a loss spike, and what then happens. `LossMonitor` applies it to a run.

    With `on_spike="skip"` the jitted step itself leaves out the update of a step that goes wrong; see
    `make_train_step`.

    Args:
      threshold: nats by which a loss may exceed the median of the last losses; None: without limit.
      window: number of last losses; before there are so many, no loss is too high.
      warn_if_zero_hits_after: the step from which on Hits@10 on the dev queries should no longer be 0.
      on_spike: "stop" ends the run; "warn" logs a line and goes on; "skip" leaves out the update of a step
        whose loss is a spike, or whose loss or gradient norm is not finite, logs a line and goes on, for runs
        that nobody attends. None is "warn" where the loss has no natural scale (see LossMonitor), else
        "stop". Numbers that are not finite always end the run, unless they are skipped.
      max_skipped: updates that may be skipped among the last `window` steps; with more the run ends.

    Raises:
      UserError: the values do not go together.
    """

    threshold: float | None = 3.0
    window: Positive = 100
    warn_if_zero_hits_after: int = 1000
    on_spike: str | None = None
    max_skipped: Positive = 10

    def __post_init__(self):
        if self.on_spike not in (None, *ON_SPIKE):
            raise UserError(f"LossSpikeGuard.on_spike: no choice {self.on_spike!r}: stop, warn or skip")
        if self.skips and self.max_skipped >= self.window:
            raise UserError(
                f"LossSpikeGuard.max_skipped: {self.max_skipped} of the last {self.window} steps would never "
                "end a run: set fewer, or a larger LossSpikeGuard.window"
            )

    @property
    def skips(self) -> bool:
        """Whether updates are skipped."""
        return self.on_spike == "skip"


class LossMonitor:
    """Follows the metrics of a run by a `LossSpikeGuard`.

    It ends the run, before any of it is saved, when its numbers go wrong, and warns once if no dev query
    finds its passage.

    Args:
      guard: the rules.
      folder: the model's folder.
      describe_step: gives a step's examples, for the file bad_batch_STEP.json; None: no file is written.
      unbounded_loss: whether the loss grows with scores of any size, as that of raw dot products, which rises
        by many nats in the first steps, or that of `margin_mse`.
    """

    def __init__(
        self,
        guard: LossSpikeGuard,
        folder: Path,
        describe_step: DescribeStep | None = None,
        unbounded_loss: bool = False,
    ):
        self.guard, self.folder, self.describe_step = guard, folder, describe_step
        self.on_spike = guard.on_spike or ("warn" if unbounded_loss else "stop")
        # One more than the window, for `limit`.
        self.losses: collections.deque[tuple[int, float]] = collections.deque(maxlen=guard.window + 1)
        self.skipped: list[int] = []  # steps of the last window
        self.is_spiking = False
        self.found_any = False  # on dev; also once it was logged that nothing was found
        path = folder / settings_file.NAME
        self.settings = storage.checksum(path) if path.exists() else None

    def _median(self, before: int) -> float | None:
        """Gives the median of the last losses before a step; None while they are too few."""
        losses = [loss for step, loss in self.losses if step < before][-self.guard.window :]
        return statistics.median(losses) if len(losses) == self.guard.window else None

    def limit(self, step: int) -> float:
        """Gives the highest loss with which a step's update is applied.

        It depends on the losses up to the last step but one: the metrics of the last step are fetched while
        this one runs. After a save, which fetches them earlier, the limit is the same, so that it does not
        depend on when the run saves.
        """
        median, threshold = self._median(step - 1), self.guard.threshold
        return math.inf if median is None or threshold is None else median + threshold

    def check_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics.

        Raises:
          Diverged: they went wrong; the message names the step and its examples.
        """
        if metrics.get("skipped"):
            self._check_skipped(step, metrics)
            return
        for name in ("loss", *metrics):
            if not math.isfinite(metrics[name]):
                raise self._diverged(step, f"the {name} is {metrics[name]} at step {step}")
        loss, median = metrics["loss"], self._median(step)
        if not self.guard.skips and self.guard.threshold is not None and median is not None:
            was_spiking, self.is_spiking = self.is_spiking, loss > median + self.guard.threshold
            if self.is_spiking:
                reason = (
                    f"the loss is {loss:.2f} at step {step}, and {median:.2f} is usual "
                    "(LossSpikeGuard.threshold)"
                )
                if self.on_spike == "stop":
                    raise self._diverged(step, reason)
                if not was_spiking:  # once for steps in a row
                    log(f"{self.folder}: {reason}: going on (LossSpikeGuard.on_spike)")
        self.losses.append((step, loss))

    def _check_skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs a step whose update was skipped. Raises Diverged where there are too many of them."""
        reason = (
            f"the loss is {metrics['loss']:.2f} at step {step}, and at most {self.limit(step):.2f} is usual"
        )
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(metrics[name]):
                reason = f"the {name} is {metrics[name]} at step {step}"
                break
        window = self.guard.window
        self.skipped = [earlier for earlier in self.skipped if earlier > step - window] + [step]
        if len(self.skipped) > self.guard.max_skipped:
            count = (
                f"{len(self.skipped)} of the last {window} updates were skipped (LossSpikeGuard.max_skipped)"
            )
            raise self._diverged(step, f"{reason}, and {count}")
        log(
            f"{self.folder}: {reason}{self._write_batch(step, reason)}: this update is skipped "
            "(LossSpikeGuard.on_spike)"
        )

    def state(self) -> dict:
        """Gives what a checkpoint keeps, so that a resumed run is watched as if it had not stopped."""
        return {
            "losses": list(self.losses),
            "skipped": self.skipped,
            "settings": self.settings,
            "is_spiking": self.is_spiking,
        }

    def resume(self, state: Mapping, evaluations: Iterable[tuple[int, Mapping[str, float]]] = ()) -> None:
        """Goes on from a `state`, unless it is of a run with other settings: its losses do not compare.

        Args:
          state: what the checkpoint keeps.
          evaluations: (step, metrics) of those so far, that of the checkpoint's own step included.
        """
        late = self.guard.warn_if_zero_hits_after
        self.found_any = any(x.get("Hits@10", 1.0) > 0 or step >= late for step, x in evaluations)
        if multihost.broadcast_from_process_0(state.get("settings") == self.settings):
            self.losses.extend((step, loss) for step, loss in state.get("losses", ()))
            self.skipped = list(state.get("skipped", ()))
            self.is_spiking = state.get("is_spiking", False)

    def check_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes an evaluation's metrics. Warns once if no dev query has found its passage for too long."""
        self.found_any |= metrics.get("Hits@10", 1.0) > 0
        if step >= self.guard.warn_if_zero_hits_after and not self.found_any:
            self.found_any = True
            log(
                f"{self.folder}: no dev query found its passage by step {step}: usually the learning rate is "
                "too low or too high, the loss does not fall, or no task of the mixture looks like the dev "
                "queries (DataConfig.mixture)"
            )

    def _diverged(self, step: int, reason: str) -> Diverged:
        hint = "lower the learning rate"
        if not self.guard.skips:
            hint += ", or leave such updates out with --gin.LossSpikeGuard.on_spike=\"'skip'\""
        where = self._write_batch(step, reason)
        return Diverged(f"{self.folder}: {reason}{where}: {hint}; the checkpoint before it is kept")

    def _write_batch(self, step: int, reason: str) -> str:
        """Writes the examples of a step's batch to bad_batch_STEP.json. Gives the text that says so."""
        if not self.describe_step:
            return ""
        path = self.folder / f"bad_batch_{step}.json"
        rows = self.describe_step(step)
        if multihost.is_process_0():
            storage.write_json(path, {"step": step, "reason": reason, "examples": rows})
        first = ", ".join(f"{row['task']} {row['number']}" for row in rows[:3])
        return f"; its examples ({first}, …) are in {path}"
