"""Reading BEIR, TSV and MS MARCO folders: round trips, and one clear line for each way to go wrong."""

import csv
import gzip
import io
import json
import random
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import error_of, places, python_of, read, write

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection, Passage, Query
from retrieval_jax.data.sources import layouts
from retrieval_jax.data.sources.layouts import open_source
from retrieval_jax.data.sources.lines import ErrorLog

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
README = {  # folder -> passages, queries of each split
    "squad_dev": (2_067, {"train": 9_491, "test": 1_079}),
    "scifact": (5_183, {"train": 809, "test": 300}),
    "medquad": (16_407, {"train": 12_942, "test": 1_403}),
    "tldr": (7_425, {"train": 28_880, "test": 3_256}),
    "wordnet": (117_659, {"train": 43_553, "test": 4_786, "lemmas": 147_306}),
    "doct5q": (1_000, {"train": 47_441, "test": 6_966}),
    "limit_small": (46, {"test": 1_000}),
}

TSV = {
    "docs.tsv": "d1\tOne\tfirst text\nd2\t\tsecond text\nd3\tThree\t\n",
    "queries.train.tsv": "q1\twho?\nq2\twhat?\n",
    "qrels.train.tsv": "q1\td1\t1\nq2\td2\t2\nq1\td3\t1\n",
    "queries.val.tsv": "q3\twhere?\nq4\twhen?\nq5\twhy?\n",
    "qrels.val.tsv": "q3\td1\t0\nq3\td2\t-1\nq5\td1\t0\nq5\td3\t1\n",
}
HEADER = "query-id\tcorpus-id\tscore\n"
BEIR = {
    "corpus.jsonl": (
        '{"_id": "d1", "title": "One", "text": "first text"}\n'
        '{"_id": "d2", "text": "second text", "metadata": {"url": 1}}\n'
        '{"_id": "d3", "title": "Three", "text": ""}\n'
    ),
    "queries.jsonl": (
        '{"_id": "q1", "text": "who?"}\n{"_id": "q2", "text": "what?"}\n{"_id": "q3", "text": "where?"}\n'
        '{"_id": "q4", "text": "when?"}\n{"_id": "q5", "text": "why?"}\n'
    ),
    "qrels/train.tsv": HEADER + TSV["qrels.train.tsv"],
    "qrels/val.tsv": HEADER + TSV["qrels.val.tsv"],
}
MSMARCO = {
    "collection.tsv": "d1\tfirst text\nd2\tsecond text\nd3\tthird\n",
    "queries.train.tsv": "q1\twho?\nq2\twhat?\nq9\tnobody judged this\n",
    "qrels.train.tsv": "q1\t0\td1\t1\nq2 0 d2 2\nq1\t0\td3\t1\n",
    "queries.dev.small.tsv": TSV["queries.val.tsv"],
    "qrels.dev.small.tsv": "q3 0 d1 0\nq3 0 d2 -1\nq5 0 d1 0\nq5 0 d3 1\n",
    "queries.dev.tsv": "q5\tanother text, which no qrels use\n",
    "queries.eval.tsv": "q7\tno qrels here\n",
}
PASSAGES = [Passage("d1", "One", "first text"), Passage("d2", "", "second text"), Passage("d3", "Three", "")]
QUERIES = {
    "train": [Query("q1", "who?", {"d1": 1, "d3": 1}), Query("q2", "what?", {"d2": 2})],
    "dev": [
        Query("q3", "where?", {}, ("d1", "d2")),
        Query("q5", "why?", {"d3": 1}, ("d1",)),
    ],  # q4 has no grade
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("layout", [TSV, BEIR])
def test_reads_both_layouts_plain_and_compressed(tmp_path, layout, ending):
    folder = write(tmp_path / "My Data-v2", {name + ending: content for name, content in layout.items()})
    assert read(folder) == (PASSAGES, QUERIES)
    source = open_source(str(folder))
    assert source.name == "my_data_v2"
    assert len(source.files) == len(set(source.files))
    assert set(source.files) == {folder / (name + ending) for name in layout}


@pytest.mark.parametrize("layout", [TSV, BEIR])
def test_accepts_windows_line_ends_byte_order_marks_and_empty_lines(tmp_path, layout):
    windows = {name: "\ufeff" + text.replace("\n", "\r\n") + "\r\n\n" for name, text in layout.items()}
    assert read(write(tmp_path, windows)) == (PASSAGES, QUERIES)


@pytest.mark.parametrize("layout", [TSV, BEIR])
def test_accepts_a_last_line_without_an_end(tmp_path, layout):
    files = {name: text.removesuffix("\n") for name, text in layout.items()}
    assert read(write(tmp_path, files)) == (PASSAGES, QUERIES)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_reads_ms_marco(tmp_path, ending):
    folder = write(tmp_path / "msmarco", {name + ending: text for name, text in MSMARCO.items()})
    passages = [Passage("d1", "", "first text"), Passage("d2", "", "second text"), Passage("d3", "", "third")]
    assert read(folder) == (passages, QUERIES)
    assert len(open_source(folder).files) == 5  # neither of the two that no qrels belong to


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("layout", "passages", "queries"),
    [
        (TSV, "id\ttitle\ttext", "qid\ttext"),
        (TSV, "\ufeffDocID\tTitle\tPassage\r", "query-id\tQuestion"),
        (MSMARCO, "pid\tpassage", "qid\tquery"),
    ],
)
def test_a_header_is_left_out_and_said(tmp_path, capsys, layout, passages, queries, ending):
    marker = "docs.tsv" if layout is TSV else "collection.tsv"
    headed = {name: f"{queries}\n{text}" for name, text in layout.items() if name.startswith("queries")}
    files = layout | headed | {marker: f"{passages}\n{layout[marker]}"}
    folder = write(tmp_path / "headed", {name + ending: text for name, text in files.items()})
    expected = read(write(tmp_path / "plain", layout))
    assert read(folder) == expected
    said = capsys.readouterr().err
    assert said.count(": left out") == 3
    assert f"{folder / marker}{ending}:1: a header" in said


