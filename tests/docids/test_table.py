import dataclasses
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids import table as table_module
from retrieval_jax.docids.table import DocidTable

# What a collection allows as an id: any text without whitespace.
IDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.split() == [text])


def table_of(tokens, ids, kind="naive", output_size=128, dtype=np.int32, ancestors=()):
    tokens, ids = np.array(tokens, dtype), arrow_ids.array(ids)
    vocabulary = "fedcba9876543210" if kind == "naive" else None
    search = "softmax" if kind == "atomic" else "trie"
    return DocidTable(kind, tokens, ids, output_size, "0123456789abcdef", ancestors, vocabulary, search)


def write(folder, table):
    storage.build_once(folder, {"kind": table.kind, "collection": table.collection}, table.write)


@pytest.fixture
def folder(tmp_path):
    """A table of two passages and more on disk."""
    write(tmp_path / "naive", table_of([[3, 4, 1], [5, 1, 0], [3, 4, 1]], ["a", "b", "c"]))
    return tmp_path / "naive"


@given(
    st.lists(IDS, min_size=1, max_size=8, unique=True),
    st.integers(1, 4),
    st.sampled_from(["atomic", "naive", "rq_8x256"]),
    st.sampled_from(
        [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32)]
    ),
    st.lists(st.text("0123456789abcdef", min_size=16, max_size=16), max_size=2),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_a_table_comes_back_as_it_was_written(ids, length, kind, output, ancestors, seed):
    output_size, dtype = output
    tokens = np.random.default_rng(seed).integers(1, output_size, (len(ids), length))
    tokens[0] = output_size - 1
    table = table_of(tokens, ids, kind, output_size, ancestors=tuple(ancestors))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / kind, table)
        opened = DocidTable.open(Path(folder) / kind)
        manifest = storage.read_manifest(Path(folder) / kind, "docids")
    assert opened.tokens_NxL.dtype == dtype
    assert np.array_equal(opened.tokens_NxL, tokens)
    assert opened.passage_ids.to_pylist() == ids
    assert (opened.kind, opened.output_size, opened.collection) == (kind, output_size, table.collection)
    assert opened.ancestors == table.ancestors
    assert opened.length == manifest["length"] == length
    distinct = len(set(map(tuple, tokens.tolist())))
    assert (manifest["passages"], manifest["distinct"]) == (len(ids), distinct)
    assert table.count_distinct() == distinct
    assert opened.fingerprint() == manifest["fingerprint"] == table.fingerprint()


def test_only_naive_docids_are_text():
    owns = {
        kind: table_of([[1]], ["a"], kind).has_docid_vocab for kind in ("naive", "atomic", "naive_digits")
    }
    assert owns == {"naive": False, "atomic": True, "naive_digits": True}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, ">i4"])
def test_the_fingerprint_does_not_depend_on_the_dtype(dtype):
    rows = [[3, 4, 1], [127, 1, 0]]
    expected = table_of(rows, ["a", "b"]).fingerprint()
    assert table_of(rows, ["a", "b"], dtype=dtype).fingerprint() == expected
    columns_first = table_of(np.asfortranarray(rows), ["a", "b"], dtype=dtype)
    assert columns_first.fingerprint() == expected


def test_fingerprints_tell_tables_apart():
    tables = [
        table_of([[3, 1]], ["a"]),
        table_of([[4, 1]], ["a"]),
        table_of([[3, 1]], ["b"]),
        table_of([[3, 1]], ["a"], kind="atomic"),
        table_of([[3, 1], [3, 1]], ["a", "b"]),
        table_of([[3, 1], [3, 1]], ["b", "a"]),
        table_of([[3, 1, 0]], ["a"]),
        table_of([[259, 1]], ["a"]),
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


@pytest.mark.parametrize("version", [None, 2, 4])
def test_another_version_is_refused(folder, version):
    manifest = storage.read_manifest(folder, "docids")
    assert manifest.pop("version") == 3
    storage.write_manifest(folder, manifest | ({"version": version} if version else {}))
    refuses(folder, "another version.*make it again: delete the folder")


BROKEN = {
    "no token: number tokens from 1": [0, 0, 0],
    "a 0 before its end: number tokens from 1": [5, 0, 1],
    "a token outside 1 to 127: set a larger output_size": [5, 128, 1],
    "a token outside 1 to 127": [5, -1, 1],
}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("what", "docid"), BROKEN.items())
def test_broken_docids_are_refused(tmp_path, what, docid, dtype):
    table = table_of([[5, 127, 1], [6, 1, 0], docid, docid], ["a", "b", "c d", "e"], "semantic", dtype=dtype)
    message = re.escape(f"docids/semantic: {docid}, docid of passage 'c d', has {what}")
    with pytest.raises(UserError, match=message):
        table.check()
    with pytest.raises(UserError, match=message):
        write(tmp_path / "semantic", table)
    assert not (tmp_path / "semantic").exists()


