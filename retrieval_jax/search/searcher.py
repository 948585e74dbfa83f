"""The fifth noun: the searcher. All that evaluation, reports and servers know of a retriever."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from retrieval_jax import paths, storage
from retrieval_jax.data.records import Collection
from retrieval_jax.errors import UserError
from retrieval_jax.progress import bar

BATCH = 32  # queries that are searched for at once
Ranking = list[tuple[str, float]]
"""(passage id, score), best first, each passage once."""


class Searcher(Protocol):
    """Finds passages. Four kinds: generative, exact and ScaNN (dense), BM25."""

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The best k passages of each query (fewer where there are fewer). Any number of queries, also none.

        Half a surrogate pair in a query (no text in UTF-8) is read as U+FFFD.
        """
        ...

    @staticmethod
    def open(folder: str | Path) -> "Searcher":
        """Opens what `retrieval-jax index` or `export` made, without gin, TensorFlow or the collection.

        Raises UserError where files are missing, or were changed after they were made.
        """
        return _open(paths.of(folder))


def rankings(searcher: Searcher, queries: Sequence[str], k: int, what: str) -> Iterator[Ranking]:
    """Each query's ranking, found for BATCH queries at a time, with a progress bar of that name."""
    with bar(what, len(queries)) as advance:
        for first in range(0, len(queries), BATCH):
            found = searcher.search(queries[first : first + BATCH], k)
            yield from found
            advance(len(found))


def searcher_manifest(folder: Path, collection: Collection) -> dict:
    """What `retrieval-jax index` wrote there. Raises UserError for a searcher of another collection."""
    manifest = storage.read_manifest(folder, "index")
    if manifest["recipe"]["collection"] != collection.fingerprint:
        raise UserError(
            f"{folder}: made of another collection than {collection.folder}: `retrieval-jax index`"
        )
    return manifest


def _open(folder: Path) -> Searcher:
    manifest = storage.read_manifest(folder, "index")
    kind = manifest["kind"]
    if "files" in manifest:  # it was exported, and may have come from elsewhere
        folder = paths.local(folder)
        storage.check_files(folder, manifest)
    if kind == "bm25":
        from retrieval_jax.search.bm25 import BM25Searcher

        return BM25Searcher.open(folder)
    if kind == "generative":
        from retrieval_jax.search.generative import GenerativeSearcher

        return GenerativeSearcher.open(folder)
    from retrieval_jax.search.dense import DENSE

    return DENSE[kind].open(folder)
