"""Copies of passages and of queries: none is ever a negative of a query that another one answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import write

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import copies
from retrieval_jax.data.collection import Collection, Passage, Query
from retrieval_jax.examples.targets import PassageTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.verbs.importing import import_collection
from retrieval_jax.verbs.index import make_index
from retrieval_jax.verbs.mine import mine

WORDS = [
    "marble harbour",
    "falcon anchor",
    "thunder saddle",
    "candle river",
    "meadow copper",
    "lantern bridge",
]
DOCS = [*((f"p{i}", f"the {words} stays here") for i, words in enumerate(WORDS))]
# Copies of the first three under other ids, one of them with other white space and one with its title apart.
DOCS += [("c0", DOCS[0][1]), ("c1", "the  falcon anchor stays here "), ("c2", DOCS[2][1])]
SOURCE = {
    "docs.tsv": "".join(f"{key}\t\t{text}\n" for key, text in DOCS),
    # h and l: one question that people and a language model judged differently; p4 is a passage itself.
    "queries.train.tsv": (
        "h0\tmarble harbour stays\nl0\tMarble  harbour Stays\n"
        "q1\tfalcon anchor stays\np4\tmeadow copper stays\n"
    ),
    "qrels.train.tsv": "h0\tp0\t1\nl0\tp3\t2\nl0\tp0\t0\nq1\tc1\t1\np4\tp5\t1\n",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("copies")
    write(folder / "docs", SOURCE)
    told = import_collection(str(folder / "docs"), str(folder / "work"), vocab_size=60, held_out=0.0)
    assert told["copies"] == 3
    return Workspace.for_source(str(folder / "docs"), str(folder / "work"))


@given(st.lists(st.sampled_from(["a b", " a  b", "a\tb\n", "c", "c ", "C", "d\u00a0e", "d e"])))
def test_a_copy_is_known_by_the_first_of_its_text(texts: list[str]):
    digests = b"".join(map(copies.digest, texts))
    found = copies.find_copies(np.frombuffer(digests, np.uint64).reshape(-1, 2))
    normal = [" ".join(text.split()) for text in texts]
    expected = [(i, normal.index(text)) for i, text in enumerate(normal) if normal.index(text) < i]
    assert list(map(tuple, found.tolist())) == expected


def test_a_query_is_a_passage_by_its_words():
    passage = Passage("x", "The title", "Some  words\nof it")
    for text in ("some words of it", "The title Some words of it", "The title. Some words of it", "words of"):
        assert copies.same_text(Query("x", text, {}), passage)
    for text in ("", " ", "other words"):
        assert not copies.same_text(Query("x", text, {}), passage)
    assert not copies.same_text(Query("x", "words", {}), Passage("x", "a title alone", ""))


def test_the_collection_knows_its_copies(work: Workspace):
    collection = Collection(work.collection)
    assert collection.first_copies(np.arange(-1, 9)).tolist() == [-1, 0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert collection.first_ids == {"c0": "p0", "c1": "p1", "c2": "p2"}
    assert [query.id for query in collection.queries("train") if query.is_passage] == ["p4"]


def test_they_are_no_negatives_in_a_batch(work: Workspace):
    """Whatever the negatives: each candidate that answers a query is a positive or is told as known."""
    collection = Collection(work.collection)
    data = TrainDataset(DataConfig(positives=1, negatives=9), work, collection, PassageTargets)
    features = data.targets.features
    examples = data.computed("labelled")
    rng = np.random.default_rng(0)
    answers = {"h0": {0, 3}, "l0": {0, 3}, "q1": {1}, "p4": {4, 5}}
    for i, query in enumerate(examples.task.queries):
        example = examples(i, rng)
        assert max(map(len, (example["other_positives"],))) <= features["other_positives"].length
        passage, grade = np.array(example["passage"]), np.array(example["grade"])
        assert {*passage[grade > 0], *example["other_positives"]} - {-1} == answers[query.id]
        assert not {*passage[grade == 0]} & answers[query.id]
    # What is read is each passage's own text.
    row = collection.find_rows(["c1"])[0]
    written = data.vocabulary.batch([collection.passage(row).full_text], 128)[0]
    np.testing.assert_array_equal(np.array(examples(2, rng)["targets"])[:128], written)


def test_they_are_not_mined(work: Workspace):
    source, folder = Collection(work.collection).folder.parent.parent / "docs", work.folder
    make_index(source=str(source), work_dir=str(folder), kind="bm25")
    mine(source=str(source), work_dir=str(folder), depth=9)
    lines = [
        line.split("\t") for line in (work.negatives("bm25") / "qrels.train.tsv").read_text().splitlines()
    ]
    found = {query: {passage for other, passage, _ in lines if other == query} for query, _, _ in lines}
    assert found.keys() == {"h0", "l0", "q1", "p4"}
    assert not found["h0"] & {"p0", "c0", "p3"}
    assert not found["l0"] & {"p0", "c0", "p3"}
    assert not found["q1"] & {"p1", "c1"}
    assert not found["p4"] & {"p4", "p5"}


def test_a_query_that_shall_find_its_own_passage_is_not_left_out(tmp_path):
    """Titles as queries, under the ids of their passages: without those every metric would be 0."""
    files = {"queries.test.tsv": "p0\tthe marble harbour\n", "qrels.test.tsv": "p0\tp0\t1\n"}
    write(tmp_path / "docs", {"docs.tsv": SOURCE["docs.tsv"]} | files)
    import_collection(str(tmp_path / "docs"), str(tmp_path / "work"), vocab_size=60)
    collection = Collection(Workspace.for_source(str(tmp_path / "docs"), str(tmp_path / "work")).collection)
    assert not any(query.is_passage for query in collection.queries("test"))


def test_a_text_asked_very_often_has_a_bounded_number_of_answers(capsys):
    queries = [Query(f"q{i}", "one  text" if i % 2 else "one text", {f"p{i}": 1}) for i in range(5000)]
    answers = copies.KnownAnswers([*queries, *(Query(f"e{i}", " ", {"x": 1}) for i in range(9))])
    assert "have over 64 positives" in " ".join(capsys.readouterr().err.split())
    others = [answers.others(query) for query in queries]
    assert max(map(len, others)) == copies.MAX_OTHERS
    assert others[3000] == [f"p{i}" for i in range(64)]
    assert answers.others(queries[3000], None) == [f"p{i}" for i in range(5000) if i != 3000]
    assert answers.others(Query("e0", "", {"x": 1})) == []
    assert answers.others(Query("p7", "a passage", {"x": 1}, is_passage=True)) == ["p7"]
