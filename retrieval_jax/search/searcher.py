"""The fifth noun: the searcher. All that evaluation, reports and servers know of a retriever."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from retrieval_jax import storage
from retrieval_jax.data.records import Collection
from retrieval_jax.errors import UserError

Ranking = list[tuple[str, float]]
"""(passage id, score), best first, each passage once."""


class Searcher(Protocol):
    """Finds passages. Four kinds: generative, exact and ScaNN (dense), BM25."""

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The best k passages of each query (fewer where there are fewer). Any number of queries."""
        ...


def searcher_manifest(folder: Path, collection: Collection) -> dict:
    """What `retrieval-jax index` wrote there. Raises UserError for a searcher of another collection."""
    manifest = storage.read_manifest(folder, "index")
    if manifest["recipe"]["collection"] != collection.fingerprint:
        raise UserError(
            f"{folder}: made of another collection than {collection.folder}: `retrieval-jax index`"
        )
    return manifest


def open_searcher(folder: str | Path) -> Searcher:
    """Opens what `retrieval-jax index` made, without TensorFlow."""
    folder = Path(folder)
    kind = storage.read_manifest(folder, "index")["kind"]
    if kind == "bm25":
        from retrieval_jax.search.bm25 import BM25Searcher

        return BM25Searcher.open(folder)
    if kind == "generative":
        from retrieval_jax.search.generative import GenerativeSearcher

        return GenerativeSearcher.open(folder)
    from retrieval_jax.search.dense import DENSE

    return DENSE[kind].open(folder)
