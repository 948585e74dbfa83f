"""The fourth noun: checkpoints, through Orbax, which writes each one aside and renames it.

MODEL_DIR/model.json            what the model is: enough to open it
MODEL_DIR/sentencepiece.model   its vocabulary
MODEL_DIR/checkpoints/STEP/     params, optimizer, position (in the data)
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
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.t5 import T5Config
from retrieval_jax.training import partitioning

Model = GenerativeRetriever | DualEncoder | QueryGenerator
RETRIEVERS = {cls.__name__: cls for cls in (GenerativeRetriever, DualEncoder, QueryGenerator)}


class Checkpoints:
    """The checkpoints of a model folder. Each holds params, the optimiser's state and the data position."""

    def __init__(self, model_dir: str | Path, keep: int = 2):
        self.folder = Path(model_dir).resolve() / "checkpoints"
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False),
            item_names=("params", "optimizer", "position"),
        )

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, params: Any, optimizer: Any) -> None:
        """Saves after `step` steps; the position in the data is the number of batches taken."""
        if step != self.latest():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    optimizer=ocp.args.StandardSave(optimizer),
                    position=ocp.args.JsonSave({"batches": step}),
                ),
            )

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, int]:
        """(params, optimiser's state, batches taken) at a step, laid out like the given abstract trees."""
        try:
            restored = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    optimizer=ocp.args.StandardRestore(optimizer),
                    position=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise self._unreadable(step, error) from None
        return restored["params"], restored["optimizer"], restored["position"]["batches"]

    def restore_params(self, step: int, params: Any) -> Any:
        """The params alone."""
        try:
            args = ocp.args.Composite(params=ocp.args.StandardRestore(params))
            return self.manager.restore(step, args=args)["params"]
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise self._unreadable(step, error) from None

    def _unreadable(self, step: int, error: Exception) -> UserError:
        reason = str(error).strip().splitlines()[0][:200]
        return UserError(
            f"{self.folder}/{step}: does not fit this configuration ({reason}): "
            "use the optimiser that it was made with, or another MODEL_DIR"
        )

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
    settings = {k: getattr(model, k) for k in ("vector_dim", "scale") if hasattr(model, k)}
    return {
        "retriever": type(model).__name__,
        "network": dataclasses.asdict(model.config),
        "settings": settings,
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
    checkpoints = Checkpoints(folder)
    steps = checkpoints.manager.all_steps()
    if not steps:
        raise UserError(f"{folder}: no checkpoint here yet: {mend}")
    step = max(steps) if step is None else step
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
