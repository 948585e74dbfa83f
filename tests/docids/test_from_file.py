"""Docids from files: all forms give the same table, which is compared with one that plain Python makes."""

import gzip
import json
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import stand_in

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import EOS, Vocabulary, learn
from retrieval_jax.docids.from_file import FromFile, Settings
from retrieval_jax.docids.kinds import DocidRequest
from retrieval_jax.docids.making import make_table
from retrieval_jax.docids.table import DocidTable

IDS = ["p0", "p1", "p2"]


def made(path: Path, collection=None, **options: object) -> DocidTable:
    request = DocidRequest(collection or stand_in(IDS), settings=Settings(str(path), **options))
    table, _ = make_table(FromFile(), request)
    table.check()
    return table


def views(table: DocidTable) -> dict[str, list[list[int]]]:
    rows = map(table.docids_of, range(len(table.passage_ids)))
    docids = ([docid[docid > 0].tolist() for docid in table.tokens_NxL[some]] for some in rows)
    return dict(zip(table.passage_ids.to_pylist(), docids, strict=True))


def written(folder: Path, name: str, docids: dict[str, list]) -> Path:
    """The docids (lists of them, by passage) in a form, passages from the last to the first."""
    pairs = [(passage, docid) for passage in reversed(docids) for docid in docids[passage]]
    cells = {
        i: " ".join(map(str, docid)) if isinstance(docid, list) else docid
        for i, (_, docid) in enumerate(pairs)
    }
    text = {
        "a.json": json.dumps({p: d[0] if len(d) == 1 else d for p, d in reversed(docids.items())}, indent=1),
        "a.jsonl": "\n".join(json.dumps({passage: docid}) for passage, docid in pairs),
        "b.jsonl": "\n".join(json.dumps({"id": passage, "docid": docid}) for passage, docid in pairs),
        "a.tsv": "".join(f"{passage}\t{cells[i]}\n" for i, (passage, _) in enumerate(pairs)),
    }[name.removesuffix(".gz")]
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


codes = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@given(st.lists(st.lists(codes, min_size=1, max_size=3, unique_by=tuple), min_size=3, max_size=3))
@settings(deadline=None, max_examples=30)
def test_codes_are_tokens_of_their_positions(tmp_path_factory, several):
    """Token 2 + i·V + v, and an end where lengths differ: then no docid is a prefix of another."""
    docids, folder = dict(zip(IDS, several, strict=True)), tmp_path_factory.mktemp("file")
    flat = [docid for some in several for docid in some]
    V, end = 1 + max(map(max, flat)), [EOS] if len(set(map(len, flat))) > 1 else []
    expected = {
        p: [[2 + i * V + code for i, code in enumerate(docid)] + end for docid in some]
        for p, some in docids.items()
    }
    for name in ("a.json", "a.jsonl", "b.jsonl.gz", "a.tsv"):
        table = made(written(folder, name, docids))
        assert views(table) == expected
        assert table.has_docid_vocab
        assert (table.extra_docid_passage_M is None) == (len(flat) == 3)
        table.write(folder)  # checks prefixes
    wider = made(folder / "a.tsv", codes=9)
    assert all(
        2 + i * 9 <= token < 2 + (i + 1) * 9
        for docid in wider.tokens_NxL.tolist()
        for i, token in enumerate(docid)
        if token > 1
    )
    shape = FromFile.shape(types.SimpleNamespace(settings=lambda: Settings(str(folder / "a.json"))), 3, 99)
    assert (shape.length, shape.output_size) == (table.length, table.output_size)


def test_ripors_start_token_is_left_out(tmp_path):
    (tmp_path / "docid_to_smtid.json").write_text(
        json.dumps({"p0": [-1, 3, 0], "p1": [-1, 1, 1], "p2": [-1, 0, 2]})
    )
    assert views(made(tmp_path / "docid_to_smtid.json"))["p0"] == [[2 + 3, 2 + 4 + 0]]


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl", "a.tsv"])
def test_texts_are_pieces_of_the_vocabulary(tmp_path, name, capsys):
    learn(["alpha beta gamma delta", "abcdefghijklmnopqrstuvwxyz 0123456789 /.:"], 70, tmp_path / "pieces")
    collection = stand_in(IDS)
    collection.vocabulary_path = tmp_path / "pieces"
    docids = {"p0": ["alpha beta", "https://a.org/1"], "p1": ["alpha"], "p2": ["alpha beta"]}
    table = made(written(tmp_path, name, docids), collection, text=True)
    vocabulary = Vocabulary(tmp_path / "pieces")
    assert views(table) == {
        p: [[*vocabulary.encode(text), EOS] for text in texts] for p, texts in docids.items()
    }
    assert table.vocabulary == vocabulary.checksum
    with pytest.raises(
        UserError, match=r"1 docids are those of other passages, as 'p[02]' has that of 'p[02]'"
    ):
        made(tmp_path / name, collection, text=True, shared_docids="refuse")
    assert "usual" not in capsys.readouterr().err
    made(written(tmp_path, name, docids | {"p1": ["a" * 500]}), collection, text=True)
    assert "docids/file: the docid of passage 'p1' has" in capsys.readouterr().err


