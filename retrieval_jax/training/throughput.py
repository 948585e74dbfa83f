"""How fast a run goes: time spent and waited for, steps, tokens, memory; and a profile on request."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.core import paths
from retrieval_jax.mesh import hardware, multihost


class ThroughputMeter:
    """Times the steps between two points of the learning curve.

    Args:
      mesh: what the steps run on.
      before: minutes of training that came before this process.
      max_minutes: when the run is over; None: never.
      flops_per_step: tells the model's operations for a whole batch, for the share of the devices' peak;
        asked only where that is known.
    """

    def __init__(
        self,
        mesh: Mesh,
        before: float,
        max_minutes: float | None = None,
        flops_per_step: Callable[[], float] | None = None,
    ):
        self.before, self.max_minutes = before, max_minutes
        chip = hardware.find_chip(mesh.devices.flat[0].device_kind)
        # Of the devices' peak a second: the part that one step takes.
        self.step_of_peak = flops_per_step() / (chip.flops * mesh.size) if chip and flops_per_step else None
        # Every process counts its own tokens; of the others' it knows only that they are about as many.
        self.share = len(multihost.local_rows(mesh, mesh.shape["data"])) / mesh.shape["data"]
        self.began = time.monotonic()
        self.compiled = False
        self._clear()

    def _clear(self) -> None:
        self.steps = self.tokens = 0
        self.waited = self.spent = 0.0  # seconds

    @property
    def minutes(self) -> float:
        return self.before + (time.monotonic() - self.began) / 60

    def is_over(self, step: int, every: int) -> bool:
        """Whether the time is up: the first process's clock counts, asked for after each `every` steps."""
        if self.max_minutes is None:
            return False
        if jax.process_count() == 1:
            return self.minutes >= self.max_minutes
        return step % every == 0 and bool(
            multihost.broadcast_from_process_0(self.minutes >= self.max_minutes)
        )

    @contextlib.contextmanager
    def step(self, batch: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Around a step, waiting for the next batch included. The first one compiles: it does not count."""
        began = time.monotonic()
        yield
        if not self.compiled:
            self.compiled = True
            self._clear()
            return
        self.spent += time.monotonic() - began
        self.steps += 1
        read = [x for name, x in batch.items() if name.endswith(("encoder_input_tokens", "target_tokens"))]
        self.tokens += sum(map(np.count_nonzero, read))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for a batch, inside of a step."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def read(self) -> dict[str, float]:
        """The rates since the last call: evaluations and saves are not part of any step.

        input_wait: share of the time spent waiting for batches; tokens_per_second: those read and written,
        without padding; mfu: share of the devices' peak; hbm_gib and hbm_peak_gib: memory of one device.
        """
        told = {}
        if self.steps:
            told["input_wait"] = self.waited / self.spent
            told["steps_per_second"] = self.steps / self.spent
            told["tokens_per_second"] = self.tokens / self.share / self.spent
            if self.step_of_peak:
                told["mfu"] = self.step_of_peak * told["steps_per_second"]
        memory = jax.local_devices()[0].memory_stats() or {}
        for name, key in (("hbm_gib", "bytes_in_use"), ("hbm_peak_gib", "peak_bytes_in_use")):
            if key in memory:
                told[name] = memory[key] / 2**30
        self._clear()
        return told


class Profiler:
    """Traces some steps for TensorBoard's profile plugin, which finds folder/plugins/profile.

    `steps`: (step before which to begin, counted from 0, how many steps), or None.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self.folder = folder
        self.first, count = steps or (-1, 0)
        self.end = self.first + count
        self.runs = False

    def before(self, step: int) -> None:
        """Before the step that comes after `step` steps."""
        if step == self.first and multihost.is_process_0():
            # XLA's profiler writes to a disk.
            self.scratch = tempfile.TemporaryDirectory() if paths.is_remote(self.folder) else None
            jax.profiler.start_trace(self.scratch.name if self.scratch else str(self.folder))
            self.runs = True

    def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """After `step` steps, of which the last gives these metrics."""
        if self.runs and step >= self.end:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self.runs:
            jax.profiler.stop_trace()
            self.runs = False
            if self.scratch:
                with self.scratch as folder:
                    names = [str(path.relative_to(folder)) for path in paths.files(Path(folder))]
                    paths.copy_files(Path(folder), self.folder, names, "send the trace")
