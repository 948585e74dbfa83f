"""Docids that need no vectors: what each kind writes for a passage."""

import types
from pathlib import Path

import numpy as np
import pytest
from tables import KINDS, docids_of, stand_in

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary, learn
from retrieval_jax.docids.kinds import DocidRequest, docid_kind


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


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (["7", "1048", "007"], ["7", "1048", "007"]),
        (["7", "b", "9"], ["0", "1", "2"]),
        (["7", "٣", "9"], ["0", "1", "2"]),  # a digit, but not one of the ten
        ([f"p{row}" for row in range(12)], [str(row) for row in range(12)]),
    ],
)
def test_naive_digits_are_ids_or_rows(ids: list[str], numbers: list[str]):
    table = KINDS["naive_digits"](stand_in(ids))
    expected = [(*(2 + int(digit) for digit in number), EOS) for number in numbers]
    assert list(docids_of(table).values()) == expected
    assert table.tokens_NxL.dtype == np.uint8
    assert table.output_size == 128


def request_of(ids: list[str], path: Path) -> DocidRequest:
    """What `naive` needs of a collection, with a vocabulary that was learned on other ids."""
    learn(["alpha beta gamma delta", "abcdefghijklmnopqrstuvwxyz 0123456789"], 60, path)
    collection = types.SimpleNamespace(
        ids=arrow_ids.array(ids), vocabulary_path=path, passage_count=len(ids), fingerprint=""
    )
    return DocidRequest(collection)


def test_ids_that_are_alike_for_lack_of_a_character_are_an_error(tmp_path):
    path = tmp_path / "pieces.model"
    with pytest.raises(UserError) as caught:
        docid_kind("naive").build(request_of(["a{1", "a}1", "a~1", "b{1", "c1", "d2"], path))
    assert "cannot write 4 of the ids, and 3 passages would share a docid" in str(caught.value)
    assert "as 'a{1' and 'a}1'" in str(caught.value)
    tokens = (
        docid_kind("naive").build(request_of(["a{1", "b{1", "c1", "C1"], path)).tokens_NxL
    )  # unknown, but told apart
    assert len(np.unique(tokens, axis=0)) == 3  # and C1 is c1 where case is folded


def test_one_long_id_is_told_of(tmp_path, capsys):
    docid_kind("naive").build(request_of(["a1", "b2", "c3", "z" * 1500], tmp_path / "pieces.model"))
    said = capsys.readouterr().err
    assert "docids/naive: the docid of passage 'zzzz" in said
    assert "are usual: all targets are padded to that" in said
    docid_kind("naive").build(request_of(["a1", "b2", "c3"], tmp_path / "pieces.model"))
    assert "usual" not in capsys.readouterr().err
