"""A collection on disk: what is written comes back, in order, from one file of records or several.

Also what models read of a passage, and which judgements of a query count.
"""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection, Passage, Query, write_passages, write_queries

PASSAGES = [Passage(f"p{i}", f"title {i}" * (i % 2), f"text {i} über") for i in range(3000)]
QUERIES = [
    Query("q1", "who?", {"p1": 2, "p3": 1}, ("p4", "p5"), "llm"),
    Query("q2", "", {"p2": 1}),
    Query("q3", "what?", {"p1": 1}, label="human"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of four files of passages, one of them empty, as `import` lays it out."""
    folder = tmp_path_factory.mktemp("records")
    cuts = [0, 10, 10, 1500, 3000]
    shards = [functools.partial(iter, PASSAGES[a:b]) for a, b in itertools.pairwise(cuts)]
    write_passages(folder, "small", shards)
    write_queries(folder, "small", {"train": QUERIES, "dev": QUERIES[:1]})
    arrow_ids.write(folder / "ids.arrow", [p.id for p in PASSAGES])
    manifest = {"name": "small", "passages": 3000, "queries": {"train": 3, "dev": 1}, "fingerprint": "f"}
    manifest["query_fingerprints"] = {"train": "t", "dev": "d"}
    storage.write_manifest(folder, manifest)
    return folder


@pytest.fixture
def collection(folder: Path) -> Collection:
    return Collection(folder)


def test_passages_come_back_by_row(collection: Collection):
    assert list(collection.passages()) == PASSAGES
    assert list(collection.passages(range(1, 3))) == PASSAGES[1:3]
    assert list(collection.passages(range(0))) == []
    assert collection.passage(1499) == PASSAGES[1499]
    rows = [2999, 0, 9, 10, 9, *range(1490, 1510)]
    assert collection.get(rows) == [PASSAGES[row] for row in rows]
    assert collection.get(np.array(rows)) == [PASSAGES[row] for row in rows]
    assert collection.get([]) == []


def test_queries_come_back_with_negatives_and_label(collection: Collection):
    assert collection.queries("train") == QUERIES
    assert collection.queries("dev") == QUERIES[:1]
    with pytest.raises(UserError, match="no queries of split 'exam': choose one of train, dev"):
        collection.queries("exam")


def test_a_recipe_names_the_queries_that_are_read(collection: Collection, folder: Path, tmp_path: Path):
    assert collection.recipe() == collection.recipe("exam") == {"collection": "f"}
    assert collection.recipe("dev", "exam") == {"collection": "f", "queries": {"dev": "d"}}
    manifest = storage.read_json(folder / "manifest.json", "")
    del manifest["query_fingerprints"]
    storage.write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"made by an earlier version .*: `retrieval-jax import`"):
        Collection(tmp_path)


def test_ids_are_looked_up(collection: Collection, folder: Path):
    assert collection.ids.to_pylist() == [p.id for p in PASSAGES]
    assert collection.find_rows(["p7", "p", "p0", "p7"]).tolist() == [7, -1, 0, 7]
    assert collection.find_rows([]).tolist() == []
    assert collection.find_rows(collection.ids).tolist() == list(range(3000))


def test_missing_ids_are_named(folder: Path, tmp_path: Path):
    (tmp_path / "manifest.json").write_text((folder / "manifest.json").read_text())
    with pytest.raises(UserError, match=r"ids\.arrow: cannot be read .*retrieval-jax import"):
        _ = Collection(tmp_path).ids


def test_any_tfds_program_reads_the_records(folder: Path):
    import tensorflow_datasets as tfds

    source = tfds.data_source("small/passages", split="train", data_dir=str(folder))
    assert len(source) == 3000
    assert source[1500] == {
        "id": b"p1500",
        "title": b"",
        "text": "text 1500 über".encode(),
    }
    builder = tfds.builder_from_directory(folder / "small" / "queries" / "1.0.0")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 3, "dev": 1}
    names = sorted(path.name for path in (folder / "small" / "passages" / "1.0.0").glob("*record*"))
    assert names == [f"small-train.array_record-{i:05}-of-00004" for i in range(4)]


def test_the_title_comes_before_the_text():
    assert Passage("a", "Title", "text").full_text == "Title. text"
    assert Passage("a", "", "text").full_text == "text"


def test_passages_that_an_import_left_out_still_count():
    query = Query("q", "text", {"a": 2}, ("n", "m"), missing={"z": 1})
    assert query.relevant == {"a": 2, "z": 1}
    assert query.judgements == {"a": 2, "z": 1, "n": 0, "m": 0}
    assert Query("q", "text", {}).judgements == {}