def test_the_columns_are_read_in_the_order_of_a_header(tmp_path):
    """DPR's psgs_w100.tsv has the title last."""
    rows = "".join(f"{p.id}\t{p.text}\t{p.title}\n" for p in PASSAGES)
    queries = "text\tid\nwho?\tq1\nwhat?\tq2\n"
    files = TSV | {"docs.tsv": "id\ttext\ttitle\n" + rows, "queries.train.tsv": queries}
    assert read(write(tmp_path, files)) == (PASSAGES, QUERIES)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_texts_that_csv_quoted_are_read_out_of_their_quotes(tmp_path, ending):
    """As csv.writer, pandas and DPR's psgs_w100.tsv quote: a cell that has a quote, and no other."""
    texts = ['He said "x"', '"', '""', '"a" or "b"', "a 'b'", 'x "y']
    out = io.StringIO()
    rows = [("id", "text", "title"), *((f"d{i}", text, text[::-1]) for i, text in enumerate(texts))]
    csv.writer(out, delimiter="\t", lineterminator="\n").writerows(rows)
    assert '\t"He said ""x"""\t' in out.getvalue()
    files = {f"docs.tsv{ending}": out.getvalue(), "qrels.test.tsv": "q\td1\t1\n"}
    files["queries.test.tsv"] = 'q\t"who said ""x""?"\n'
    passages, queries = read(write(tmp_path, files))
    assert passages == [Passage(f"d{i}", text[::-1], text) for i, text in enumerate(texts)]
    assert queries["test"][0].text == 'who said "x"?'


