import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax import arrow_ids, storage
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError

# What a collection allows as an id: any text without whitespace.
IDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.split() == [text])


def table_of(tokens, ids, kind="naive"):
    return DocidTable(
        kind, np.array(tokens, np.int32), arrow_ids.array(ids), output_size=128, collection="0123456789abcdef"
    )


def write(folder, table):
    storage.build(folder, {"kind": table.kind, "collection": table.collection}, table.write)


@pytest.fixture
def folder(tmp_path):
    """A table of two passages and more on disk."""
    write(tmp_path / "naive", table_of([[3, 4, 1], [5, 1, 0], [3, 4, 1]], ["a", "b", "c"]))
    return tmp_path / "naive"


@given(
    st.lists(IDS, min_size=1, max_size=8, unique=True),
    st.integers(1, 4),
    st.sampled_from(["atomic", "naive"]),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_a_table_comes_back_as_it_was_written(ids, length, kind, seed):
    tokens = np.random.default_rng(seed).integers(1, 128, (len(ids), length))
    table = table_of(tokens, ids, kind)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / kind, table)
        opened = DocidTable.open(Path(folder) / kind)
        manifest = storage.read_manifest(Path(folder) / kind, "docids")
    assert opened.tokens_NxL.dtype == np.int32
    assert np.array_equal(opened.tokens_NxL, tokens)
    assert opened.passage_ids.to_pylist() == ids
    assert (opened.kind, opened.output_size, opened.collection) == (kind, 128, table.collection)
    assert opened.length == manifest["length"] == length
    assert (manifest["passages"], manifest["distinct"]) == (len(ids), len(set(map(tuple, tokens.tolist()))))
    assert opened.fingerprint() == manifest["fingerprint"] == table.fingerprint()


def test_fingerprints_tell_tables_apart():
    tables = [
        table_of([[3, 1]], ["a"]),
        table_of([[4, 1]], ["a"]),
        table_of([[3, 1]], ["b"]),
        table_of([[3, 1]], ["a"], kind="atomic"),
        table_of([[3, 1], [3, 1]], ["a", "b"]),
        table_of([[3, 1], [3, 1]], ["b", "a"]),
    ]
    assert len({table.fingerprint() for table in tables}) == len(tables)


def refuses(folder, what):
    """Opening fails: the message names the folder, says what is wrong and how to mend it."""
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}.*{what}.*`retrieval-jax docids`"):
        DocidTable.open(folder)


def test_changed_tokens_are_refused(folder):
    tokens = np.load(folder / "tokens.npy")
    tokens[1, 0] += 1
    np.save(folder / "tokens.npy", tokens)
    refuses(folder, "changed.*delete the folder")


@pytest.mark.parametrize("ids", [["a", "b"], ["a", "b", "d"], ["a", "c", "b"], ["a", "b", "c", "d"]])
def test_changed_passage_ids_are_refused(folder, ids):
    arrow_ids.write(folder / "ids.arrow", ids)
    refuses(folder, "changed.*delete the folder")


@pytest.mark.parametrize("kept", [0, 3, 20, -20, -1])
@pytest.mark.parametrize("name", ["tokens.npy", "ids.arrow"])
def test_truncated_files_are_refused(folder, name, kept):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:kept])
    refuses(folder, "cannot be read.*delete the folder")


@pytest.mark.parametrize("name", ["tokens.npy", "ids.arrow"])
def test_missing_files_are_refused(folder, name):
    (folder / name).unlink()
    refuses(folder, "cannot be read.*delete the folder")


def test_missing_and_unfinished_folders_are_refused(folder):
    refuses(folder.parent / "atomic", "nothing finished")
    (folder / storage.MANIFEST).unlink()
    refuses(folder, "nothing finished")
