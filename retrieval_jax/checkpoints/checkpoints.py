"""The checkpoints of a training, through Orbax, which writes each one into a temporary folder and renames it.

MODEL_DIR/checkpoints/STEP/     params, optimizer, position (in the data, the LossSpikeGuard's
                                state, and metrics that are not logged yet), checksums.json

model_folder.py says what else lies in a model's folder.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from retrieval_jax.checkpoints import checksums, learning_curve
from retrieval_jax.checkpoints.retention import RetentionPolicy
from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError, first_line
from retrieval_jax.core.progress import log
from retrieval_jax.mesh import multihost


def in_background() -> bool:
    """Whether files are written while the next steps run. On CPUs, writing would take the steps' cores."""
    return jax.default_backend() != "cpu"


class Checkpoints:
    """The checkpoints of a model folder: parameters, the optimizer's state and the position in the data.

    Where files are written in the background, `save` returns as soon as the arrays are copied from the
    devices. Orbax writes them into a temporary folder and renames it, and then the checksums are written. The
    next `save` and `close` wait for both. A step whose files differ from its checksums counts as damaged.

    Args:
      model_dir: the model's folder.
      keep: the number of newest checkpoints that stay on disk.
      keep_best: the dev metric whose best checkpoint stays beside them, or None; see RetentionPolicy.
      read_only: whether nothing in the folder may be created, changed or removed.

    Raises:
      UserError: checkpoints cannot lie in this folder, or a package for buckets is not installed.
    """

    def __init__(
        self, model_dir: str | Path, keep: int = 2, keep_best: str | None = None, read_only: bool = False
    ):
        self.folder = paths.absolute(model_dir) / "checkpoints"
        if paths.is_remote(self.folder) and not paths.has_client():
            raise UserError(
                f"{self.folder}: checkpoints in a bucket need a package that is not installed: "
                "pip install 'retrieval_jax[gcs]'"
            )
        if not paths.is_remote(self.folder) and (odd := set(str(self.folder)) & set("[*?\\")):
            # Orbax looks for the parts of a checkpoint by a glob pattern that begins with the folder's path.
            raise UserError(
                f"{self.folder}: checkpoints cannot lie below a folder with {' '.join(sorted(odd))} in its "
                "name: rename it, or name another MODEL_DIR"
            )
        self.in_background = not read_only and in_background()
        self.pool = ThreadPoolExecutor(1)
        self.sealing: Future | None = None
        self.retention = RetentionPolicy(self.folder.with_name(learning_curve.NAME), keep, keep_best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self.retention,
            enable_async_checkpointing=self.in_background,
            cleanup_tmp_directories=not read_only,  # what a kill left of a save
            read_only=read_only,
            create=not read_only,
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("params", "optimizer", "position")
        )
        self.read_only = read_only
        self.damage: dict[int, str | None] = {}  # as far as looked for

    def steps(self) -> list[int]:
        """Lists the steps that have a folder, whole or damaged, newest first."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((int(p.name) for p in there if p.name.isdigit()), reverse=True)

    def find_damage(self, step: int) -> str | None:
        """Compares the files of a step with its checksums.

        Of processes that train together only process 0 looks; see `_newest`.

        Returns:
          The damage, in words; None where none is known.
        """
        if step not in self.damage:
            found = None
            if self.read_only or multihost.is_process_0():
                found = checksums.find_damage(self.folder / str(step))
                if found is None and step not in self.manager.all_steps():
                    found = "its save did not end"
            self.damage[step] = found
        return self.damage[step]

    def latest(self) -> int | None:
        """The step of the newest checkpoint that is not damaged; None where there is none.

        A reader passes over a step without checksums as long as an older one has them: a training that runs
        may be about to write them, and recipes name a checkpoint by them.
        """
        newest = self._newest()
        if newest is None or not self.read_only or self.is_sealed(newest):
            return newest
        complete = (step for step in self.steps() if self.is_sealed(step))
        return next((step for step in complete if not self.find_damage(step)), newest)

    def is_sealed(self, step: int) -> bool:
        """Tells whether a step has its checksums, by which its save has ended."""
        return (self.folder / str(step) / checksums.NAME).is_file()

    def _newest(self, before: int | None = None) -> int | None:
        """Finds the newest step, before `before` if that is given, that is not damaged.

        Processes that train together take the answer of process 0. On a shared file system a listing may be
        cached, and processes that saw different steps would wait for each other in different places.
        """

        def newest() -> int:
            steps = (step for step in self.steps() if before is None or step < before)
            return next((step for step in steps if not self.find_damage(step)), -1)

        step = newest() if self.read_only else multihost.value_from_process_0(newest)
        return None if step < 0 else step

    def save(
        self, step: int, params: Any, optimizer: Any, examples: int | None = None, watch: dict | None = None
    ) -> None:
        """Saves a checkpoint.

        Args:
          step: the number of steps that were trained.
          params: the parameters.
          optimizer: the optimizer's state.
          examples: the number of examples that these steps took; None means one a step.
          watch: what else the run goes on with: the state of LossSpikeGuard, metrics that are not logged yet.
        """
        if multihost.broadcast_from_process_0(step == self.manager.latest_step()):
            return
        multihost.on_process_0(self._wait)
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                position=ocp.args.JsonSave(
                    {"examples": step if examples is None else examples, **(watch or {})}
                ),
            ),
        )
        if not self.in_background:
            multihost.on_process_0(lambda: checksums.write(self.folder / str(step)))
        elif multihost.is_process_0():
            self.sealing = self.pool.submit(self._seal, step)

    def seal(self) -> None:
        """Writes the checksums of the newest step if a kill came before them: readers pass over it for good.

        All processes call it, once the step was read. What was made of a model without any checksums is then
        of another checkpoint.
        """

        def write() -> None:
            step = next((step for step in self.steps() if not self.find_damage(step)), None)
            if step is not None and not self.is_sealed(step):
                checksums.write(self.folder / str(step))

        multihost.on_process_0(write)

    def _seal(self, step: int) -> None:
        """Writes the checksums of a step whose files are being written."""
        self.manager.wait_until_finished()
        checksums.write(self.folder / str(step))

    def _wait(self) -> None:
        """Waits on process 0 for the checksums of the previous save, and raises what went wrong in it."""
        sealing, self.sealing = self.sealing, None
        if sealing:
            sealing.result()

    def restore_newest(self, params: Any, optimizer: Any) -> tuple[Any, Any, int] | None:
        """Restores the newest checkpoint that can be restored.

        Damaged checkpoints that are newer are moved to damaged_checkpoints/, so that their steps can be saved
        again.

        Args:
          params: an abstract tree with the shapes, dtypes and shardings of the parameters.
          optimizer: the same for the optimizer's state.

        Returns:
          (params, optimizer state, step); None where there is no checkpoint.

        Raises:
          UserError: there are checkpoints, and none of them can be restored. Nothing is moved then.
        """
        unread: dict[int, str] = {}  # steps without a known fault that could not be read, and why
        step = self._newest()
        while step is not None:
            try:
                restored = self.restore(step, params, optimizer)
            except UserError as error:
                # What is as it was saved does not fit, and neither will older ones.
                if multihost.broadcast_from_process_0(self.is_sealed(step)):
                    raise
                unread[step] = str(error).removeprefix(f"{self.folder}/{step}: ")
            else:
                self._move_aside(step, unread)
                self.retention.forget(after=step)
                return restored
            step = self._newest(before=step)
        multihost.on_process_0(lambda: self._refuse_damaged(unread))
        self.retention.forget(after=0)
        return None

    def _refuse_damaged(self, unread: dict[int, str]) -> None:
        """Raises UserError where there are checkpoints and none of them could be restored."""
        damaged = {step: unread.get(step) or self.find_damage(step) for step in self.steps()}
        if not damaged:
            return
        newest, reason = next(iter(damaged.items()))
        if not self.find_damage(newest):
            raise UserError(f"{self.folder}/{newest}: {reason}")
        raise UserError(
            f"{self.folder}/{newest}: damaged ({reason}), and no older checkpoint is whole: "
            f"delete {self.folder} to begin anew, or use another MODEL_DIR"
        )

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, int]:
        """Restores the checkpoint of a step.

        Args:
          step: the step.
          params: an abstract tree with the shapes, dtypes and shardings of the parameters.
          optimizer: the same for the optimizer's state.

        Returns:
          (params, optimizer state, step).

        Raises:
          UserError: the checkpoint is damaged, or is of another network or optimizer.
        """
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
        )
        return restored["params"], restored["optimizer"], step

    def examples(self, step: int) -> int:
        """Returns the number of examples that were taken up to a step."""
        return self.position(step)["examples"]

    def position(self, step: int) -> dict:
        """Returns the position of a step in the data, and what `save` was given as `watch`."""
        return self._restore(step, position=ocp.args.JsonRestore())["position"]

    def restore_params(self, step: int, params: Any) -> Any:
        """Restores the parameters of a step alone."""
        return self._restore(step, params=ocp.args.StandardRestore(params))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        if reason := self.find_damage(step):
            raise UserError(f"{self.folder}/{step}: damaged ({reason}): train on, or use another MODEL_DIR")
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:
            raise  # the device's, such as too little memory
        except Exception as error:  # Orbax raises bare ones, too
            raise UserError(
                f"{self.folder}/{step}: does not fit this configuration ({first_line(error)}): "
                "use the optimiser that it was made with, or begin another MODEL_DIR with its weights "
                f"(--INITIAL_CHECKPOINT={self.folder.parent})"
            ) from None

    def _move_aside(self, restored: int, unread: dict[int, str]) -> None:
        """Moves damaged checkpoints that are newer than the restored one to damaged_checkpoints/."""

        def move() -> int:
            newer = [step for step in self.steps() if step > restored]
            for step in newer:
                reason = unread.get(step) or self.find_damage(step)
                moved = self.folder.with_name("damaged_checkpoints") / str(step)
                while moved.exists():
                    moved = moved.with_name(f"{moved.name}.again")
                moved.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(moved)  # in a bucket, a copy of its objects
                log(f"{self.folder}/{step}: damaged ({reason}): moved to {moved}, an older one goes on")
            return len(newer)

        if multihost.value_from_process_0(move):
            self.manager.reload()
            self.damage.clear()

    def best(self) -> dict:
        """Returns {"best_step", "best/METRIC"} of the best kept checkpoint; {} where none was evaluated."""
        step = self.retention.best(self.steps())
        if step is None:
            return {}
        return {"best_step": step, f"best/{self.retention.metric}": self.retention.scores.get(step)}

    def close(self) -> None:
        """Waits until everything is written. Processes do not wait for each other: one may have failed."""
        try:
            self._wait()
        finally:
            self.manager.close()
            self.pool.shutdown()
