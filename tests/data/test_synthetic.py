"""Generated queries on disk: shards join into records, one a passage, in the collection's order."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data import synthetic
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.synthetic import QueryShards, SyntheticQueries


def queries_of(row: int) -> list[str]:
    """None for every fourth passage, else one to three, of texts that are hard to store."""
    return [f"é “{row}”\u2028{i}" for i in range(row % 4)]


@pytest.fixture(scope="module")
def made(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    shards = QueryShards(folder / "q.unfinished", collection.passage_count, 7)
    for number in range(shards.count):
        shards.write(
            number, ({"queries": queries_of(row), "made": 4, "distinct": 3} for row in shards.rows(number))
        )
    recipe = {"collection": collection.fingerprint}
    storage.build_once(folder / "q", recipe, lambda tmp: synthetic.join(tmp, collection, shards))
    return folder / "q"


def test_queries_come_back_by_row(made: Path, collection: Collection):
    queries = SyntheticQueries(made)
    rows = [5, 0, collection.passage_count - 1, 5]
    assert queries.get(rows) == [queries_of(row) for row in rows]
    assert queries.queries(2) == queries_of(2)
    expected = [len(queries_of(row)) for row in range(collection.passage_count)]
    assert queries.counts.dtype == np.int32
    assert queries.counts.tolist() == expected
    assert queries.total == sum(expected)
    manifest = json.loads((made / "manifest.json").read_text())
    assert (manifest["made"], manifest["distinct"]) == (4 * len(expected), 3 * len(expected))


def test_passages_are_expanded_by_their_queries(made: Path, collection: Collection):
    queries = SyntheticQueries(made)
    expected = [" ".join([p.text, *queries_of(row)]) for row, p in enumerate(collection.passages())]
    assert [p.text for p in queries.expanded(collection)] == expected
    assert [p.text for p in queries.expanded(collection, range(3, 8))] == expected[3:8]


def test_any_tfds_program_reads_them(made: Path, collection: Collection):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(made / collection.name / "synthetic" / "1.0.0")
    assert builder.info.splits["train"].num_examples == collection.passage_count
    records = builder.as_data_source("train")
    assert [q.decode() for q in records[3]["queries"]] == queries_of(3)
    assert list(records[4]["queries"]) == []


def test_several_shards_keep_the_order(collection: Collection, tmp_path: Path, monkeypatch, made: Path):
    monkeypatch.setattr(synthetic, "SHARD", 40)
    shards = QueryShards(made.with_name("q.unfinished"), collection.passage_count, 7)
    (tmp_path / "s").mkdir()
    facts = synthetic.join(tmp_path / "s", collection, shards)
    storage.write_manifest(tmp_path / "s", {"recipe": {"collection": "c"}, **facts})
    queries = SyntheticQueries(tmp_path / "s")
    assert len(list((tmp_path / "s" / collection.name / "synthetic" / "1.0.0").glob("*array_record*"))) > 1
    rows = range(collection.passage_count)
    assert queries.get(rows) == [queries_of(row) for row in rows]
    assert queries.fingerprint == SyntheticQueries(made).fingerprint


def test_another_collection_is_refused(made: Path, collection: Collection, tmp_path: Path):
    queries = SyntheticQueries(made)
    queries.check(collection)
    queries.collection = "another"
    with pytest.raises(UserError, match="of another collection"):
        queries.check(collection)
    with pytest.raises(UserError, match="retrieval-jax generate-queries"):
        SyntheticQueries(tmp_path / "nothing")


def test_reading_does_not_import_tensorflow(made: Path):
    script = (
        "import sys; from retrieval_jax.data.synthetic import SyntheticQueries; "
        f"assert SyntheticQueries({str(made)!r}).queries(1); assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
