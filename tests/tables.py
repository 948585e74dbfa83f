"""Docid tables of a collection, made without the verb: the kinds that need no vectors."""

from collections.abc import Callable

from retrieval_jax.data.records import Collection
from retrieval_jax.docids.kinds import BY_ID, Job
from retrieval_jax.docids.table import DocidTable


def _maker(kind: str) -> Callable[[Collection], DocidTable]:
    def make(collection: Collection) -> DocidTable:
        job = Job(collection)
        return job.table(kind, BY_ID[kind](job))

    return make


KINDS = {kind: _maker(kind) for kind in BY_ID}
