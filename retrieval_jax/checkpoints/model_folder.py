"""A model's folder: everything that is needed to open the model, without gin or TensorFlow.

MODEL_DIR/model.json            the model's class, network and settings: enough to open it
MODEL_DIR/sentencepiece.model   its vocabulary
MODEL_DIR/checkpoints/STEP/     the weights of a model that is trained here: see checkpoints.py
MODEL_DIR/weights.safetensors   the weights of a converted or exported one: a file, or shards and an index
MODEL_DIR/began_with.json       of `ripor` and `pag`: fingerprints of the models that it began with
MODEL_DIR/learning_curve.jsonl, events.out.tfevents.*, config.gin
MODEL_DIR/settings.json         what it was trained with: see training/settings_file.py
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from retrieval_jax.checkpoints import checksums
from retrieval_jax.checkpoints.checkpoints import Checkpoints
from retrieval_jax.checkpoints.weights import LazyArray, read_ocdbt, read_safetensors, to_devices
from retrieval_jax.core import configuration, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.mesh import partitioning
from retrieval_jax.models import (  # noqa: F401 (they register)
    dual_encoder,
    generative,
    lexical_encoder,
    query_generator,
)
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.retriever import RETRIEVERS, Retriever

DESCRIPTION, VOCABULARY, GIN, WEIGHTS = "model.json", "sentencepiece.model", "config.gin", "weights"
FORMAT = 2  # of model.json
HINT = "train it with `retrieval-jax train`, or check MODEL_DIR"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its parameters on devices, ready to search with.

    Attributes:
      model: an instance of the retriever class, without an optimizer.
      params: the parameters, placed on the mesh.
      step: the number of steps that the model was trained.
      vocabulary: the SentencePiece vocabulary of its texts.
      description: the content of model.json.
    """

    model: Retriever
    params: dict
    step: int
    vocabulary: Vocabulary
    description: dict

    @property
    def parameter_count(self) -> int:
        """The number of all parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def describe(model: Retriever, **facts: object) -> dict:
    """Builds the content of model.json.

    Args:
      model: the model.
      **facts: what else the file says, such as lengths and the collection.
    """
    network = dataclasses.asdict(model.config)
    del network["remat"]  # how it was trained, not what it is: a run may go on with another
    if not model.config.lexical_head:
        del network["lexical_head"]  # models without one are the same as before there was one
    network["mlp_activations"] = list(network["mlp_activations"])  # as JSON has it
    return {
        "format": FORMAT,
        "retriever": type(model).__name__,
        "network": network,
        "settings": dict(model.settings),
        **facts,
    }


def load_model(
    model_dir: str | Path,
    step: int | None = None,
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> LoadedModel:
    """Loads the model of a folder, built from what model.json says, whatever gin was told.

    Args:
      model_dir: the model's folder, also gs://….
      step: the checkpoint to load; None means the newest one that is whole.
      mesh: the devices that the parameters are placed on; None means the first local device.
      rules: the mesh axes of each logical axis; see `partitioning.axis_rules`.

    Raises:
      UserError: there is no model or no such checkpoint, it is damaged, or a parameter is not finite.
    """
    folder = paths.as_path(model_dir)
    description = read_description(folder)
    model = model_from_description(description)
    mesh = mesh or partitioning.all_devices(devices=jax.local_devices()[:1])
    if has_weights(folder):
        _, step = read_description_and_step(folder, step)
        params = params_to_devices(read_safetensors(folder, WEIGHTS), model, mesh, rules)
    else:
        checkpoints, step = _checkpoint(folder, step)
        params = checkpoints.restore_params(step, abstract_params(model, mesh, rules))
        checkpoints.close()
    check_finite(folder, params)
    vocabulary = Vocabulary(folder / VOCABULARY, description.get("symbols"))
    return LoadedModel(model, params, step, vocabulary, description)


def model_from_description(description: dict) -> Retriever:
    """Builds the model that a model.json describes. Nothing comes from gin, and gin records nothing of it.

    A run that opens another model, to cluster its docids for example, has no settings of that model.
    """
    retriever = RETRIEVERS[description["retriever"]]
    with configuration.unrecorded():
        config = T5Config(**{**_defaults(T5Config), **description["network"]})
        return retriever(config, None, **{**_defaults(retriever), **description["settings"]})


def _defaults(function: type) -> dict:
    """The default values of a class's parameters. Passed in the call, they cannot be replaced by gin."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "optimizer_def"}


