"""How fast a run goes: steps and tokens a second, the share of the time spent waiting, memory, and MFU."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.mesh import hardware, multihost
from retrieval_jax.models.text_groups import TextGroups


class ThroughputMeter:
    """Measures the steps between two points of the learning curve.

    Args:
      mesh: the devices that the steps run on.
      minutes_before: minutes of training before this process began.
      flops_per_step: gives the model's floating-point operations for a global batch whose texts are grouped
        so, for the MFU; it is only called where the chip's peak is known.
    """

    def __init__(
        self,
        mesh: Mesh,
        minutes_before: float,
        flops_per_step: Callable[[TextGroups | None], float] | None = None,
    ):
        self.minutes_before = minutes_before
        chip = hardware.find_chip(mesh.devices.flat[0].device_kind)
        self.peak_flops = chip.flops * mesh.size if chip and flops_per_step else None  # a second
        self.flops_per_step = functools.cache(flops_per_step) if self.peak_flops else None
        # Every process counts its own tokens, and takes those of the others to be about as many.
        self.share = len(multihost.local_rows(mesh, mesh.shape["data"])) / mesh.shape["data"]
        self.began = time.monotonic()
        self.compiled: set[TextGroups | None] = set()
        self._clear()

    def _clear(self) -> None:
        self.steps = self.tokens = self.flops = 0
        self.waited = self.spent = 0.0  # seconds

    @property
    def minutes(self) -> float:
        """Minutes of training so far, those before this process included."""
        return self.minutes_before + (time.monotonic() - self.began) / 60

    @contextlib.contextmanager
    def step(self, batch: Mapping[str, np.ndarray], groups: TextGroups | None = None) -> Iterator[None]:
        """Measures a step, and the wait for the next batch.

        The first step does not count, nor does the first one of each other kind of groups: they compile.
        """
        began, waited = time.monotonic(), self.waited
        yield
        if groups not in self.compiled:
            self.compiled.add(groups)
            self.waited = waited
            return
        self.spent += time.monotonic() - began
        self.steps += 1
        if self.flops_per_step:
            self.flops += self.flops_per_step(groups)
        texts = [x for name, x in batch.items() if name.endswith(("encoder_input_tokens", "target_tokens"))]
        self.tokens += sum(map(np.count_nonzero, texts))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the wait for a batch, inside of `step`."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def read(self) -> dict[str, float]:
        """Gives the rates since the last call. Evaluations and saves are not part of any step.

        Returns:
          input_wait: the share of the steps' time spent waiting for batches;
          steps_per_second;
          tokens_per_second: tokens that the model reads or writes, padding left out;
          mfu: model FLOPs utilisation, a share of the devices' peak, where that is known;
          hbm_gib, hbm_peak_gib: GiB of one device's memory in use, where the platform tells.
        """
        rates = {}
        if self.steps:
            rates["input_wait"] = self.waited / self.spent
            rates["steps_per_second"] = self.steps / self.spent
            rates["tokens_per_second"] = self.tokens / self.share / self.spent
            if self.peak_flops:
                rates["mfu"] = self.flops / self.spent / self.peak_flops
        memory = jax.local_devices()[0].memory_stats() or {}
        for name, key in (("hbm_gib", "bytes_in_use"), ("hbm_peak_gib", "peak_bytes_in_use")):
            if key in memory:
                rates[name] = memory[key] / 2**30
        self._clear()
        return rates