def test_quotes_of_texts_that_csv_did_not_quote_stay(tmp_path):
    texts = ['"whole"', '"a" and "b"', '"a ""b" c"', 'a ""b""', '"', '""', '"a', '"I" ""b"" "c"']
    docs = "".join(f"d{i}\t\t{text}\n" for i, text in enumerate(texts))
    passages, _ = read(write(tmp_path, TSV | {"docs.tsv": docs}), ErrorLog(skip=True))
    assert [passage.text for passage in passages] == texts


def test_a_line_that_names_a_column_twice_or_not_at_all_is_a_row(tmp_path):
    docs = "id\ttitle\tsome words\npid\tquery\ttext\n"
    passages, _ = read(write(tmp_path, TSV | {"docs.tsv": docs + TSV["docs.tsv"]}))
    assert passages[:2] == [Passage("id", "title", "some words"), Passage("pid", "query", "text")]


def test_a_title_may_be_null(tmp_path):
    corpus = BEIR["corpus.jsonl"].replace('"d2",', '"d2", "title": null,')
    assert read(write(tmp_path, BEIR | {"corpus.jsonl": corpus})) == (PASSAGES, QUERIES)


def test_files_that_were_joined_have_marks_within(tmp_path):
    """And texts keep their other odd characters."""
    docs = TSV["docs.tsv"].replace("d2", "\ufeffd2") + "d4\t\ta\u2028b\0c\rd\ufeff\n"
    passages, queries = read(write(tmp_path, TSV | {"docs.tsv": docs}))
    assert passages == [*PASSAGES, Passage("d4", "", "a\u2028b\0c\rd\ufeff")]
    assert queries == QUERIES


ids = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1, max_size=6
).filter(lambda x: x.split() == [x])
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
tsv_text = any_text.map(lambda text: re.sub(r"[\t\r\n]", "", text))


@st.composite
def collections(draw, text):
    keys = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    passages = [Passage(key, draw(text), draw(text) + "x") for key in keys]
    positives = st.dictionaries(st.sampled_from(keys), st.integers(1, 10**9 - 1), min_size=1)
    queries = [
        Query(key, draw(text), draw(positives)) for key in draw(st.lists(ids, min_size=1, unique=True))
    ]
    return passages, {"test": queries}


def qrels(queries: list[Query]) -> str:
    return "".join(f"{q.id}\t{key}\t{grade}\n" for q in queries for key, grade in q.positives.items())


