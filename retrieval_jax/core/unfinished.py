"""Folders of unfinished work: its parts, each made once, which a later process goes on with after a kill.

    NAME.unfinished/recipe.json, and a file for each part, written whole or not at all

When all parts are there, they are joined into the folder NAME (`storage.build_once`), and this one goes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from retrieval_jax.core import paths, storage
from retrieval_jax.core.progress import log

_RECIPE = "recipe.json"


def has_begun(folder: Path, recipe: dict) -> bool:
    """Returns whether a folder holds parts of this recipe."""
    path = folder / _RECIPE
    return path.exists() and storage.read_json(path, f"delete {folder}") == json.loads(json.dumps(recipe))


def begin(folder: Path, recipe: dict, parts: Sequence[Path], what: str = "parts") -> None:
    """Makes the folder of the parts, unless it holds parts of the same recipe.

    Args:
      folder: the folder.
      recipe: everything that the content of the parts depends on, as JSON.
      parts: the files that mark finished parts, for the line which tells how many there are.
      what: what that line calls the parts.
    """
    if has_begun(folder, recipe):
        finished = sum(part.exists() for part in parts)
        log(f"{folder}: going on, {finished} of {len(parts)} {what} are finished")
        return
    paths.remove(folder)
    storage.write_json(folder / _RECIPE, recipe)


def remove_leftover(folder: Path, recipe: dict) -> None:
    """Removes the folder that a kill left after its parts had been joined; parts of other recipes stay.

    Args:
      folder: the folder.
      recipe: the recipe of parts that are not needed any more.
    """
    if has_begun(folder, recipe):
        with storage.lock(folder):
            if has_begun(folder, recipe):
                paths.remove(folder)
