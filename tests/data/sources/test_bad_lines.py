"""Bad lines of TSV and BEIR folders: one clear line for each way to go wrong; or they are left out."""

import gzip
import random
import re

import pytest
from reading import error_of, places, read, write
from test_layouts import BEIR, HEADER, TSV

from retrieval_jax.data.collection import Query
from retrieval_jax.data.sources.lines import ErrorLog


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
