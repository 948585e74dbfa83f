"""The fifth noun: the searcher. All that evaluation, reports and servers know of a retriever."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.data.records import Collection

SEARCHERS = {
    "generative": "retrieval_jax.search.generative:GenerativeSearcher",
    "exact": "retrieval_jax.search.dense:ExactSearcher",
    "scann": "retrieval_jax.search.dense:ScannSearcher",
    "bm25": "retrieval_jax.search.bm25:BM25Searcher",
}
"""Kind of searcher -> MODULE:CLASS, whose `open(folder)` opens it. No other kind's module is imported."""
BATCH_SIZE = 32  # queries that are searched for at once
RankedList = list[tuple[str, float]]
"""(passage id, score), best first, each passage once."""


class Searcher(Protocol):
    """Finds passages. Four kinds: generative, exact and ScaNN (dense), BM25."""

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """The best k passages of each query (fewer where there are fewer). Any number of queries, also none.

        Equal scores are in the order of the passages in the collection, for any `k`, batch and number of
        devices. Different docids that a generative model finds equally probable are in the order of its
        beams; atomic ones in that of their tokens, which is the passages' unless docids were extended.

        Half a surrogate pair in a query (no text in UTF-8) is read as U+FFFD.
        """
        ...

    @staticmethod
    def open(folder: str | Path, make_mesh: Callable | None = None) -> "Searcher":
        """Opens what `retrieval-jax index` or `export` made, without gin, TensorFlow or the collection.

        Args:
          folder: the searcher's.
          make_mesh: gives the mesh (jax.sharding.Mesh) that it runs on, if it runs on one; None: all devices.

        Raises UserError where files are missing, or were changed after they were made.
        """
        return _open(paths.as_path(folder), make_mesh)


def search_in_batches(searcher: Searcher, queries: Sequence[str], k: int, what: str) -> Iterator[RankedList]:
    """Each query's ranking, found for BATCH_SIZE queries at a time, with a progress bar of that name."""
    with bar(what, len(queries)) as advance:
        for first in range(0, len(queries), BATCH_SIZE):
            found = searcher.search(queries[first : first + BATCH_SIZE], k)
            yield from found
            advance(len(found))


def searcher_manifest(folder: Path, collection: Collection) -> dict:
    """What `retrieval-jax index` wrote there.

    Raises UserError for a searcher of another collection, or whose model was replaced since.
    """
    manifest = storage.read_manifest(folder, "index")
    if manifest["recipe"]["collection"] != collection.fingerprint:
        raise UserError(
            f"{folder}: made of another collection than {collection.folder}: `retrieval-jax index`"
        )
    check_model(folder, manifest)
    return manifest


def check_model(folder: Path, manifest: dict) -> None:
    """Raises UserError where a searcher's model is another one than the searcher was made of.

    A model can be trained anew to the same step; only its content tells. Where the model, or its checkpoint,
    is missing, nothing is raised here: opening the searcher does that. The model in an exported folder is
    compared with the rest of that folder's files.
    """
    if "model" not in manifest or "files" in manifest:
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


def _open(folder: Path, make_mesh: Callable | None) -> Searcher:
    manifest = storage.read_manifest(folder, "index")
    kind = manifest["kind"]
    if "files" in manifest:  # it was exported, and may have come from elsewhere
        folder = paths.ensure_local(folder)
        storage.check_files(folder, manifest)
    check_model(folder, manifest)
    module, _, name = SEARCHERS[kind].partition(":")
    return getattr(importlib.import_module(module), name).open(folder, make_mesh)