def test_broken_docids_are_refused_in_any_block(monkeypatch):
    blocks = table_module.blocks
    monkeypatch.setattr(table_module, "blocks", lambda rows: blocks(rows, 3))
    for row in range(8):
        tokens = np.full((8, 2), 7)
        tokens[row] = [0, 7]
        with pytest.raises(UserError, match=f"passage '{row}', has a 0 before its end"):
            table_of(tokens, map(str, range(8))).check()


def test_broken_docids_on_disk_are_refused(folder):
    manifest = storage.read_manifest(folder, "docids")
    storage.write_manifest(folder, manifest | {"output_size": 4})
    with pytest.raises(
        UserError, match=re.escape("docids/naive: [3, 4, 1], docid of passage 'a', has a token")
    ):
        DocidTable.open(folder)


def test_a_prefix_of_another_docid_is_refused(tmp_path):
    tokens = [[9, 1, 0, 0], [3, 4, 5, 6], [3, 4, 0, 0], [2, 3, 4, 0]]
    with pytest.raises(UserError) as error:
        write(tmp_path / "semantic", table_of(tokens, ["a", "b", "c", "d"], "semantic"))
    assert str(error.value) == (
        "docids/semantic: [3, 4], docid of passage 'c', is a prefix of [3, 4, 5, 6], "
        "docid of passage 'b': end all with a token used for that alone"
    )


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8))
@settings(deadline=None)
def test_prefixes_are_refused_wherever_there_are_any(docids):
    tokens = np.array([[*docid, *[0] * (4 - len(docid))] for docid in docids])
    table = table_of(tokens, map(str, range(len(docids))), "semantic")
    pairs = {
        (i, j)
        for i, a in enumerate(docids)
        for j, b in enumerate(docids)
        if len(a) < len(b) and b[: len(a)] == a
    }
    with tempfile.TemporaryDirectory() as folder:
        if not pairs:
            assert table.write(Path(folder))["distinct"] == len(set(docids))
            return
        with pytest.raises(UserError) as error:
            table.write(Path(folder))
    assert tuple(map(int, re.findall(r"passage '(\d+)'", str(error.value)))) in pairs


@given(st.lists(st.tuples(*[st.integers(1, 3)] * 4), min_size=1, max_size=12), st.integers(0, 4))
def test_passages_with_a_prefix_are_counted(docids, ended):
    tokens_NxL = np.array(docids, np.uint8)
    tokens_NxL[::2, ended:] = 0
    table = DocidTable("k", tokens_NxL, arrow_ids.array(map(str, range(len(docids)))), 128, "c")
    for row, docid in enumerate(tokens_NxL.tolist()):
        prefixes = [docid[: n + 1] for n in range(np.count_nonzero(docid))]
        wanted = [sum(other[: len(p)] == p for other in tokens_NxL.tolist()) for p in prefixes]
        assert table.prefix_counts(row) == wanted


@st.composite
def views(draw: st.DrawFn) -> dict[str, list[list[int]]]:
    """Passages with one to three docids each, all different, each ended by token 1."""
    count = draw(st.integers(1, 6))
    docids = draw(
        st.lists(
            st.lists(st.integers(2, 4), min_size=1, max_size=3),
            min_size=3 * count,
            max_size=3 * count,
            unique_by=tuple,
        )
    )
    sizes = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    return {f"p{i}": [[*docid, 1] for docid in docids[3 * i :][:size]] for i, size in enumerate(sizes)}


