"""The verb `docids`: gives every passage of a collection its token sequence."""

from collections.abc import Callable

import gin
import numpy as np

from retrieval_jax import arrow_ids, storage
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary, round_up
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError
from retrieval_jax.progress import bar
from retrieval_jax.work import Work


def atomic(collection: Collection) -> DocidTable:
    """One token a passage: row + 1, since 0 is padding. The softmax is padded to a multiple of 128."""
    count = collection.passage_count
    tokens_Nx1 = np.arange(1, count + 1, dtype=np.int32)[:, None]
    return DocidTable("atomic", tokens_Nx1, collection.ids, round_up(count + 1, 128), collection.fingerprint)


def naive(collection: Collection) -> DocidTable:
    """The passage's id string through the text vocabulary, then end of sequence.

    Ids that the vocabulary writes alike (by case folding, say) share a docid; so may two passages.
    """
    vocabulary = Vocabulary(collection.vocabulary_path)
    parts = []
    with bar("naive docids", collection.passage_count) as advance:
        for some in arrow_ids.batches(collection.ids):
            docids = vocabulary.model.encode(some, add_eos=True)
            longest = max(map(len, docids))
            parts.append(np.array([d + [0] * (longest - len(d)) for d in docids], np.int32))
            advance(len(some))
    tokens_NxL = np.zeros((collection.passage_count, max(part.shape[1] for part in parts)), np.int32)
    first = 0
    for part in parts:
        tokens_NxL[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return DocidTable("naive", tokens_NxL, collection.ids, vocabulary.size, collection.fingerprint)


KINDS: dict[str, Callable[[Collection], DocidTable]] = {"atomic": atomic, "naive": naive}


@gin.configurable
def make_docids(source: str, work_dir: str | None = None, kind: str = "naive") -> dict:
    """Makes the docid table of a collection that was imported. `kind` is one of KINDS."""
    if kind not in KINDS:
        raise UserError(f"DOCIDS: no kind {kind!r}: choose one of {', '.join(KINDS)}")
    work = Work.of(source, work_dir)
    collection = Collection(work.collection)
    recipe = {"kind": kind, "collection": collection.fingerprint}
    manifest = storage.build(work.docids(kind), recipe, lambda folder: KINDS[kind](collection).write(folder))
    return {
        "docids": str(work.docids(kind)),
        **{key: manifest[key] for key in ("kind", "passages", "length")},
    }
