"""The fourth noun: checkpoints, through Orbax, which writes each one aside and renames it.

MODEL_DIR/checkpoints/STEP/     params, optimizer, position (in the data), checksums.json

What else lies in a model's folder: see model_folder.py.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from retrieval_jax import paths
from retrieval_jax.errors import UserError
from retrieval_jax.progress import say
from retrieval_jax.training import checksums, multihost


class Checkpoints:
    """The checkpoints of a model folder. Each holds params, the optimiser's state and the data position.

    A step whose files are not what was saved counts as damaged. `read_only` leaves the folder as it is.
    """

    def __init__(self, model_dir: str | Path, keep: int = 2, read_only: bool = False):
        self.folder = paths.absolute(model_dir) / "checkpoints"
        if paths.is_remote(self.folder) and not paths.has_client():
            raise UserError(
                f"{self.folder}: checkpoints in a bucket need a package that is not installed: "
                "pip install 'retrieval_jax[gcs]'"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,  # what a kill left of a save
            read_only=read_only,
            create=not read_only,
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("params", "optimizer", "position")
        )
        self.read_only = read_only
        self.faults: dict[int, str | None] = {}  # as far as looked for

    def steps(self) -> list[int]:
        """The steps that have a folder, whole or damaged, newest first."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((int(p.name) for p in there if p.name.isdigit()), reverse=True)

    def fault(self, step: int) -> str | None:
        """What is wrong with a step's files; None if nothing is known to be.

        Of processes that train together the first one looks; one that only reads looks itself.
        """
        if step not in self.faults:
            found = None
            if self.read_only or multihost.is_first():
                found = checksums.fault(self.folder / str(step))
                if found is None and step not in self.manager.all_steps():
                    found = "its save did not end"
            if not self.read_only and multihost.agreed(found is not None):
                found = found or "as the first process tells"
            self.faults[step] = found
        return self.faults[step]

    def latest(self) -> int | None:
        """The step of the newest checkpoint that is not damaged."""
        return next((step for step in self.steps() if not self.fault(step)), None)

    def save(self, step: int, params: Any, optimizer: Any) -> None:
        """Saves after `step` steps; the position in the data is the number of batches taken."""
        if step == self.manager.latest_step():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                position=ocp.args.JsonSave({"batches": step}),
            ),
        )
        multihost.first_does(lambda: checksums.write(self.folder / str(step)))

    def restore_newest(self, params: Any, optimizer: Any) -> tuple[Any, Any, int] | None:
        """`restore` at the newest step that can be; None where there is no checkpoint.

        Damaged ones that are newer are moved to damaged_checkpoints/, so that their steps can be saved again.
        Where nothing can be restored, raises UserError and moves nothing.
        """
        damaged: dict[int, str] = {}
        for step in self.steps():
            reason = self.fault(step)
            if not reason:
                try:
                    restored = self.restore(step, params, optimizer)
                except UserError as error:
                    # What is as it was saved does not fit, and neither will older ones.
                    if (self.folder / str(step) / checksums.NAME).exists():
                        raise
                    reason = str(error).removeprefix(f"{self.folder}/{step}: ")
                else:
                    self._move_aside(damaged)
                    return restored
            damaged[step] = reason
        if not damaged:
            return None
        newest, reason = next(iter(damaged.items()))
        if not self.fault(newest):
            raise UserError(f"{self.folder}/{newest}: {reason}")
        raise UserError(
            f"{self.folder}/{newest}: damaged ({reason}), and no older checkpoint is whole: "
            f"delete {self.folder} to begin anew, or use another MODEL_DIR"
        )

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, int]:
        """(params, optimiser's state, batches taken) at a step, laid out like the given abstract trees.

        Raises UserError where it is damaged, or of another network or optimiser.
        """
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
            position=ocp.args.JsonRestore(),
        )
        if restored["position"] != {"batches": step}:
            raise UserError(f"{self.folder}/{step}: its position is not that step's: use another MODEL_DIR")
        return restored["params"], restored["optimizer"], step

    def restore_params(self, step: int, params: Any) -> Any:
        """The params alone."""
        return self._restore(step, params=ocp.args.StandardRestore(params))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        if reason := self.fault(step):
            raise UserError(f"{self.folder}/{step}: damaged ({reason}): train on, or use another MODEL_DIR")
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:
            raise  # the device's, such as too little memory
        except Exception as error:  # Orbax raises bare ones, too
            lines = str(error).strip().splitlines()
            raise UserError(
                f"{self.folder}/{step}: does not fit this configuration ({(lines or ['?'])[0][:200]}): "
                "use the optimiser that it was made with, or another MODEL_DIR"
            ) from None

    def _move_aside(self, damaged: dict[int, str]) -> None:
        def move() -> None:
            for step, reason in damaged.items():
                aside = self.folder.with_name("damaged_checkpoints") / str(step)
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}.again")
                aside.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(aside)  # in a bucket, a copy of its objects
                say(f"{self.folder}/{step}: damaged ({reason}): moved to {aside}, an older one goes on")

        if damaged:
            multihost.first_does(move)
            self.manager.reload()
            self.faults.clear()

    def close(self) -> None:
        self.manager.close()