def table_of_views(docids_of: dict[str, list[list[int]]]) -> DocidTable:
    first = [docids[0] for docids in docids_of.values()]
    more = [(i, docid) for i, docids in enumerate(docids_of.values()) for docid in docids[1:]]
    tokens = np.zeros((len(first) + len(more), 4), np.int32)
    for row, docid in zip(tokens, [*first, *(docid for _, docid in more)], strict=True):
        row[: len(docid)] = docid
    table = table_of(tokens, [*docids_of])
    return dataclasses.replace(table, extra_docid_passage_M=np.array([i for i, _ in more], np.int32))


def views_of(table: DocidTable) -> dict[str, list[list[int]]]:
    """What `table_of_views` was given."""
    rows = [table.docids_of(row) for row in range(len(table.passage_ids))]
    assert [row.tolist() for row in map(table.passages_of, rows)] == [
        [i] * len(some) for i, some in enumerate(rows)
    ]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(table.tokens_NxL)))
    return {
        id: [docid[docid > 0].tolist() for docid in table.tokens_NxL[some]]
        for id, some in zip(table.passage_ids.to_pylist(), rows, strict=True)
    }


@given(views(), st.data())
@settings(deadline=None, max_examples=50)
def test_a_passage_may_have_several_docids(docids_of, data):
    """On disk and in memory, also when passages go and come."""
    table = table_of_views(docids_of)
    assert views_of(table) == docids_of
    assert table.passages_of(np.array([[-1, 0]])).tolist() == [[-1, 0]]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "naive", table)
        opened = DocidTable.open(Path(folder) / "naive")
        manifest = storage.read_manifest(Path(folder) / "naive", "docids")
    assert views_of(opened) == docids_of
    assert (manifest["passages"], manifest["docids"]) == (len(docids_of), sum(map(len, docids_of.values())))
    other = dataclasses.replace(table, extra_docid_passage_M=table.extra_docid_passage_M[::-1].copy() + 1)
    assert len(table.extra_docid_passage_M) == 0 or other.fingerprint() != table.fingerprint()

    gone = data.draw(st.sets(st.sampled_from([*docids_of][1:]))) if len(docids_of) > 1 else set()
    left = {id: docids for id, docids in docids_of.items() if id not in gone}
    assert views_of(table.without(gone)) == left
    with pytest.raises(UserError, match="passage 'new' is given twice"):
        table.with_passages(["one", "new", "new"], np.array([[5, 1]] * 3))
    grown = table.without(gone).with_passages(["new"], np.array([[5, 1]]))
    assert views_of(grown) == left | {"new": [[5, 1]]}
    for row in range(len(grown.tokens_NxL)):
        docid = [token for token in grown.tokens_NxL[row].tolist() if token]
        assert grown.prefix_counts(row) == [
            sum(any(other[:n] == docid[:n] for other in docids) for docids in views_of(grown).values())
            for n in range(1, len(docid) + 1)
        ]
        json.dumps(grown.prefix_counts(row))  # as a server does


def test_further_docids_name_passages_in_order(tmp_path):
    table = table_of([[3, 1], [4, 1], [5, 1], [6, 0]], ["a", "b"])
    for more in ([1, 0], [0, 2], [-1, 0]):
        with pytest.raises(UserError, match="extra_docid_passage_M: give rows of passages, ascending"):
            dataclasses.replace(table, extra_docid_passage_M=np.array(more)).check()
    dataclasses.replace(table, extra_docid_passage_M=np.array([0, 1])).check()
    prefix = dataclasses.replace(
        table, extra_docid_passage_M=np.array([0, 1]), tokens_NxL=np.array([[3, 1], [4, 1], [5, 0], [5, 1]])
    )
    with pytest.raises(
        UserError, match=r"\[5\], docid of passage 'a', is a prefix of \[5, 1\], docid of passage 'b'"
    ):
        write(tmp_path / "naive", prefix)