def test_a_docid_that_a_passage_has_already_is_left_out(tmp_path):
    (tmp_path / "a.tsv").write_text("p1\t1,2\np0\t0 0\np2\t1 2\np1\t0 1\np1\t1 2\n")
    assert views(made(tmp_path / "a.tsv")) == {"p0": [[2, 5]], "p1": [[3, 7], [2, 6]], "p2": [[3, 7]]}


GOOD = "p0\t0 1\np1\t1 1\n"
HUGE = "9" * 5000  # more digits than Python makes a number of


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "a.tsv",
            GOOD + "p2\t2 2\nx\t0 0\n",
            r"a.tsv:4: passage 'x': the collection has no such passage \(1 docids",
        ),
        ("a.tsv", GOOD, "a.tsv: no docid for 1 passages, as 'p2': give one to each"),
        *((f"a.{form}", text, "no docids in it") for form, text in (("tsv", ""), ("json", "{}"))),
        *((f"a.{form}", f'{{"p0": [{HUGE}]}}', "the JSON is wrong") for form in ("json", "jsonl")),
        ("a.tsv", f"p0\t1 {HUGE}\n", "is no docid"),
        (
            "a.tsv",
            GOOD + "p2\t2 9\n",
            r"a.tsv:3: passage 'p2': \[2, 9\] has a code outside 0 to 7: number codes from 0",
        ),
        ("a.tsv", GOOD + "p2\t2 -1\n", r"a.tsv:3: passage 'p2': \[2, -1\] has a code outside 0 to 7"),
        (
            "a.tsv",
            GOOD + "p2\tcat\n",
            "a.tsv:3: passage 'p2': \"cat\" is no docid: .*texts are read with --gin.docid_file.text",
        ),
        ("a.tsv", GOOD + "p2 2 2\n", "a.tsv:3: 1 tab-separated columns instead of 2: write passage, docid"),
        ("a.jsonl", '{"p0": [1]}\n{"p1": [1]\n', "a.jsonl:2: the JSON is wrong"),
        ("a.jsonl", '{"p0": [1]}\n{"p1": []}\n', r"a.jsonl:2: passage 'p1': \[\] is no docid"),
        (
            "a.json",
            '{"p0": [1],\n"p1": [true]}',
            r"a.json: passage 'p1': .*is no docid: write a list of whole",
        ),
        ("a.json", '{"p0": [1],\n"p1": [2]', "a.json:2: the JSON is wrong"),
        (
            "a.json",
            '{"p0": [1],\n"p0": [2]}',
            r"a.json:1: the JSON is wrong \(the key 'p0' is there 2 times\)",
        ),
        ("a.jsonl", '{"id": null, "docid": [1]}', r"a.jsonl:1: the JSON is wrong \(an id is 'None'\)"),
        (
            "a.json",
            "[1]",
            r"a.json:1: the JSON is wrong \(it is not an object, \{...\}\): write one JSON object a file",
        ),
        ("a.json.gz", "no gzip", "a.json.gz:1: the file is unreadable here"),
        ("a.tsv.gz", "no gzip", "a.tsv.gz:1: the file is unreadable here"),
        ("b.tsv", None, "b.tsv.*unreadable here|b.tsv.*no such"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path, name, text, told):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told) as raised:
        made(tmp_path / name, codes=8)
    assert "\n" not in str(raised.value)


def test_unknown_docid_file_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"docid_file\.shared_docids: 'drop' is neither 'list' nor 'refuse'"):
        Settings(shared_docids="drop")
    with pytest.raises(UserError, match=r"docid_file\.path: not set: name a file of docids"):
        FromFile().recipe(Settings())
    (tmp_path / "a.tsv").write_text(GOOD)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.tsv").write_text(GOOD)
    recipes = [
        FromFile().recipe(Settings(str(path)))
        for path in (tmp_path / "a.tsv", tmp_path / "elsewhere" / "a.tsv")
    ]
    assert recipes[0] == recipes[1]
    (tmp_path / "a.tsv").write_text(GOOD + " ")
    assert FromFile().recipe(Settings(str(tmp_path / "a.tsv"))) != recipes[0]
