"""Folders of what is known of a collection's queries, in a file for the train and one for the dev ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection


class QueryFolder:
    """A finished folder; its manifest has the facts that `merge` makes. A subclass reads the files.

    Args:
      folder: the folder, local or remote.

    Attributes:
      verb: the verb that makes such folders.
      file: the name of a split's file, with "{split}" in it.
      recipe: what the folder was made from.
      fingerprint: the checksum of the file of the train queries.
    """

    verb: ClassVar[str]
    file: ClassVar[str]

    def __init__(self, folder: str | Path):
        self.folder = paths.as_path(folder)
        manifest = storage.read_manifest(folder, self.verb)
        self.recipe: dict = manifest["recipe"]
        self.fingerprint: str = manifest["fingerprint"]
        self._dev_fingerprint: str | None = manifest.get("dev_fingerprint")

    @classmethod
    def file_name(cls, split: str) -> str:
        """Gives the name of a split's file."""
        return cls.file.format(split=split)

    def fingerprint_of(self, split: str) -> str | None:
        """Returns the checksum of a split's file, train or dev; None where there is none."""
        return self.fingerprint if split == "train" else self._dev_fingerprint

    def local_file(self, collection: Collection, split: str) -> Path | None:
        """Returns the file of a split as a local one; None where there is none, as there may be none for dev.

        Raises:
          UserError: it was made for another collection, is missing, or is damaged.
        """
        path = self.folder / self.file_name(split)
        return checked_file(path, self.verb, self.recipe, collection, split, self.fingerprint_of(split))


def checked_file(
    path: Path, verb: str, recipe: Mapping, collection: Collection, split: str, fingerprint: str | None
) -> Path | None:
    """Returns a file of a finished folder as a local one.

    Args:
      path: the file.
      verb: the verb that makes the folder.
      recipe: the folder's, which has what `Collection.recipe` gave when it was made.
      collection: the collection as it is now.
      split: whose queries the file is of.
      fingerprint: the file's checksum, as the manifest has it; None where there is no such file.

    Raises:
      UserError: the folder was made for other passages or queries, or the file is missing or damaged.
    """
    hint = f"make it again with `retrieval-jax {verb}`"
    if recipe["collection"] != collection.fingerprint:
        raise UserError(
            f"{path.parent}: of another collection (or an earlier one) than {collection.folder}: {hint}"
        )
    if recipe.get("queries", {}).get(split) != collection.query_fingerprints.get(split):
        raise UserError(f"{path.parent}: of other {split} queries than {collection.folder} has now: {hint}")
    if fingerprint is None:
        return None
    if not path.is_file() or storage.checksum(path) != fingerprint:
        raise UserError(f"{path}: missing or altered: {hint}")
    return paths.ensure_local(path)


def merge(of_splits: Mapping[str, dict]) -> dict:
    """Returns a manifest's facts: those of train, and the fingerprint of dev, if there is that split.

    Args:
      of_splits: split -> facts of its file, of which one is its "fingerprint".
    """
    dev = {"dev_fingerprint": of_splits["dev"]["fingerprint"]} if "dev" in of_splits else {}
    return of_splits["train"] | dev
