"""Looks after a run: numbers that went wrong end it, and so does, in good order, a machine that must stop."""

import collections
import math
import signal
import statistics
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import gin
import jax

from retrieval_jax.core import storage
from retrieval_jax.core.errors import Diverged, UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Positive
from retrieval_jax.mesh import multihost
from retrieval_jax.training import settings

ExamplesOf = Callable[[int], list[dict]]
"""What the examples of a batch are (the batches before it are counted), a row each: task, number, …"""


ON_SPIKE = ("stop", "warn", "skip")


@gin.configurable(allowlist=["threshold", "window", "warn_if_zero_hits_after", "on_spike", "max_skipped"])
class LossSpikeGuard:
    """Ends a run whose numbers went wrong, before any of it is saved; tells once of one that finds nothing.

    With `on_spike="skip"` the updates of single steps are left out instead: the jitted step does that itself
    (`make_train_step`), by the limit that it is given here.

    Args:
      folder: the model's.
      examples_of: tells a batch's examples, for the file BAD_BATCH.
      threshold: nats by which a loss may exceed the median of the last ones; None: by any number.
      window: how many last ones; none is too high before so many steps.
      on_spike: "stop"; or "warn", which tells of a spike and goes on; or "skip", which leaves out the update
        of a step whose loss is a spike, or whose loss or gradient's norm is not finite, tells of it and goes
        on: for runs that nobody attends. None: "warn" where the loss has no natural scale (`unbounded`),
        else "stop". Unless they are skipped, numbers that are not finite end the run.
      max_skipped: updates that may be left out among the last `window` steps; with more the run ends.
      unbounded: whether scores are raw dot products, whose losses rise by many nats in the first steps.
      warn_if_zero_hits_after: steps after which Hits@10 on dev should no longer be 0.
    """

    def __init__(
        self,
        folder: Path,
        examples_of: ExamplesOf | None = None,
        threshold: float | None = 3.0,
        window: Positive = 100,
        warn_if_zero_hits_after: int = 1000,
        on_spike: str | None = None,
        unbounded: bool = False,
        max_skipped: Positive = 10,
    ):
        self.on_spike = on_spike or ("warn" if unbounded else "stop")
        if self.on_spike not in ON_SPIKE:
            raise UserError(f"LossSpikeGuard.on_spike: no choice {on_spike!r}: stop, warn or skip")
        if self.skips and max_skipped >= window:
            raise UserError(
                f"LossSpikeGuard.max_skipped: {max_skipped} of the last {window} steps would never end a "
                "run: set fewer, or a larger LossSpikeGuard.window"
            )
        self.folder, self.examples_of = folder, examples_of
        self.threshold, self.window, self.warn_if_zero_hits_after = threshold, window, warn_if_zero_hits_after
        # One more than the window, for `limit`.
        self.losses: collections.deque[tuple[int, float]] = collections.deque(maxlen=window + 1)
        self.max_skipped, self.skipped = max_skipped, []  # the steps of the last window
        self.spiking = False
        self.found = False  # anything on dev; or it was told
        path = folder / settings.NAME
        self.settings = storage.checksum(path) if path.exists() else None

    @property
    def skips(self) -> bool:
        return self.on_spike == "skip"

    def _usual(self, before: int) -> float | None:
        """The median of the last losses before a step; None while these are too few."""
        losses = [loss for step, loss in self.losses if step < before][-self.window :]
        return statistics.median(losses) if len(losses) == self.window else None

    def limit(self, step: int) -> float:
        """The highest loss with which a step's update is applied.

        It is of the losses up to the last step but one: the metrics of the last are fetched while this step
        runs. A save fetches them earlier; the limit is the same, so it does not depend on when saves are.
        """
        usual = self._usual(step - 1)
        return math.inf if usual is None or self.threshold is None else usual + self.threshold

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics; raises Diverged with the step and its examples if they went wrong."""
        if metrics.get("skipped"):
            self._skip(step, metrics)
            return
        for name in ("loss", *metrics):
            if not math.isfinite(metrics[name]):
                raise self._stop(step, f"the {name} is {metrics[name]} at step {step}")
        loss, usual = metrics["loss"], self._usual(step)
        if not self.skips and self.threshold is not None and usual is not None:
            spiking, before = loss > usual + self.threshold, self.spiking
            self.spiking = spiking
            if spiking:
                what = (
                    f"the loss is {loss:.2f} at step {step}, and {usual:.2f} is usual "
                    "(LossSpikeGuard.threshold)"
                )
                if self.on_spike == "stop":
                    raise self._stop(step, what)
                if not before:  # once for steps in a row
                    log(f"{self.folder}: {what}: going on (LossSpikeGuard.on_spike)")
        self.losses.append((step, loss))

    def _skip(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells of a step whose update was left out; raises Diverged where there are too many of them."""
        what = (
            f"the loss is {metrics['loss']:.2f} at step {step}, and at most {self.limit(step):.2f} is usual"
        )
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(metrics[name]):
                what = f"the {name} is {metrics[name]} at step {step}"
                break
        self.skipped = [one for one in self.skipped if one > step - self.window] + [step]
        if len(self.skipped) > self.max_skipped:
            count = (
                f"{len(self.skipped)} of the last {self.window} updates were skipped "
                "(LossSpikeGuard.max_skipped)"
            )
            raise self._stop(step, f"{what}, and {count}")
        log(
            f"{self.folder}: {what}{self._tell_batch(step, what)}: this update is skipped "
            "(LossSpikeGuard.on_spike)"
        )

    def state(self) -> dict:
        """What a checkpoint keeps, so that a run that goes on is watched as if it had not been stopped."""
        return {"losses": list(self.losses), "skipped": self.skipped, "settings": self.settings}

    def resume(self, state: Mapping) -> None:
        """Goes on from a `state`, unless other settings were trained with: their losses are no measure."""
        if multihost.broadcast_from_process_0(state.get("settings") == self.settings):
            self.losses.extend((step, loss) for step, loss in state.get("losses", ()))
            self.skipped = list(state.get("skipped", ()))

    def dev(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes an evaluation's metrics."""
        self.found |= metrics.get("Hits@10", 1.0) > 0
        if step >= self.warn_if_zero_hits_after and not self.found:
            self.found = True
            log(
                f"{self.folder}: no dev query found its passage by step {step}: usually the learning rate is "
                "too low or too high, the loss does not fall, or no task of the mixture looks like the dev "
                "queries (DataConfig.rates)"
            )

    def _stop(self, step: int, what: str) -> Diverged:
        hint = "lower the learning rate"
        if not self.skips:
            hint += ", or leave such updates out with --gin.LossSpikeGuard.on_spike=\"'skip'\""
        where = self._tell_batch(step, what)
        return Diverged(f"{self.folder}: {what}{where}: {hint}; the checkpoint before it is kept")

    def _tell_batch(self, step: int, what: str) -> str:
        """Writes the examples of a step's batch to bad_batch_STEP.json; gives what is told of them."""
        if not self.examples_of:
            return ""
        path = self.folder / f"bad_batch_{step}.json"
        rows = self.examples_of(step - 1)
        if multihost.is_process_0():
            storage.write_json(path, {"step": step, "reason": what, "examples": rows})
        some = ", ".join(f"{row['task']} {row['number']}" for row in rows[:3])
        return f"; its examples ({some}, …) are in {path}"


class Preemption:
    """Inside, SIGTERM asks for an end after the running step. To several processes it may come to any one."""

    def __enter__(self) -> "Preemption":
        self.asked = False
        # Several processes: JAX's own service takes the signal. Elsewhere than in the main thread none comes.
        self.ours = not jax.distributed.is_initialized() and (
            threading.current_thread() is threading.main_thread()
        )
        if self.ours:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def reached(self, step: int) -> bool:
        """Whether to end after this step, the same one on all processes; to be asked after every step."""
        if jax.distributed.is_initialized():
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    def __exit__(self, *_: object) -> None:
        if self.ours:
            signal.signal(signal.SIGTERM, self.before)