def check_finite(folder: Path, params: dict) -> None:
    """Checks that all parameters are finite.

    A search with other parameters would rank by comparisons with NaN, all of which are false.

    Raises:
      UserError: a parameter has an infinity or NaN; the error names it.
    """
    finite = {name: _all_finite(x) for name, x in flatten_dict(params, sep="/").items()}
    bad = [name for name, is_finite in jax.device_get(finite).items() if not is_finite]
    if bad:
        more = f", and {len(bad) - 1} arrays more" if len(bad) > 1 else ""
        raise UserError(
            f"{folder}: {bad[0]} has an infinity or NaN{more}: train it again, or copy its weights again"
        )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    """Whether all numbers of an array are finite; each device checks its own shard."""
    return jnp.all(jnp.isfinite(x))


def read_description(folder: Path) -> dict:
    """Reads model.json.

    Raises:
      UserError: there is none, or another version wrote it.
    """
    path = folder / DESCRIPTION
    description = storage.read_json(path, HINT)
    later = "upgrade retrieval_jax, or train the model again"
    if (found := description.get("format", 1)) > FORMAT:
        raise UserError(f"{path}: of format {found}, and {FORMAT} is the last known here: {later}")
    if found < FORMAT:
        raise UserError(
            f"{path}: made by an earlier version of retrieval_jax: train or convert the model again"
        )
    retriever = RETRIEVERS.get(description["retriever"])
    if retriever is None:
        raise UserError(f"{path}: no retriever {description['retriever']!r} is known here: {later}")
    for key, known in (("network", T5Config), ("settings", retriever)):
        if unknown := description[key].keys() - inspect.signature(known).parameters.keys():
            raise UserError(f"{path}: {key}: {', '.join(sorted(unknown))} is not known here: {later}")
    return description


def has_weights(folder: Path) -> bool:
    """Whether the weights of a model folder were converted or exported, and not trained there."""
    return any(folder.glob(f"{WEIGHTS}.safetensors*"))


def is_begun(folder: Path) -> bool:
    """Whether a training in a model folder has saved a checkpoint, be it damaged."""
    return (folder / DESCRIPTION).is_file() and bool(_saved_steps(folder))


def is_model(folder: Path) -> bool:
    """Whether a model folder has weights: a checkpoint's, be it damaged, or converted or exported ones."""
    return is_begun(folder) or has_weights(folder)


def is_untrained(folder: Path) -> bool:
    """Whether a model folder's only checkpoint is of step 0: of what a training would begin with."""
    return _saved_steps(folder) == ["0"]


def _saved_steps(folder: Path) -> list[str]:
    """Lists the names of the checkpoints' folders, in any order."""
    saved = folder / "checkpoints"
    return [path.name for path in saved.iterdir() if path.name.isdigit()] if saved.is_dir() else []


def model_checksum(model_dir: str | Path, step: int, description: dict) -> str | None:
    """Computes a fingerprint of everything that a model's answers depend on.

    That is the weights, the network, the settings, the lengths and the vocabulary. The fingerprint names the
    model in the recipes of what is made with it, because another training may reach the same step in the same
    folder.

    Args:
      model_dir: the model's folder.
      step: one of its checkpoints.
      description: the content of its model.json.

    Returns:
      The fingerprint; None where the weights of that step are not there.
    """
    folder = paths.as_path(model_dir)
    saved = folder if has_weights(folder) else folder / "checkpoints" / str(step)
    if not saved.is_dir():
        return None
    weights = sorted(folder.glob(f"{WEIGHTS}*.safetensors*"))
    if not has_weights(folder):
        weights = paths.files(saved / "params")
    names = [str(path.relative_to(saved)) for path in weights]
    if (saved / checksums.NAME).is_file():  # compared with the files when the model is opened
        known = json.loads((saved / checksums.NAME).read_text())
        sums = [str(known.get(name)) for name in names]
    else:
        sums = [storage.checksum(path) for path in weights]
    keys = ("network", "settings", "input_length", "passage_length")
    facts = {key: description.get(key) for key in keys}
    facts |= {"symbols": description["symbols"]} if description.get("symbols") else {}
    settings = json.dumps(facts, sort_keys=True)
    return storage.digest([*names, *sums, settings, storage.checksum(folder / VOCABULARY)])


