"""Released predictions: both forms are read by shard, and what is wrong with them is one line."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from reading import error_of, write

from retrieval_jax.data.collection import Collection
from retrieval_jax.data.predictions import open_predictions
from retrieval_jax.data.synthetic import QueryShards


def read(folder: Path, collection: Collection, numbers: Sequence[int] | None = None) -> list[list[str]]:
    """The queries of each passage of some shards of 16 passages (None: of all)."""
    shards = QueryShards(folder / "unfinished", collection.passage_count, 16)
    source = open_predictions(folder)
    source.prepare(collection, shards)
    numbers = range(shards.count) if numbers is None else numbers
    made = source.queries(collection, shards, numbers, lambda *_, **__: None)
    return [queries for shard in made for queries in shard]


def test_samples_are_read_side_by_side_from_any_shard(collection: Collection, tmp_path: Path):
    """A sample may be cut into pieces and compressed, and a line may hold several queries."""
    count = collection.passage_count
    whole = "".join(f"first {row}\tagain {row}\n" for row in range(count))
    other = [f"second {row}\n" if row % 5 else "\n" for row in range(count)]
    pieces = {"b.txt000-1": "".join(other[:30]), "b.txt001-1.gz": "".join(other[30:])}
    folder = write(tmp_path, {"a.txt": whole, **pieces})
    expected = [[f"first {row}", f"again {row}", f"second {row}" if row % 5 else ""] for row in range(count)]
    assert read(folder, collection) == expected
    assert read(folder, collection, [1, 3]) == expected[16:32] + expected[48:64]


def test_objects_are_read_in_any_order(collection: Collection, tmp_path: Path):
    order = np.random.default_rng(0).permutation(collection.passage_count - 1).tolist()  # one has none
    lines = [
        json.dumps({"id": collection.passage(row).id, "predicted_queries": [f"of {row}", "x"]}) + "\n"
        for row in order
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines[:30]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:]).encode()))
    expected = [[f"of {row}", "x"] for row in range(collection.passage_count - 1)] + [[]]
    assert read(tmp_path, collection) == expected
    assert read(tmp_path, collection, [2]) == expected[32:48]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no .txt or .jsonl file"]),
        ({"a.txt": b"q\n" * 99}, ["a.txt:99", "before the passages do", "100 passages"]),
        ({"a.txt": b"q\n" * 102}, ["a.txt:101", "more lines"]),
        ({"a.txt000-1": b"q\n" * 60, "a.txt001-1": b"q\n" * 39}, ["a.txt001-1:39", "before the passages do"]),
        ({"a.txt": b"q\n" * 100, "b.txt": b"q\n" * 42}, ["b.txt:42"]),
        ({"a.txt": b"\xff\n" * 100}, ["a.txt:1", "UTF-8"]),
        ({"a.txt.gz": b"q\n"}, ["a.txt.gz:1", "unreadable"]),
        ({"a.txt": b"", "a.jsonl": b""}, [".txt and .jsonl"]),
        ({"a.jsonl": b'{"id": "nobody", "predicted_queries": []}\n'}, ["a.jsonl:1", "no passage 'nobody'"]),
        ({"a.jsonl": b'{"id": "x"}\n'}, ["a.jsonl:1", "'predicted_queries' is missing"]),
        ({"a.jsonl": b'{"id": "x", "predicted_queries": [1]}\n'}, ["a.jsonl:1", "list of strings"]),
        ({"a.jsonl": b'{"id": "x", "predicted_queries": ["\\ud800"]}\n'}, ["a.jsonl:1", "surrogate"]),
        ({"a.jsonl": b"[]\n"}, ["a.jsonl:1", "JSON"]),
        ({"a.jsonl": b"{\n"}, ["a.jsonl:1", "JSON"]),
    ],
)
def test_what_is_wrong_is_told_with_its_place(collection: Collection, tmp_path: Path, files, words):
    assert collection.passage_count == 100
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    message = error_of(lambda: read(tmp_path, collection))
    assert message.startswith(str(tmp_path))
    for word in words:
        assert word in message
