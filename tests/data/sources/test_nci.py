"""NQ and TriviaQA in NCI's files."""

import pytest
from reading import error_of, places, read, write

from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources.lines import ErrorLog

NQ = {
    "NQ_doc_content.tsv": "0\t\t\tThe moon. It is round.\t\t\ten\n1\t\t\tThe sun.\t\t\ten\n",
    "nq_train_doc_newid.tsv": (
        'what is round\t555\t0\t1-2-3\t4\t5\t6\t7\nwho said ""fiat lux""\t556\t1\t1-2-4\n'.replace(
            "who", '"who'
        ).replace('""\t', '"""\t')
        + "what is round\t557\t1\t1-2-4\n"
    ),
    "nq_dev_doc_newid.tsv": "is it hot\t558\t1\t1-2-4\n",
}
TRIVIA = {
    "Trivia_doc_content.tsv": "70\t0\tMoon\tIt is round.\tMoonIt is round.\n71\t1\tSun\tHot.\tSunHot.\n",
    "train.tsv": "what is round?\t70\t0\t3-1\nwhat is round?\t71\t1\t3-2\n",
    "dev.tsv": 'is "it" hot?\t70,71,72\t0,1,1\t3-1,3-2,3-2\n',
    "trivia_512_qg.tsv": "a generated query\t0\t3-1\n",
}


def test_reads_natural_questions(tmp_path):
    passages, queries = read(write(tmp_path, NQ))
    assert passages == [Passage("0", "", "The moon. It is round."), Passage("1", "", "The sun.")]
    assert queries == {
        "dev": [Query("dev-1", "is it hot", {"1": 1})],
        "train": [
            Query("train-1", "what is round", {"0": 1, "1": 1}),
            Query("train-2", 'who said "fiat lux"', {"1": 1}),
        ],
    }


def test_reads_triviaqa(tmp_path):
    passages, queries = read(write(tmp_path, TRIVIA))
    assert passages == [Passage("0", "Moon", "It is round."), Passage("1", "Sun", "Hot.")]
    assert queries == {
        "train": [Query("train-1", "what is round?", {"0": 1, "1": 1})],
        "dev": [Query("dev-1", 'is "it" hot?', {"0": 1, "1": 1})],
    }


@pytest.mark.parametrize(
    ("files", "passages", "queries"),
    [
        (NQ, "docid\turl\ttitle\ttext\t\t\tlanguage", "query\tid\tdocid\tcluster"),
        (TRIVIA, "id\tdocid\ttitle\tcontent\tboth", "Question\tid\tdoc_id\tcluster\tx"),
    ],
)
def test_a_header_is_left_out_and_said(tmp_path, capsys, files, passages, queries):
    headed = {
        name: f"\ufeff{passages if 'content' in name else queries}\r\n{text}"
        for name, text in files.items()
        if "qg" not in name
    }
    found, judged = read(write(tmp_path / "headed", files | headed))
    assert capsys.readouterr().err.count(":1: a header") == 3
    expected, expected_judged = read(write(tmp_path / "plain", files))
    assert found == expected
    for split, some in expected_judged.items():  # named by their lines
        assert [(q.text, q.positives) for q in judged[split]] == [(q.text, q.positives) for q in some]


def test_passages_that_pandas_quoted(tmp_path):
    quoted = NQ["NQ_doc_content.tsv"].replace("The sun.", '"The ""sun""."')
    passages, _ = read(write(tmp_path, NQ | {"NQ_doc_content.tsv": quoted}))
    assert passages[1] == Passage("1", "", 'The "sun".')


def test_bad_lines(tmp_path):
    change = {"dev.tsv": TRIVIA["dev.tsv"] + "no document\nwhere?\t79\t9\t3-9\n"}
    folder = write(tmp_path, TRIVIA | change)
    errors = ErrorLog(skip=True)
    _, queries = read(folder, errors)
    assert [query.text for query in queries["dev"] if query.positives] == ['is "it" hot?']
    assert queries["dev"][-1].missing == {"9": 1}
    assert places(errors, tmp_path) == {"wrong columns": ["dev.tsv:2"], "unknown passage": ["dev.tsv:3"]}
    assert error_of(lambda: read(folder)).startswith(f"{folder / 'dev.tsv'}:2: 1 tab-separated columns")
