"""Preemption: SIGTERM ends a training after the running step, which is saved."""

import signal
import threading
from types import FrameType

import jax


class Preemption:
    """A context in which SIGTERM asks for an end after the running step.

    Of several processes any one may be told; all of them then end after the same step.
    """

    def __enter__(self) -> "Preemption":
        self.asked = False
        # With several processes JAX's own service takes the signal. Other threads than the main one may not
        # set signal handlers.
        self.handles_signal = not jax.distributed.is_initialized() and (
            threading.current_thread() is threading.main_thread()
        )
        if self.handles_signal:
            self.handler_before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def reached(self, step: int) -> bool:
        """Tells whether to end after this step. All processes must ask after every step."""
        if jax.distributed.is_initialized():
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    def __exit__(self, *_: object) -> None:
        if self.handles_signal:
            signal.signal(signal.SIGTERM, self.handler_before)