@settings(max_examples=50, deadline=None)
@given(collections(tsv_text))
def test_round_trip_of_tsv(collection):
    passages, queries = collection
    docs = "".join(f"{p.id}\t{p.title}\t{p.text}\n" for p in passages)
    files = {
        "docs.tsv": "\ufeff" + docs,  # without the mark, the reader would drop one from the first id
        "queries.test.tsv.gz": "\ufeff" + "".join(f"{q.id}\t{q.text}\n" for q in queries["test"]),
        "qrels.test.tsv": "\ufeff" + qrels(queries["test"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        assert read(write(Path(folder), files)) == (passages, queries)


@settings(max_examples=50, deadline=None)
@given(collections(any_text), st.booleans())
def test_round_trip_of_beir(collection, ascii_only):
    passages, queries = collection
    docs = [{"_id": p.id, "title": p.title, "text": p.text} for p in passages]
    asked = [{"_id": q.id, "text": q.text} for q in queries["test"]]
    files = {
        "corpus.jsonl": "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in docs),
        "queries.jsonl.gz": "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in asked),
        "qrels/test.tsv": HEADER + qrels(queries["test"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        assert read(write(Path(folder), files)) == (passages, queries)


def damaged(text: str) -> bytes:
    """Compressed data with the check sum of another text."""
    data = bytearray(gzip.compress(text.encode()))
    data[-8] ^= 1
    return bytes(data)


TSV_FAULTS = [  # what replaces a file of TSV (None removes it), the place in the message, what it says
    ({"docs.tsv": None}, "", "BEIR needs corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; TSV needs docs.tsv, "),
    ({"corpus.jsonl": "{}"}, "", "two layouts"),
    ({"docs.tsv.gz": "d1\t\ttext\n"}, "docs.tsv", "both plain and as .gz"),
    ({"docs.tsv": ""}, "docs.tsv", "empty collection"),
    ({"docs.tsv": "\n\r\n"}, "docs.tsv", "empty collection"),
    ({"docs.tsv": None, "docs.tsv.gz": b""}, "docs.tsv.gz", "empty collection"),
    ({"docs.tsv": "d1\ta\tb\nd2\ttext\n"}, "docs.tsv:2", "2 tab-separated columns instead of 3"),
    ({"docs.tsv": "d1\ta\tb\n\nd2\ta\tb\tc\n"}, "docs.tsv:3", "4 tab-separated columns instead of 3"),
    ({"docs.tsv": b"d1\ta\tb\nd2\ta\tcaf\xe9\n"}, "docs.tsv:2", "not UTF-8"),
    ({"docs.tsv": "d1\ta\tb\n".encode("utf-16")}, "docs.tsv:1", "not UTF-8"),
    ({"docs.tsv": gzip.compress(b"d1\ta\tb\n")}, "docs.tsv:1", "not UTF-8"),
    ({"docs.tsv": "d1\ta\tb\nd2\ta\tb\nd1\tc\td\n"}, "docs.tsv:3", "'d1' was used on an earlier line"),
    ({"docs.tsv": "\ta\tb\n"}, "docs.tsv:1", "'' is empty or has whitespace"),
    ({"docs.tsv": "d 1\ta\tb\n"}, "docs.tsv:1", "'d 1' is empty or has whitespace"),
    ({"docs.tsv": "d1\u2028\ta\tb\n"}, "docs.tsv:1", r"'d1\u2028' is empty or has whitespace"),
    ({"docs.tsv": "d1\0\ta\tb\n"}, "docs.tsv:1", r"'d1\x00' has a control character"),
    (
        {"docs.tsv": "d1\ta\tb\nd\ufeff2\ta\tb\n"},
        "docs.tsv:2",
        "has a control character or a byte order mark",
    ),
    ({"docs.tsv": "d1\ta\tb\rd2\ta\tb\r"}, "docs.tsv:1", "5 tab-separated columns instead of 3"),
    ({"docs.tsv": b"d1\ta\t\xed\xa0\x80\n"}, "docs.tsv:1", "not UTF-8"),
    ({"docs.tsv": "id\ttitle\ttext\nd1\ta\tb\nid\ttitle\ttext\n"}, "docs.tsv:3", "the header again"),
    ({"docs.tsv": "d1\ta\tb\nd2\t\t \n"}, "docs.tsv:2", "'d2' has neither title nor text"),
    ({"docs.tsv": None, "docs.tsv.gz": b"d1\ta\tb\n"}, "docs.tsv.gz:1", "Not a gzipped file"),
    ({"docs.tsv": None, "docs.tsv.gz": gzip.compress(b"d1\ta\tb\n")[:-9]}, "docs.tsv.gz:2", "unreadable"),
    ({"docs.tsv": None, "docs.tsv.gz": damaged("d1\ta\tb\n")}, "docs.tsv.gz:", "CRC check failed"),
    ({"docs.tsv": None, "docs.tsv.gz": gzip.compress(b"")[:10] + b"\7"}, "docs.tsv.gz:1", "invalid block"),
    ({"docs.tsv": None, "docs.tsv/a": "a directory"}, "docs.tsv:1", "directory"),
    ({"queries.train.tsv": None}, "queries.train.tsv", "missing"),
    ({"queries.train.tsv": ""}, "queries.train.tsv", "there are no queries"),
    ({"queries.train.tsv": "q1\n"}, "queries.train.tsv:1", "1 tab-separated columns instead of 2"),
    ({"queries.train.tsv": "q1\ta\nq1\ta\n"}, "queries.train.tsv:2", "'q1' was used on an earlier line"),
    ({"queries.train.tsv": "q1\ta\nq 2\ta\n"}, "queries.train.tsv:2", "'q 2' is empty or has whitespace"),
    (
        {"queries.val.tsv": "q5\tb\nq3\ta\nq1\ta\n", "qrels.val.tsv": TSV["qrels.val.tsv"] + "q1\td1\t1\n"},
        "queries.val.tsv:3",
        "another text in another split",
    ),
    ({"qrels.train.tsv": None, "qrels.val.tsv": None}, "qrels.SPLIT.tsv", "there are no qrels"),
    ({"qrels.train.tsv": ""}, "qrels.train.tsv", "no query has a positive passage"),
    ({"qrels.train.tsv": HEADER}, "qrels.train.tsv", "no query has a positive passage"),
    ({"qrels.train.tsv": "q1\td1\t0\n"}, "qrels.train.tsv", "no query has a positive passage"),
    ({"qrels.train.tsv": "q1\t0\td1\t1\n"}, "qrels.train.tsv:1", "4 tab-separated columns instead of 3"),
    ({"qrels.train.tsv": "q1 d1 1\n"}, "qrels.train.tsv:1", "1 tab-separated columns instead of 3"),
    ({"qrels.train.tsv": "q1\td1\t1\nq1\td9\t1\n"}, "qrels.train.tsv:2", "passage 'd9' is unknown"),
    ({"qrels.train.tsv": "q1\td1\t1\nq1\td9\t0\n"}, "qrels.train.tsv:2", "passage 'd9' is unknown"),
    ({"qrels.train.tsv": "q1\td1\t1\nq3\td1\t1\n"}, "qrels.train.tsv:2", "query 'q3' is unknown"),
    ({"qrels.train.tsv": "q1\td1\t1\nq1\td1\t2\n"}, "qrels.train.tsv:2", "another grade"),
    *(
        ({"qrels.train.tsv": f"q1\td1\t1\nq2\td1\t{grade}\n"}, "qrels.train.tsv:2", "not a whole number")
        for grade in ["1.0", "", " 1", "one", "1_0", "+1", "١", "9" * 5000]
    ),
    ({"qrels.train.tsv": "q1\td1\t1\n" + HEADER}, "qrels.train.tsv:2", "query-id, corpus-id, score"),
    ({"qrels.train.tsv.gz": "q1\td1\t1\n"}, "qrels.train.tsv.gz", "qrels.train.tsv is split 'train' too"),
    ({"qrels.validation.tsv": "", "queries.validation.tsv": ""}, "qrels.validation.tsv", "split 'dev' too"),
    ({"qrels.a-b.tsv": "q1\td1\t1\n"}, "qrels.a-b.tsv", "'a-b' is no name for a split"),
]
BEIR_FAULTS = [
    ({"corpus.jsonl": '{"_id": "d1", "text": "a"}\n{"_id": \n'}, "corpus.jsonl:2", "column"),
    ({"corpus.jsonl": "[1]\n"}, "corpus.jsonl:1", "not an object"),
    ({"corpus.jsonl": "[" * 200_000 + "\n"}, "corpus.jsonl:1", "the JSON is wrong"),
    ({"corpus.jsonl": '{"text": "a"}\n'}, "corpus.jsonl:1", "'_id' is missing"),
    ({"corpus.jsonl": '{"_id": "d1"}\n'}, "corpus.jsonl:1", "'text' is missing"),
    ({"corpus.jsonl": '{"_id": 1, "text": "a"}\n'}, "corpus.jsonl:1", "'_id' is not a string"),
    ({"corpus.jsonl": '{"_id": "1", "title": 3, "text": "a"}\n'}, "corpus.jsonl:1", "'title' is not a "),
    ({"corpus.jsonl": '{"_id": "1", "text": "\\ud800"}\n'}, "corpus.jsonl:1", "surrogates not allowed"),
    ({"corpus.jsonl": '{"_id": "1\\n", "text": "a"}\n'}, "corpus.jsonl:1", r"'1\n' is empty or has white"),
    ({"corpus.jsonl": '{"_id": "1", "text": "\\n"}\n'}, "corpus.jsonl:1", "neither title nor text"),
    ({"queries.jsonl": None}, "queries.jsonl", "missing"),
    ({"queries.jsonl": "\n"}, "queries.jsonl", "there are no queries"),
    ({"queries.jsonl": '{"_id": "q1"}\n'}, "queries.jsonl:1", "'text' is missing"),
    ({"queries.jsonl": BEIR["queries.jsonl"] * 2}, "queries.jsonl:6", "'q1' was used on an earlier line"),
    ({"qrels/train.tsv": None, "qrels/val.tsv": None}, "qrels/SPLIT.tsv", "there are no qrels"),
    ({"qrels/train.tsv": "query\tdoc\tgrade\n"}, "qrels/train.tsv:1", "query-id, corpus-id, score"),
    ({"qrels/train.tsv": HEADER + "q1\td9\t1\n"}, "qrels/train.tsv:2", "passage 'd9' is unknown"),
    ({"qrels/train.tsv": HEADER + "q9\td1\t1\n"}, "qrels/train.tsv:2", "query 'q9' is unknown"),
]


@pytest.mark.parametrize(
    ("layout", "change", "place", "what"),
    [(TSV, *fault) for fault in TSV_FAULTS] + [(BEIR, *fault) for fault in BEIR_FAULTS],
)
def test_faults_name_the_file_and_the_line(tmp_path, layout, change, place, what):
    folder = write(tmp_path, layout | change)
    message = error_of(lambda: read(folder))
    assert message.startswith(str(tmp_path / place) if place else f"{tmp_path}: ")
    assert place.endswith(":") or message.removeprefix(str(tmp_path / place)).startswith(": ")
    assert what in message
    assert len(message) < len(str(tmp_path)) + (300 if place else 500)


SKIPPED = [  # what replaces a file of TSV, what is noted of it, which passages and train queries are left
    ({"docs.tsv": "d1\ta\tb\nd2\ttext\n"}, {"wrong columns": ["docs.tsv:2"]}, ["d1"], ["q1"]),
    ({"docs.tsv": b"d1\ta\tb\nd2\ta\tcaf\xe9\n"}, {"not UTF-8": ["docs.tsv:2"]}, ["d1"], ["q1"]),
    ({"docs.tsv": "d1\ta\tb\nd1\tc\td\n"}, {"duplicate id": ["docs.tsv:2"]}, ["d1"], ["q1"]),
    ({"docs.tsv": "d1\ta\tb\nd 2\ta\tb\n"}, {"bad id": ["docs.tsv:2"]}, ["d1"], ["q1"]),
    ({"docs.tsv": "d1\ta\tb\nd2\t\t \n"}, {"empty passage": ["docs.tsv:2"]}, ["d1"], ["q1"]),
    (
        {"docs.tsv": None, "docs.tsv.gz": gzip.compress(b"d1\ta\tb\n")[:-9]},
        {"damaged file": ["docs.tsv.gz:2"]},
        ["d1"],
        ["q1"],
    ),
    (
        {"queries.train.tsv": "q1\ta\nq1\tb\nq2\n"},
        {"duplicate id": ["queries.train.tsv:2"], "wrong columns": ["queries.train.tsv:3"]},
        ["d1", "d2", "d3"],
        ["q1"],
    ),
    (
        {"qrels.train.tsv": "q1\td1\t1\nq2\td2\tx\nq2\td9\t1\nq1\td1\t2\nq8\td1\t1\nq2 d1 1\n"},
        {
            "bad grade": ["qrels.train.tsv:2"],
            "wrong columns": ["qrels.train.tsv:6"],
            "unknown passage": ["qrels.train.tsv:3"],
            "another grade": ["qrels.train.tsv:4"],
            "unknown query": ["qrels.train.tsv:5"],
        },
        ["d1", "d2", "d3"],
        ["q1"],
    ),
]


@pytest.mark.parametrize(("change", "noted", "passages", "train"), SKIPPED)
def test_bad_lines_can_be_left_out(tmp_path, change, noted, passages, train):
    change = {"qrels.val.tsv": "q5\td1\t1\n"} | change
    folder = write(tmp_path, TSV | change)
    errors = ErrorLog(skip=True)
    found, queries = read(folder, errors)
    # Qrels to what was left out are noted, too.
    follow = {"unknown passage", "unknown query"} - set(noted)
    assert {k: some for k, some in places(errors, tmp_path).items() if k not in follow} == noted
    assert [passage.id for passage in found] == passages
    assert [query.id for query in queries["train"] if query.positives] == train
    assert [query.id for query in queries["dev"]] == ["q5"]
    if "d2" not in passages:  # what can no longer be found still counts in an evaluation
        assert queries["train"][1] == Query("q2", "what?", {}, missing={"d2": 2})
        assert queries["train"][1].relevant == {"d2": 2}
    # The first of them is what stops an import that does not leave them out.
    first = min((place for some in noted.values() for place in some), key=lambda place: place.split(":")[1])
    assert error_of(lambda: read(folder)).startswith(f"{tmp_path / first}: ")


def test_a_truncated_file_names_the_line_where_it_ends(tmp_path):
    numbers = random.Random(0)
    rows = "".join(f"d{i}\t\t{numbers.random()} some text\n" for i in range(20_000))
    whole = gzip.compress(rows.encode())
    folder = write(tmp_path, TSV | {"docs.tsv": None, "docs.tsv.gz": whole[: len(whole) // 2]})
    message = error_of(lambda: read(folder))
    line = int(re.search(r"docs\.tsv\.gz:(\d+): ", message)[1])
    assert 5_000 < line < 15_000


@pytest.mark.parametrize("path", ["absent", "docs.tsv"])
def test_the_folder_must_be_one(tmp_path, path):
    write(tmp_path, TSV)
    assert error_of(lambda: open_source(tmp_path / path)).startswith(
        f"{tmp_path / path}: there is no such folder"
    )


@pytest.mark.parametrize("name", README)
def test_reads_the_real_collections(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not on this machine")
    passages, queries = read(SHARED / name)
    assert (len(passages), {split: len(asked) for split, asked in queries.items()}) == README[name]


def test_a_layout_from_outside_the_package_goes_first(tmp_path, monkeypatch, cli):
    monkeypatch.setattr(layouts, "_OTHERS", [])
    (example,) = python_of("retrieval_jax/data/README.md")
    (tmp_path / "cards_layout_module.py").write_text(example)
    (tmp_path / "cards.gin").write_text("import cards_layout_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = write(tmp_path / "docs", {"cards.txt": "d1|red|fox\nd2|blue|bird\n", "notes.jsonl": "[]\n"})
    with pytest.raises(UserError):  # the notes' name is like Tevatron's
        read(folder)
    command = [
        "import",
        f"--COLLECTION={folder}",
        f"--WORK_DIR={tmp_path / 'work'}",
        f"--gin_file={tmp_path}/cards.gin",
    ]
    status, made, err = cli(*command, "--gin.import_collection.vocab_size=40")
    assert status == 0, err
    assert (made["passages"], made["queries"]) == (2, {"test": 2})
    collection = Collection(tmp_path / "work/collection")
    assert list(collection.passages()) == [Passage("d1", "", "d1|red|fox"), Passage("d2", "", "d2|blue|bird")]
    assert [query.positives for query in collection.queries("test")] == [{"d1": 1}, {"d2": 1}]
    with pytest.raises(ValueError, match="a layout 'Cards' is registered already"):
        layouts.register_layout(layouts._OTHERS[0])
    for file in folder.iterdir():
        file.unlink()
    assert "Cards needs cards.txt" in error_of(lambda: open_source(folder))
