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

from retrieval_jax import storage
from retrieval_jax.errors import UserError
from retrieval_jax.progress import say
from retrieval_jax.training import multihost

ExamplesOf = Callable[[int], list[dict]]
"""What the examples of a batch are (the batches before it are counted), a row each: task, number, …"""


@gin.configurable(allowlist=["spike", "window", "found_by", "on_spike"])
class Watch:
    """Ends a run whose numbers went wrong, before any of it is saved; tells once of one that finds nothing.

    Args:
      folder: the model's.
      examples_of: tells a batch's examples, for the file BAD_BATCH.
      spike: nats by which a loss may exceed the median of the last ones; None: by any number.
      window: how many last ones; none is too high before so many steps.
      on_spike: "stop", or "warn", which tells of a spike and goes on; None: "warn" where the loss has no
        natural scale (`unbounded`), else "stop". Numbers that are not finite always end the run.
      unbounded: whether scores are raw dot products, whose losses rise by many nats in the first steps.
      found_by: steps after which Hits@10 on dev should no longer be 0.
    """

    def __init__(
        self,
        folder: Path,
        examples_of: ExamplesOf | None = None,
        spike: float | None = 3.0,
        window: int = 100,
        found_by: int = 1000,
        on_spike: str | None = None,
        unbounded: bool = False,
    ):
        on_spike = on_spike or ("warn" if unbounded else "stop")
        if on_spike not in ("stop", "warn"):
            raise UserError(f"Watch.on_spike: no choice {on_spike!r}: stop or warn")
        self.warns, self.spiking = on_spike == "warn", False
        self.folder, self.examples_of = folder, examples_of
        self.spike, self.found_by = spike, found_by
        self.losses: collections.deque[float] = collections.deque(maxlen=window)
        self.found = False  # anything on dev; or it was told

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics; raises UserError with the step and its examples if they went wrong."""
        for name in ("loss", *metrics):
            if not math.isfinite(metrics[name]):
                raise self._stop(step, f"the {name} is {metrics[name]} at step {step}")
        loss = metrics["loss"]
        if self.spike is not None and len(self.losses) == self.losses.maxlen:
            usual = statistics.median(self.losses)
            spiking, before = loss > usual + self.spike, self.spiking
            self.spiking = spiking
            if spiking:
                what = f"the loss is {loss:.2f} at step {step}, and {usual:.2f} is usual (Watch.spike)"
                if not self.warns:
                    raise self._stop(step, what)
                if not before:  # once for steps in a row
                    say(f"{self.folder}: {what}: going on (Watch.on_spike)")
        self.losses.append(loss)

    def dev(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes an evaluation's metrics."""
        self.found |= metrics.get("Hits@10", 1.0) > 0
        if step >= self.found_by and not self.found:
            self.found = True
            say(
                f"{self.folder}: no dev query found its passage by step {step}: usually the learning rate is "
                "too low or too high, the loss does not fall, or no task of the mixture looks like the dev "
                "queries (TrainingData.rates)"
            )

    def _stop(self, step: int, what: str) -> UserError:
        where = ""
        if self.examples_of:
            path = self.folder / f"bad_batch_{step}.json"
            rows = self.examples_of(step - 1)
            if multihost.is_first():
                storage.write_json(path, {"step": step, "reason": what, "examples": rows})
            some = ", ".join(f"{row['task']} {row['number']}" for row in rows[:3])
            where = f"; its examples ({some}, …) are in {path}"
        return UserError(
            f"{self.folder}: {what}{where}: lower the learning rate; the checkpoint before it is kept"
        )


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
