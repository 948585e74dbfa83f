"""Files of scores in every form, whole and damaged."""

import gzip
import json
import math
import pickle
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from reading import error_of, places, write
from test_damaged_files import QUICK, SEEDS, check_error, damaged, lines_of

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.sources import score_files
from retrieval_jax.data.sources.lines import ErrorLog
from retrieval_jax.verbs.importing import import_collection

WANTED = {"1": {"10": 3.5, "11": -1.0}, "2": {"12": 1e-3}}
_TEVATRON = [
    {
        "query_id": "1",
        "query": "a",
        "positive_passages": [{"docid": "10", "title": "", "text": "a", "score": 3.5}],
        "negative_passages": [{"docid": "11", "score": -1}, {"docid": "12"}],
    },
    {"query_id": "2", "query": "b", "positive_passages": [{"docid": "12", "score": 0.001}]},
]


def jsonl(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


FORMS = {
    "RIPOR": json.dumps(WANTED),
    "pretty": json.dumps(WANTED, indent=1),
    "a query a line": jsonl(*({query: some} for query, some in WANTED.items())),
    "lists": jsonl(
        {"qid": "1", "docids": ["10", "11"], "scores": [3.5, -1]},
        {"qid": 2, "docids": [12], "scores": [1e-3]},
    ),
    "Tevatron": jsonl(*_TEVATRON),
    "run": "1 Q0 10 0 3.5 x\n1 Q0 11 0 -1 x\n2 Q0 12 1 1e-3 x\n",
    "run in tabs": "1\tQ0\t10\t1\t3.5\tx\n1\tQ0\t11\t2\t-1\tx\n2\tQ0\t12\t1\t0.001\tx\n",
    "TSV": "qid\tpid\tscore\n1\t10\t3.5\n1\t11\t-1\n2\t12\t0.001\n",
    "no header": "1\t10\t3.5\n1\t11\t-1\n2\t12\t0.001\n",
    "triples": "1\t10\t11\t3.5\t-1\n1\t10\t11\t3.5\t-1.0\n2\t12\t12\t0.001\t0.001\n",
    "triples, header": "query\tpos\tneg\tpos_score\tneg_score\n1\t10\t11\t3.5\t-1\n2\t12\t12\t0.001\t0.001\n",
}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Queries 1 and 2 (train) and 3 (test) and passages 10 to 13, of one letter each."""
    folder = tmp_path_factory.mktemp("numbered")
    source = write(
        folder / "numbered",
        {
            "docs.tsv": "".join(f"{10 + i}\t\t{letter} text\n" for i, letter in enumerate("abcd")),
            "queries.train.tsv": "1\ta\n2\tb\n",
            "qrels.train.tsv": "1\t10\t1\n2\t12\t1\n",
            "queries.test.tsv": "3\tc\n",
            "qrels.test.tsv": "3\t13\t1\n",
        },
    )
    import_collection(str(source), str(folder / "work"), vocab_size=40)
    return Collection(folder / "work/collection")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read(numbered: Collection, tmp_path: Path, form: str, packed: bool):
    name = "scores.gz" if packed else "scores"
    write(tmp_path, {name: "\ufeff" + FORMS[form]})
    assert score_files.read(tmp_path / name, numbered, ErrorLog()) == score_files.ScoreFile(True, WANTED)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_form_of_a_long_line_is_told_by_its_beginning(
    numbered: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
):
    monkeypatch.setattr(score_files, "_HEAD", 9)
    wanted = {"1": {"10": 1.5, "11": 2.0}, "2": {"12": -1.0}}
    write(tmp_path, {f"scores{ending}": "\n" + json.dumps(wanted)})
    assert score_files.read(tmp_path / f"scores{ending}", numbered, ErrorLog()).scores == wanted


def test_hard_negatives_have_no_scores(numbered: Collection, tmp_path: Path):
    neg = {"bm25": [11, 12], "dense": [], "other": [13, 11, 10]}
    write(
        tmp_path,
        {"hard.jsonl": jsonl({"qid": 1, "pos": [10], "neg": neg}, {"qid": "2", "pos": [], "neg": {}})},
    )
    found = score_files.read(tmp_path / "hard.jsonl", numbered, ErrorLog())
    assert not found.has_scores
    assert list(found.scores) == ["1"]
    assert list(found.scores["1"]) == ["11", "13", "12", "10"]
    assert all(map(math.isnan, found.scores["1"].values()))


BAD = {
    "1\t10\t3\n9\t10\t3\n": ":2: query '9' is unknown",
    "1\t10\t3\n1\t99\t3\n": ":2: passage '99' is unknown",
    "1\t10\t3\n1\t10\t3\n1\t10\t4\n": ":3: query '1' and passage '10' had another score before: keep",
    "1\t10\t3\n1\t11\tNaN\n": ":2: the score 'NaN' is not a finite number",
    "1\t10\t3\n1\t11\t1e39\n": ":2: the score '1e39' is not a finite number",
    "1\t10\t3\n1\t11\n": ":2: 2 columns instead of 3: write query, passage, score",
    "1\t10\n": ":1: no form of scores is known with 2 columns",
    "": ":1: there is nothing in it",
    "3\t13\n\n": "columns",
    '{"1": {"10": true}}': ":1: the score 'True' is not a finite number",
    '{"1": {"10": NaN}}': ":1: the score 'nan' is not a finite number",
    '{"1": [10]}': ":1: the JSON is wrong ('1' is not followed by {passage id: score})",
    '{"1": {"10": 1}}\n{"1": {"11": 1}': ":2: the JSON is wrong",
    '{\n"1": {"10": 1},\n"1" {}\n}\n': ":3: the JSON is wrong",
    '{"1": {"10": 1, "10": 2}}': ":1: the JSON is wrong (the key '10' is there 2 times)",
    '{\n"1": {"10": 1},\n"1": {"11": 1}}': ":1: the JSON is wrong (the key '1' is there 2 times)",
    '{\n"1": {"99": 1}}': ": passage '99' is unknown",
    jsonl({"qid": "1", "docids": ["10"], "scores": []}): ":1: the JSON is wrong (1 docids have 0 scores)",
    jsonl({"qid": None, "docids": [], "scores": []}): ":1: the JSON is wrong (an id is 'None')",
    jsonl({"qid": "1", "neg": ["10"]}): ":1: the JSON is wrong ('neg' is not {system: [passage ids]})",
    jsonl(
        {"query_id": "1", "positive_passages": ["10"]}
    ): ":1: the JSON is wrong (a passage is not an object)",
    jsonl({"query_id": "1", "positive_passages": [{"docid": "10"}]}): "there are no scores of this coll",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_is_told_with_its_line(numbered: Collection, tmp_path: Path, text: str):
    path = tmp_path / "scores"
    path.write_text(text)
    message = error_of(lambda: score_files.read(path, numbered, ErrorLog()))
    assert message.startswith(f"{path}:")
    assert BAD[text] in message


def test_bad_lines_are_left_out_and_counted(numbered: Collection, tmp_path: Path):
    rows = ["1\t10\t3", "9\t10\t3", "1\t99\t3", "1\t98\t3", "1\t11\tx", "1\t10\t2", "2\t12\t0"]
    write(tmp_path, {"scores.tsv": "\n".join(rows)})
    errors = ErrorLog(skip=True)
    found = score_files.read(tmp_path / "scores.tsv", numbered, errors)
    assert found.scores == {"1": {"10": 3.0}, "2": {"12": 0.0}}
    assert places(errors, tmp_path) == {
        "bad score": ["scores.tsv:5"],
        "unknown query": ["scores.tsv:2"],
        "unknown passage": ["scores.tsv:3", "scores.tsv:4"],
        "another score": ["scores.tsv:6"],
    }


def test_pickles_cut_files_and_missing_ones_are_refused(numbered: Collection, tmp_path: Path):
    data = pickle.dumps(WANTED)
    for name, content in {
        "a.json": data,
        "b.gz": gzip.compress(data),
        "c.pkl": b"x",
        "d.pkl.gz": b"x",
    }.items():
        (tmp_path / name).write_bytes(content)
        message = error_of(lambda name=name: score_files.read(tmp_path / name, numbered, ErrorLog()))
        if name != "d.pkl.gz":
            assert f"{name}: a pickle, which can run any program when it is read" in message
    packed = gzip.compress(FORMS["run"].encode())
    for cut, line in ((packed[:-9], "cut.gz:"), (packed[:20], "cut.gz:1: ")):  # also within the first line
        (tmp_path / "cut.gz").write_bytes(cut)
        message = error_of(lambda: score_files.read(tmp_path / "cut.gz", numbered, ErrorLog()))
        assert line in message
        assert "the file is unreadable here" in message
    for name in ("missing", ""):
        error_of(lambda name=name: score_files.read(tmp_path / name, numbered, ErrorLog()))


def pairs_of(content: bytes) -> Iterator[tuple[str, str, float]]:
    """(query, passage, score) of each pair in a file."""
    rows = list(lines_of(content))
    if rows[0].strip() == "{":
        rows = [" ".join(rows)]
    for number, row in enumerate(rows):
        cells = row.split()
        if cells[:1] and cells[0].startswith("{"):
            record = json.loads(row)
            if "docids" in record:
                record = {record["qid"]: dict(zip(map(str, record["docids"]), record["scores"], strict=True))}
            if "query_id" in record:
                passages = [*record.get("positive_passages", []), *record.get("negative_passages", [])]
                record = {record["query_id"]: {str(p["docid"]): p["score"] for p in passages if "score" in p}}
            yield from ((str(q), p, float(x)) for q, some in record.items() for p, x in some.items())
        elif cells and (number or cells[0].isdigit()):  # else a header
            query, *ids = cells[0], cells[2] if len(cells) == 6 else cells[1]
            yield query, *ids, float(cells[4 if len(cells) == 6 else 3 if len(cells) == 5 else 2])
            if len(cells) == 5:
                yield query, cells[2], float(cells[4])


@pytest.mark.parametrize("form", FORMS)
@settings(parent=QUICK, max_examples=60)
@given(seed=SEEDS)
def test_a_file_is_read_as_it_stands_or_refused_in_a_line(numbered: Collection, form: str, seed: int):
    written, contents = damaged({"scores": FORMS[form]}, random.Random(seed))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(Path(temporary), written)
        try:
            found = score_files.read(next(folder.iterdir()), numbered, ErrorLog())
        except UserError as error:
            check_error(error, folder)
            return
    (content,) = contents.values()
    pairs = {(query, p, score) for query, some in found.scores.items() for p, score in some.items()}
    assert pairs == {*pairs_of(content)}
