"""Folders of unfinished work: its parts, each made once, which a later process goes on with after a kill.

    NAME.unfinished/recipe.json, and a file for each part, written whole or not at all
    NAME.unfinished/00000.jsonl, …    where the parts are `Shards`

When all parts are there, they are joined into the folder NAME (`storage.build_once`), and this one goes.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from retrieval_jax.core import paths, storage
from retrieval_jax.core.locks import lock
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
        with lock(folder):
            if has_begun(folder, recipe):
                paths.remove(folder)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Parts of things that are numbered from 0: a file of a part has a line of JSON for each of its things.

    Attributes:
      folder: the folder of the files.
      total: the number of things.
      size: the number of things of a shard; the last one may have fewer.
    """

    folder: Path
    total: int
    size: int

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-self.total // self.size)

    def rows(self, number: int) -> range:
        """Returns the numbers of the things of a shard."""
        return range(number * self.size, min((number + 1) * self.size, self.total))

    def path(self, number: int) -> Path:
        """Returns the file of a shard."""
        return self.folder / f"{number:05}.jsonl"

    @property
    def paths(self) -> list[Path]:
        """The files of all shards."""
        return [self.path(number) for number in range(self.count)]

    def missing(self, host: int, hosts: int) -> list[int]:
        """Returns the shards that one of several hosts still has to make. Hosts take shards in turn."""
        return [number for number in range(host, self.count, hosts) if not self.path(number).exists()]

    def write(self, number: int, lines: Iterable[object]) -> None:
        """Writes a shard completely or not at all.

        Args:
          number: the number of the shard.
          lines: what is known of each thing, as JSON.
        """
        text = "".join(json.dumps(line) + "\n" for line in lines)
        storage.atomic_write(self.path(number), text.encode())

    def read(self, numbers: Iterable[int]) -> Iterator:
        """Yields the lines of these shards."""
        for number in numbers:
            with self.path(number).open() as lines:
                yield from map(json.loads, lines)
