"""The fourth noun: checkpoints, through Orbax, which writes each one aside and renames it.

MODEL_DIR/model.json            what the model is: enough to open it
MODEL_DIR/sentencepiece.model   its vocabulary
MODEL_DIR/checkpoints/STEP/     params, optimizer, position (in the data), checksums.json
MODEL_DIR/learning_curve.jsonl, events.out.tfevents.*, config.gin
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from retrieval_jax import storage
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.errors import UserError
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.progress import say
from retrieval_jax.training import checksums, multihost, partitioning

Model = GenerativeRetriever | DualEncoder | QueryGenerator
RETRIEVERS = {cls.__name__: cls for cls in (GenerativeRetriever, DualEncoder, QueryGenerator)}


class Checkpoints:
    """The checkpoints of a model folder. Each holds params, the optimiser's state and the data position.

    A step whose files are not what was saved counts as damaged. `read_only` leaves the folder as it is.
    """

    def __init__(self, model_dir: str | Path, keep: int = 2, read_only: bool = False):
        self.folder = Path(model_dir).resolve() / "checkpoints"
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
                (self.folder / str(step)).rename(aside)
                say(f"{self.folder}/{step}: damaged ({reason}): moved to {aside}, an older one goes on")

        if damaged:
            multihost.first_does(move)
            self.manager.reload()
            self.faults.clear()

    def close(self) -> None:
        self.manager.close()


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A trained model, ready to search with: enough for any searcher, without gin or TensorFlow."""

    model: Model
    params: dict
    step: int
    vocabulary: Vocabulary
    description: dict

    @property
    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def describe(model: Model, **facts: object) -> dict:
    """What model.json says: the class, its sizes, and facts such as lengths and the collection."""
    network = dataclasses.asdict(model.config)
    del network["remat"]  # how it was trained, not what it is: a run may go on with another
    return {
        "retriever": type(model).__name__,
        "network": network,
        "settings": getattr(model, "settings", {}),
        **facts,
    }


def open_model(model_dir: str | Path, step: int | None = None, mesh: Mesh | None = None) -> OpenModel:
    """Opens a model folder at a step (None: its newest checkpoint), on a mesh (None: on one device)."""
    folder = Path(model_dir)
    mend = "train it with `retrieval-jax train`, or check MODEL_DIR"
    description = storage.read_json(folder / "model.json", mend)
    model = RETRIEVERS[description["retriever"]](
        T5Config(**description["network"]), None, **description["settings"]
    )
    # Only looks: opening a manager on a folder without checkpoints would make one.
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no checkpoint here yet: {mend}")
    checkpoints = Checkpoints(folder, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{folder}: no checkpoint here yet: {mend}")
    if step is None:
        step = checkpoints.latest() or steps[0]
        if step < steps[0]:
            reason = checkpoints.fault(steps[0])
            say(f"{checkpoints.folder}/{steps[0]}: damaged ({reason}): the one of step {step} is taken")
    if step not in steps:
        raise UserError(
            f"{folder}: its checkpoint of step {step} is gone: `retrieval-jax index` takes the newest"
        )
    shapes = {name: (1, 2) for name in ("encoder_input_tokens", "decoder_input_tokens")}
    shapes["left_encoder_input_tokens"] = (1, 2)
    boxed = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))["params"]
    mesh = mesh or Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), ("data", "model"))
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        nn.unbox(boxed),
        partitioning.params_shardings(mesh, boxed),
    )
    params = checkpoints.restore_params(step, abstract)
    checkpoints.close()
    return OpenModel(model, params, step, Vocabulary(folder / "sentencepiece.model"), description)
