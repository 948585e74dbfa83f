"""Importing: records, splits and vocabulary, read back."""

from pathlib import Path

import pytest

from retrieval_jax.data.collection import Query
from retrieval_jax.data.importing import import_collection, with_dev
from retrieval_jax.data.records import Collection
from retrieval_jax.data.sources import open_source
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.errors import UserError


def test_records_give_back_the_source(source: Path, collection: Collection):
    opened = open_source(source)
    passages = list(opened.passages())
    assert list(collection.passages()) == passages
    assert collection.passage(7) == passages[7]
    queries = opened.queries({p.id for p in passages})
    assert collection.query_counts == {split: len(judged) for split, judged in queries.items()}
    for split, judged in queries.items():
        assert collection.queries(split) == judged
    with pytest.raises(UserError, match="no queries of split 'exam': choose one of dev, test, train"):
        collection.queries("exam")


def test_records_are_ordinary_tfds_datasets(collection: Collection):
    import tensorflow_datasets as tfds

    name = f"{collection.name}/passages"
    source = tfds.data_source(name, split="train", data_dir=str(collection.folder))
    assert len(source) == collection.passage_count
    assert source[3]["id"].decode() == collection.passage(3).id


def test_dev_is_held_out_of_train_by_a_hash():
    train = [Query(str(i), "text", {"p": 1}) for i in range(2000)]
    test = [Query("t", "text", {"p": 1})]
    split = with_dev({"train": train, "test": test}, 0.05)
    assert sorted([*split["train"], *split["dev"]], key=lambda q: int(q.id)) == train
    assert 60 < len(split["dev"]) < 140
    assert split["test"] == test
    assert with_dev({"test": test}, 0.05) == {"test": test}
    given = {"train": train, "dev": test}
    assert with_dev(given, 0.05) == given
    # A query's place does not depend on the others.
    fewer = with_dev({"train": train[::2]}, 0.05)
    assert [q for q in split["dev"] if int(q.id) % 2 == 0] == fewer["dev"]


def test_vocabulary_has_t5s_special_ids_and_pads(collection: Collection):
    vocabulary = Vocabulary(collection.vocabulary_path)
    assert vocabulary.size % 128 == 0
    long, short = "optimizer " * 50, "Gradient Clipping"
    tokens = vocabulary.batch([long, short, ""], 8)
    assert tokens.shape == (3, 8)
    assert tokens[0, -1] == EOS
    ids = vocabulary.encode(short)
    assert tokens[1].tolist() == [*ids, EOS] + [0] * (7 - len(ids))
    assert tokens[2].tolist() == [EOS] + [0] * 7
    assert vocabulary.encode("GRADIENT clipping") == ids  # case is folded


def test_t5s_own_vocabulary_can_be_given(source: Path, shared: Path, tmp_path: Path):
    model = shared / "data" / "t5vocab" / "t5_spiece_no_bos.model"
    import_collection(str(source), str(tmp_path / "work"), vocabulary_path=str(model))
    vocabulary = Vocabulary(Collection(tmp_path / "work" / "collection").vocabulary_path)
    assert vocabulary.size == 32128
    text = "translate English to German: That is good."
    assert vocabulary.batch([text], 10)[0].tolist() == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1]


def test_a_broken_vocabulary_is_named(tmp_path: Path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.model: not a SentencePiece model"):
        Vocabulary(tmp_path / "bad.model")
