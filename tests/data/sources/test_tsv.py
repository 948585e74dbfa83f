"""TSV files: headers are left out and tell the order of the columns; quotes of csv are no part of a text."""

import csv
import io

import pytest
from reading import read, write
from test_layouts import MSMARCO, PASSAGES, QUERIES, TSV

from retrieval_jax.data.collection import Passage
from retrieval_jax.data.sources.lines import ErrorLog


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
