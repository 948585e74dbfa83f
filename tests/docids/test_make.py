"""Docids of a collection: what each kind writes for a passage."""

from pathlib import Path

import numpy as np
import pytest

from retrieval_jax import arrow_ids
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.docids.make import KINDS, make_docids
from retrieval_jax.docids.table import DocidTable


def test_atomic_docids_are_rows(collection: Collection):
    table = KINDS["atomic"](collection)
    assert table.tokens_NxL.tolist() == [[row + 1] for row in range(collection.passage_count)]
    assert table.output_size == 128
    assert table.passage_ids.equals(collection.ids)


def test_naive_docids_are_the_ids_in_the_vocabulary(collection: Collection, monkeypatch: pytest.MonkeyPatch):
    vocabulary = Vocabulary(collection.vocabulary_path)
    expected = [[*vocabulary.encode(key), EOS] for key in collection.ids.to_pylist()]
    batches = arrow_ids.batches
    for size in (1 << 16, 7):  # the batch does not matter
        monkeypatch.setattr(arrow_ids, "batches", lambda ids, size=size: batches(ids, size))
        table = KINDS["naive"](collection)
        assert table.tokens_NxL.dtype == np.int32
        assert [row[row > 0].tolist() for row in table.tokens_NxL] == expected
        assert table.length == max(map(len, expected))
        assert table.passage_ids.equals(collection.ids)


def test_a_table_on_disk_is_the_one_that_was_made(collection: Collection, tmp_path: Path, source: Path):
    made = make_docids(str(source), str(collection.folder.parent), "naive")
    table = DocidTable.open(made["docids"])
    assert made == {
        "docids": made["docids"],
        "kind": "naive",
        "passages": collection.passage_count,
        "length": table.length,
    }
    assert table.collection == collection.fingerprint
    assert np.array_equal(table.tokens_NxL, KINDS["naive"](collection).tokens_NxL)
