"""The manifest of a searcher's folder, and whether what it names is what the searcher was made of."""

from collections.abc import Iterator
from pathlib import Path

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection


def searcher_manifest(folder: Path, collection: Collection) -> dict:
    """Returns the manifest that `retrieval-jax index` wrote.

    Raises:
      UserError: the searcher is of another collection, its weights were chosen with other queries, or its
        model or a part of it was replaced since.
    """
    manifest = storage.read_manifest(folder, "index")
    if manifest["recipe"]["collection"] != collection.fingerprint:
        raise UserError(
            f"{folder}: made of another collection than {collection.folder}: `retrieval-jax index`"
        )
    for split, fingerprint in _chosen_with(manifest["recipe"]):
        if collection.query_fingerprints.get(split) != fingerprint:
            raise UserError(
                f"{folder}: its weights were chosen with other {split} queries than {collection.folder} has "
                "now: `retrieval-jax index`"
            )
    check_sources(folder, manifest)
    return manifest


def _chosen_with(recipe: dict) -> Iterator[tuple[str, str]]:
    """Yields (split, fingerprint) of the queries with which its weights, or those of a part, were chosen."""
    yield from recipe.get("queries", {}).items()
    for part in recipe.get("parts", ()):
        yield from _chosen_with(part["recipe"])


def check_sources(folder: Path, manifest: dict) -> None:
    """Raises UserError if what a searcher answers with is not what it was built with.

    That is its model (see `check_model`), and of a fused searcher its parts: its weights were chosen for
    those. What an exported folder holds is checked together with that folder's other files.
    """
    if "files" in manifest:
        return
    check_model(folder, manifest)
    for part in manifest.get("parts", ()):
        place = paths.join(folder, part["folder"])
        now = storage.read_manifest(place, "index")
        if now["recipe"] != part["recipe"]:
            raise UserError(
                f"{paths.absolute(place)}: not the searcher that {folder} was made of: make {folder.name} "
                "again, `retrieval-jax index`"
            )
        check_sources(place, now)


def check_model(folder: Path, manifest: dict) -> None:
    """Raises UserError if a searcher's model is not the one that the searcher was built with.

    A model can be trained again to the same step, so that only its content tells them apart. Nothing is
    raised here if the model or its checkpoint is missing: opening the searcher reports that.
    """
    if "model" not in manifest:
        return
    from retrieval_jax.checkpoints.model_folder import DESCRIPTION, model_checksum, read_description

    model = paths.join(folder, manifest["model"])
    if not (model / DESCRIPTION).is_file():
        return
    now = model_checksum(model, manifest["step"], read_description(model))
    if now is not None and now != manifest["recipe"].get("checksum"):
        raise UserError(
            f"{paths.absolute(model)}: not the model (of step {manifest['step']}) that {folder} was made of: "
            "`retrieval-jax index`"
        )