def model_recipe(model_dir: str | Path, step: int, description: dict) -> dict:
    """Returns what the recipe of an artefact says about the model that made it: folder, step, checksum."""
    return {
        "model": str(paths.absolute(model_dir)),
        "step": step,
        "checksum": model_checksum(model_dir, step, description),
    }


def read_description_and_step(folder: Path, step: int | None = None) -> tuple[dict, int]:
    """Reads model.json and finds the step to open.

    Args:
      folder: the model's folder.
      step: the step that is asked for; None means the newest one that is whole.

    Returns:
      (the content of model.json, the step).

    Raises:
      UserError: there is no such checkpoint.
    """
    description = read_description(folder)
    if has_weights(folder):
        there = description["step"]
        if step not in (None, there):
            raise UserError(f"{folder}: its weights are of step {there}, not {step}: leave MODEL_STEP away")
        return description, there
    checkpoints, step = _checkpoint(folder, step)
    checkpoints.close()
    return description, step


def lazy_params(folder: Path) -> tuple[dict, int, dict[str, LazyArray]]:
    """Opens a folder's newest checkpoint: (the content of model.json, the step, {name: lazy array})."""
    description, step = read_description_and_step(folder)
    if has_weights(folder):
        return description, step, read_safetensors(folder, WEIGHTS)
    return description, step, read_ocdbt(paths.absolute(folder) / "checkpoints" / str(step) / "params")


def _checkpoint(folder: Path, step: int | None) -> tuple[Checkpoints, int]:
    """Opens the checkpoints for reading, and finds the step to read. Raises UserError where there is none."""
    # Only looks: opening a manager on a folder without checkpoints would make one.
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no checkpoint here yet: {HINT}")
    checkpoints = Checkpoints(folder, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{folder}: no checkpoint here yet: {HINT}")
    if step is None:
        latest = checkpoints.latest()
        step = steps[0] if latest is None else latest
        if step < steps[0]:
            damage = checkpoints.find_damage(steps[0])
            reason = f"damaged ({damage})" if damage else "its checksums are not written yet"
            log(f"{checkpoints.folder}/{steps[0]}: {reason}: the one of step {step} is taken")
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(
            f"{folder}: no checkpoint of step {step} (any more), but of {there}: `retrieval-jax index` takes "
            "the newest, or that of --MODEL_STEP"
        )
    return checkpoints, step


def boxed_params(model: Retriever) -> dict:
    """Returns shapes and dtypes of a model's parameters, boxed with the logical names of their axes."""
    names = ("encoder_input_tokens", "decoder_input_tokens", "left_encoder_input_tokens")
    shapes = dict.fromkeys(names, (1, 2))
    return jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))["params"]


def abstract_params(
    model: Retriever, mesh: Mesh, rules: partitioning.Rules = partitioning.DEFAULT_RULES
) -> dict:
    """Returns shapes, dtypes and shardings of a model's parameters on a mesh."""
    boxed = boxed_params(model)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        nn.unbox(boxed),
        partitioning.params_shardings(mesh, boxed, rules),
    )


def params_to_devices(
    arrays: Mapping[str, LazyArray],
    model: Retriever,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> dict:
    """Places a model's parameters on a mesh, from lazy arrays of the same names and shapes."""
    flat = flatten_dict(abstract_params(model, mesh, rules), sep="/")
    return unflatten_dict({name: to_devices(arrays[name], like) for name, like in flat.items()}, sep="/")
