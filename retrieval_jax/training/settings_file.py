"""The settings of a run, kept beside its checkpoints, so that no run goes on with other ones unnoticed.

MODEL_DIR/settings.json     name -> value of all that changes what is learned; no paths, and nothing about
                            how long a run lasts, how often it saves or on which machines it runs
MODEL_DIR/config.gin        the same run as a gin file
"""

import json
from collections.abc import Mapping
from pathlib import Path

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.mesh import multihost

NAME = "settings.json"
# Modules whose gin parameters change what is learned: optimisers with their schedules, models, objectives.
LEARNING = ("retrieval_jax.training.optimizers.", "retrieval_jax.models.")
REFERENCES = ("train.retriever", "train.optimizer")  # these may be of any module
# These are in model.json, but for what only saves memory.
NOT_COMPARED = ("T5Config.", "GenerativeRetriever.score")
CHOICES = ("refuse", "accept")


def learning_settings(parameters: Mapping[str, str], steps: int) -> dict[str, str]:
    """Gives the gin parameters, as text, that change what is learned.

    Args:
      parameters: those of LEARNING and REFERENCES, by name; see `configuration.texts_of_parameters`.
      steps: of the run. A schedule that ends with the run is said to end at "train.steps": a run that goes on
        for more steps does not have another schedule.

    Returns:
      name -> value.
    """
    compared = {name: value for name, value in parameters.items() if not name.startswith(NOT_COMPARED)}
    return {
        name: "train.steps" if name.endswith("learning_rate.steps") and value == str(steps) else value
        for name, value in compared.items()
    }


def keep(folder: Path, settings: dict, on_change: str, config: str) -> None:
    """Writes a run's settings where they are new, or differ and that is accepted.

    Args:
      folder: the model's folder, which exists.
      settings: name -> value; JSON can hold it.
      on_change: "refuse" or "accept": what to do where the run that goes on had another value.
      config: the text of config.gin.

    Raises:
      UserError: a value differs, and that is refused.
    """
    if on_change not in CHOICES:
        raise UserError(f"train.on_change: no choice {on_change!r}: {' or '.join(CHOICES)}")
    path = folder / NAME
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists():
        there = storage.read_json(path, "delete the file to go on unasked")
        if "train.microbatches" in settings:  # earlier versions noted it of fewer models
            there.setdefault("train.microbatches", settings["train.microbatches"])
        changed = {
            name: f"{name} was {there.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted({*there, *settings})
            if there.get(name) != settings.get(name)
        }
        # Nothing was learned yet with settings of which no checkpoint is there.
        if changed and on_change == "refuse" and model_folder.is_begun(folder):
            raise UserError(
                f"{folder}: trained with other settings: {'; '.join(changed.values())}: set them as they "
                "were, name another MODEL_DIR, or go on all the same with --gin.train.on_change=\"'accept'\""
            )
        if changed and multihost.is_process_0():
            log(f"{folder}: going on with other settings: {'; '.join(changed.values())}")
    if multihost.is_process_0():
        (folder / model_folder.GIN).write_text(config)
        storage.write_json(path, settings)
