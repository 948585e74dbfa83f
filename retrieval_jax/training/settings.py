"""What a run was trained with, kept beside its checkpoints, so that no other goes on with it unsaid.

MODEL_DIR/settings.json     name -> value, of all that changes what is learned; no paths, and nothing of how
                            long, how often saved or on which machines
MODEL_DIR/config.gin        the same run as gin tells it
"""

import json
import re
from pathlib import Path

import gin

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.core import configuration, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.mesh import multihost
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training.step import make_train_step

NAME = "settings.json"
# Modules whose gin parameters change what is learned: optimisers with their schedules, models, objectives.
LEARNING = ("retrieval_jax.training.optimizers.", "retrieval_jax.models.")
# T5Config is told by model.json, where it is not only how memory is saved.
NOT_COMPARED = ("T5Config.",)
CHOICES = ("refuse", "accept")


def learning_settings(steps: int) -> dict[str, str]:
    """The gin parameters, as text, of what is learned and how, given or by default.

    A schedule that ends where the run does is told as such: to go on for more steps is no other schedule.
    Inside of a gin scope (`demo` trains each model in one of its name) what holds in that scope counts, by
    the names that it has outside: the same run without the scope has the same settings.
    """
    # Defaults are known of what was called; bindings also of what is called later, such as an objective.
    values = {**gin.config._CONFIG, **gin.config._OPERATIVE_CONFIG}
    macros = {scope: one.get("value") for (scope, selector), one in values.items() if selector == "gin.macro"}

    def text(value: object) -> str:
        told = re.sub(r"%([\w.]+)", lambda m: text(macros[m[1]]) if m[1] in macros else m[0], repr(value))
        return told.removeprefix("@")

    found, here = {}, gin.current_scope_str()
    for (scope, selector), parameters in sorted(values.items(), key=lambda one: one[0][0] == here != ""):
        if selector.startswith(LEARNING) and scope in ("", here):
            name = selector.rpartition(".")[2]
            found |= {f"{name}.{key}": text(value) for key, value in parameters.items()}
    found = {name: value for name, value in found.items() if not name.startswith(NOT_COMPARED)}
    return {
        name: "train.steps" if name.endswith("learning_rate.steps") and value == str(steps) else value
        for name, value in found.items()
    }


def step_settings(retriever: type[Retriever]) -> dict:
    """The parameters of the training step that change what is learned.

    Other random bits are as another seed. Parts of a batch change which negatives a dual encoder's query has;
    other models learn the same from them but for rounding and which units are dropped, and may need them on
    another machine.
    """
    step = configuration.parameters_of(make_train_step)
    names = ["random_bits", *["microbatches"] * retriever.examples_interact]
    return {f"make_train_step.{name}": step[name] for name in names}


def keep(folder: Path, settings: dict, on_change: str) -> None:
    """Writes a run's settings, and gin's file of them, where they are new or differ and that is accepted.

    Args:
      folder: the model's, which is there.
      settings: name -> value, which JSON can hold.
      on_change: "refuse" or "accept" another value than that of the run which goes on.

    Raises UserError that names what differs.
    """
    if on_change not in CHOICES:
        raise UserError(f"train.on_change: no choice {on_change!r}: {' or '.join(CHOICES)}")
    path = folder / NAME
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists():
        there = storage.read_json(path, "delete the file to go on unasked")
        changed = {
            name: f"{name} was {there.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted({*there, *settings})
            if there.get(name) != settings.get(name)
        }
        if changed and on_change == "refuse":
            raise UserError(
                f"{folder}: trained with other settings: {'; '.join(changed.values())}: set them as they "
                "were, name another MODEL_DIR, or go on all the same with --gin.train.on_change=\"'accept'\""
            )
        if changed and multihost.is_process_0():
            log(f"{folder}: going on with other settings: {'; '.join(changed.values())}")
    if multihost.is_process_0():
        (folder / model_folder.GIN).write_text(gin.operative_config_str())
        storage.write_json(path, settings)
