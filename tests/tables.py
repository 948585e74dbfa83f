"""Docid tables of a collection, made without the verb, and what tests read of them."""

import types
from collections.abc import Callable

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.kinds import DocidRequest, docid_kind
from retrieval_jax.docids.making import make_table
from retrieval_jax.docids.table import DocidTable


def _maker(kind: str) -> Callable[[Collection], DocidTable]:
    def make(collection: Collection) -> DocidTable:
        return make_table(docid_kind(kind), DocidRequest(collection))[0]

    return make


KINDS = {kind: _maker(kind) for kind in ("atomic", "naive", "naive_digits")}


def docids_of(table: DocidTable) -> dict[str, tuple[int, ...]]:
    """Passage id -> its tokens without the padding."""
    rows = (tuple(row[row > 0].tolist()) for row in table.tokens_NxL)
    return dict(zip(table.passage_ids.to_pylist(), rows, strict=True))


def stand_in(ids: list[str]) -> types.SimpleNamespace:
    """A collection of which there are only the ids."""
    return types.SimpleNamespace(
        ids=arrow_ids.array(ids), passage_count=len(ids), fingerprint=storage.digest(ids)
    )
