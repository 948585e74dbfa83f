"""A trace of a few training steps for TensorBoard's profile plugin."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import multihost


class Profiler:
    """Traces some steps of a run, in the first process, to folder/plugins/profile.

    Args:
      folder: the model's folder.
      steps: (number of steps before the trace begins, number of steps to trace), or None for no trace.

    Raises:
      UserError: `steps` are not two numbers.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        if steps and len(steps) != 2:
            raise UserError(f"train.profile: {tuple(steps)}: give (steps before the trace, steps to trace)")
        self.folder = folder
        self.first, count = steps or (-1, 0)
        self.end = self.first + count
        self.is_tracing = False

    def before(self, step: int) -> None:
        """Begins the trace if it is due. To be called before each step, with the steps taken so far."""
        if step == self.first and multihost.is_process_0():
            # XLA's profiler cannot write to a bucket.
            self.scratch = tempfile.TemporaryDirectory() if paths.is_remote(self.folder) else None
            jax.profiler.start_trace(self.scratch.name if self.scratch else str(self.folder))
            self.is_tracing = True

    def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Ends the trace if it is due, once the last step's metrics are computed."""
        if self.is_tracing and step >= self.end:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self.is_tracing:
            jax.profiler.stop_trace()
            self.is_tracing = False
            if self.scratch:
                with self.scratch as folder:
                    names = [str(path.relative_to(folder)) for path in paths.files(Path(folder))]
                    paths.copy_files(Path(folder), self.folder, names, "send the trace")
