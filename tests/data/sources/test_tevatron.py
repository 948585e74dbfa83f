"""Tevatron's JSONL, with and without a corpus."""

import json

import pytest
from reading import error_of, places, read, write

from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources.lines import ErrorLog

A, B, C = ({"docid": key, "title": key.upper(), "text": f"text of {key}"} for key in "abc")
LINE = {
    "query_id": "1",
    "query": "who?",
    "positive_passages": [A | {"grade": 3}, B],
    "negative_passages": [C],
}
OTHER = {"query_id": "2", "query": "what?", "positive_passages": [C], "negative_passages": [A, B]}
OTHER |= {"answers": ["not read"]}
PASSAGES = [Passage(key, key.upper(), f"text of {key}") for key in "abc"]


def jsonl(*records: dict) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def test_the_passages_are_those_of_the_lines(tmp_path):
    files = {"train.jsonl.gz": jsonl(LINE, OTHER), "dev.llm.jsonl": jsonl(OTHER | {"negative_passages": []})}
    files["._train.jsonl"] = "\x00"  # as macOS writes beside it
    passages, queries = read(write(tmp_path, files))
    assert sorted(passages, key=lambda p: p.id) == PASSAGES
    assert queries == {
        "train": [Query("1", "who?", {"a": 3, "b": 1}, ("c",)), Query("2", "what?", {"c": 1}, ("a", "b"))],
        "dev": [Query("2", "what?", {"c": 1}, (), "llm")],
    }


def test_with_a_corpus_the_ids_are_enough(tmp_path):
    line = LINE | {"positive_passages": [{"docid": "a"}], "negative_passages": [{"docid": "b"}]}
    files = {"corpus.jsonl": jsonl(A, B, C), "train.jsonl": jsonl(line)}
    passages, queries = read(write(tmp_path, files))
    assert passages == PASSAGES
    assert queries == {"train": [Query("1", "who?", {"a": 1}, ("b",))]}


def test_labels_come_from_the_file_or_the_line(tmp_path):
    files = {
        "train.human.jsonl": jsonl(LINE),
        "train.llm.jsonl": jsonl(OTHER, OTHER | {"query_id": "3", "label": "human"}),
    }
    _, queries = read(write(tmp_path, files))
    assert [(query.id, query.label) for query in queries["train"]] == [
        ("1", "human"),
        ("2", "llm"),
        ("3", "human"),
    ]


@pytest.mark.parametrize(
    ("line", "kind", "what"),
    [
        ("{", "bad JSON", "the JSON is wrong"),
        (LINE | {"query_id": 7}, "bad JSON", "'query_id' is not a string"),
        (LINE | {"query_id": "a b"}, "bad id", "'a b' is empty or has whitespace"),
        (LINE, "duplicate id", "query_id '1' was used on an earlier line"),
        (OTHER | {"positive_passages": {}}, "bad JSON", "'positive_passages' is not a list"),
        (OTHER | {"positive_passages": [C | {"grade": 0.5}]}, "bad grade", "grade '0.5' of a positive"),
        (OTHER | {"positive_passages": [A]}, "another grade", "passage 'a' is positive and negative"),
        (OTHER | {"positive_passages": [{"docid": "d"}]}, "bad JSON", "'text' is missing"),
        (OTHER | {"positive_passages": [{"docid": "d", "text": " "}]}, "empty passage", "neither title"),
        (OTHER | {"positive_passages": [C | {"text": "changed"}]}, "another text", "has another text ("),
        (OTHER | {"label": "dog"}, "bad JSON", "label 'dog' is none of human, llm"),
    ],
)
def test_bad_lines(tmp_path, line, kind, what):
    bad = line if isinstance(line, str) else json.dumps(line)
    folder = write(tmp_path, {"train.jsonl": f"{jsonl(LINE)}{bad}\n"})
    message = error_of(lambda: read(folder))
    assert message.startswith(f"{folder / 'train.jsonl'}:2: ")
    assert what in message
    errors = ErrorLog(skip=True)
    passages, queries = read(folder, errors)
    assert sorted(passages, key=lambda p: p.id) == PASSAGES
    assert queries["train"][0] == Query("1", "who?", {"a": 3, "b": 1}, ("c",))
    assert places(errors, folder) == {kind: ["train.jsonl:2"]}


def test_unknown_passages_of_a_corpus_are_named(tmp_path):
    files = {"corpus.jsonl": jsonl(A, B), "train.jsonl": jsonl(LINE)}
    assert error_of(lambda: read(write(tmp_path, files))).startswith(
        f"{tmp_path / 'train.jsonl'}:1: passage 'c' is unknown: add it to corpus.jsonl"
    )
