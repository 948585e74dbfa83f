"""Damaged and odd files of every format: either what they say is read, or one line names the file.

Hypothesis changes small files of each format as people and programs do. What is then read is compared with
what a few lines of Python find in the same bytes: rows split at tabs, or JSON.
"""

import contextlib
import csv
import gzip
import io
import json
import random
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import read, write
from test_layouts import BEIR, MSMARCO, TSV
from test_nci import NQ, TRIVIA
from test_tevatron import LINE, OTHER, PASSAGES, jsonl

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.predictions import open_predictions
from retrieval_jax.data.sources.lines import ErrorLog
from retrieval_jax.data.synthetic import QueryShards
from retrieval_jax.data.trec import read_run

CORPUS = jsonl(*({"docid": p.id, "title": p.title, "text": p.text} for p in PASSAGES))
LAYOUTS = {
    "BEIR": BEIR,
    "TSV": TSV | {"docs.tsv": 'd1\tOne\t"He said ""x"""\nd2\t\tsecond text\nd3\tThree\tthird é\n'},
    "MS MARCO": {
        name: text for name, text in MSMARCO.items() if "dev.tsv" not in name and "eval" not in name
    },
    "NQ": NQ,
    "TriviaQA": {name: text for name, text in TRIVIA.items() if "qg" not in name},
    "Tevatron": {"train.jsonl": jsonl(LINE, OTHER)},
    "Tevatron, corpus": {"corpus.jsonl": CORPUS, "train.jsonl": jsonl(LINE, OTHER)},
}
HEADED = ["id\ttitle\ttext", "pid\tpassage", "docid\t\t\ttext\t\t\t", "no\tdocid\ttitle\tcontent\tall"]
HEADED += ["qid\tquery", "text\tid"]  # lines that name the columns of passages
HEADERS = [*HEADED, "query-id\tcorpus-id\tscore", "q 0 d g", "query\tno\tdocid\tgroup"]
VALUES = [None, 1, 1.5, True, [], ["text"], {}, {"text": "x"}, "", "null", "\ud800", "a\tb\nc", -(10**30)]
SEPARATORS = [
    b"\t",
    b" ",
    b",",
    b"\n",
    b"\r",
    b"\r\n",
    b"  ",
    b";",
    b'"',
    b"\x00",
    b"\xef\xbb\xbf",
    b"\xff",
    b"null",
]
SEPARATORS += ["\u2028".encode(), "１".encode(), b"1e999", b"NaN", b"{}", b"[]", b"-", b"\xc3", b"\t\t"]


def changed(content: bytes, dice: random.Random) -> bytes:
    """The file with one change."""
    lines = content.splitlines(keepends=True) or [b""]
    i, at = dice.randrange(len(lines)), dice.randrange(len(content) + 1)
    extra, other = dice.choice(SEPARATORS), dice.choice(SEPARATORS)
    changes: list[Callable[[], bytes]] = [
        lambda: b"".join(lines[:i] + lines[i + 1 :]),
        lambda: b"".join([*lines[:i], lines[i], *lines[i:]]),
        lambda: b"".join([*lines[:i], lines[i].rstrip(b"\n"), *lines[i + 1 :]]),
        lambda: content.replace(extra, other),
        lambda: content.replace(b"\t", other, 1),
        lambda: content[:at],
        lambda: content[:at] + content[at + 1 :],
        lambda: content[:at] + extra + content[at:],
        lambda: b"".join([*lines[:i], extra, *lines[i:]]),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: b"".join([*lines[:i], dice.choice(HEADERS).encode() + b"\n", *lines[i:]]),
        lambda: b"".join([*lines[:i], with_value(lines[i], dice), *lines[i + 1 :]]),
        lambda: as_csv(content),
        lambda: content + content,
        lambda: content.decode(errors="replace").encode("utf-16"),
        lambda: b"",
    ]
    return dice.choice(changes)()


def with_value(line: bytes, dice: random.Random) -> bytes:
    """A row with another cell, or an object with another value."""
    try:
        record = json.loads(line)
    except ValueError:
        cells = line.rstrip(b"\n").split(b"\t")
        cells[dice.randrange(len(cells))] = str(dice.choice(VALUES)).encode(errors="replace")
        return b"\t".join(cells) + b"\n"
    if isinstance(record, dict) and record:
        place = record
        key = dice.choice([*place])
        if (
            isinstance(place[key], list)
            and place[key]
            and isinstance(place[key][0], dict)
            and dice.random() < 0.7
        ):
            place = place[key][0]
            key = dice.choice([*place]) if place else "x"
        place[key] = dice.choice(VALUES)
    return json.dumps(record).encode() + b"\n"


def as_csv(content: bytes) -> bytes:
    """The rows as csv.writer and pandas write them: cells with a quote or a tab are quoted."""
    out = io.StringIO()
    rows = [line.split("\t") for line in content.decode(errors="replace").splitlines()]
    csv.writer(out, delimiter="\t", lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def lines_of(content: bytes) -> Iterator[str]:
    """The lines that are not empty, as far as they are UTF-8."""
    for raw in content.split(b"\n"):
        line = raw.decode(errors="replace").removeprefix("\ufeff").removesuffix("\r")
        if line:
            yield line


def strings_of(line: str) -> set[str]:
    """All texts that a line may stand for: cells, as they are or out of quotes, and strings of JSON."""
    cells = set(line.split("\t"))
    cells |= {cell[1:-1].replace('""', '"') for cell in cells if len(cell) > 1 and cell[0] == cell[-1] == '"'}

    def walk(value: object) -> None:
        if isinstance(value, str):
            cells.add(value)
        elif isinstance(value, (list, dict)):
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)

    with contextlib.suppress(ValueError, RecursionError):
        walk(json.loads(line))
    return cells | {""}


def compressed(content: bytes, dice: random.Random) -> tuple[bytes, bytes]:
    """(a .gz, cut short now and then, and what can be read of it)."""
    packed = gzip.compress(content)
    if dice.random() < 0.5:
        packed = packed[: dice.randrange(len(packed))]
    try:
        return packed, zlib.decompressobj(31).decompress(packed)
    except zlib.error:
        return packed, b""


def damaged(files: dict[str, str], dice: random.Random) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(the files with one to three changes, name -> bytes; and their contents, where they are compressed)."""
    contents = {name: text.encode() for name, text in files.items()}
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        name = dice.choice([*contents])
        contents[name] = changed(contents[name], dice)
    written = dict(contents)
    if dice.random() < 0.2:
        name = dice.choice([*contents])
        written.pop(name)
        written[f"{name}.gz"], contents[name] = compressed(contents[name], dice)
    return written, contents


def check_error(error: UserError, folder: Path) -> None:
    """One printable line that begins with a file of the folder."""
    message = str(error)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert re.match(rf"{re.escape(str(folder))}/[\w./]+(:\d+)?: .+: .+", message), message


SEEDS = st.integers(0, 2**63)
QUICK = settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("layout", LAYOUTS)
@QUICK
@given(seed=SEEDS)
def test_a_source_is_read_as_it_stands_or_refused_in_a_line(layout, seed):
    dice = random.Random(seed)
    written, contents = damaged(LAYOUTS[layout], dice)
    errors = ErrorLog(skip=dice.random() < 0.3)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(Path(temporary), written)
        try:
            passages, queries = read(folder, errors)
        except UserError as error:
            check_error(error, folder)
            return
    found = [strings_of(line) for content in contents.values() for line in lines_of(content)]
    for passage in passages:
        assert any({passage.id, passage.title, passage.text} <= strings for strings in found)
    marker = next((name for name in contents if re.search("corpus|docs|collection|content", name)), None)
    if marker and not errors.skip:
        rows = list(lines_of(contents[marker]))
        headed = rows[0] in HEADED
        assert len(passages) == len(rows) - headed
    known = {passage.id for passage in passages}
    for query in (query for some in queries.values() for query in some):
        key = set() if layout in ("NQ", "TriviaQA") else {query.id}
        assert any(key | {query.text} <= strings for strings in found)
        assert {*query.positives, *query.negatives} <= known
    if layout in ("BEIR", "TSV", "MS MARCO") and not errors.skip:
        assert judged(queries) == set(qrels(contents, layout))


def judged(queries: dict) -> set[tuple[str, str, bool]]:
    """(query, passage, whether it is relevant) of all judgements."""
    every = [query for some in queries.values() for query in some]
    return {(q.id, passage, grade > 0) for q in every for passage, grade in q.judgements.items()}


def qrels(contents: dict[str, bytes], layout: str) -> Iterator[tuple[str, str, bool]]:
    """The same, of the files."""
    for content in (content for name, content in contents.items() if "qrels" in name):
        for i, line in enumerate(lines_of(content)):
            cells: Sequence[str] = line.split() if layout == "MS MARCO" else line.split("\t")
            if layout == "MS MARCO":
                cells = cells[0], *cells[2:]
            if i or tuple(cells) != ("query-id", "corpus-id", "score"):
                yield cells[0], cells[1], int(cells[2]) > 0


@pytest.mark.parametrize("form", ["txt", "jsonl"])
@QUICK
@given(seed=SEEDS)
def test_predictions_are_read_as_they_stand_or_refused_in_a_line(form, seed, collection):
    dice = random.Random(seed)
    ids = collection.ids.to_pylist()
    objects = (json.dumps({"id": key, "predicted_queries": [f"é {key}", "who?"]}) for key in ids)
    lines = objects if form == "jsonl" else (f"é {key}\twho?" for key in ids)
    written, contents = damaged({f"sample.{form}": "".join(f"{line}\n" for line in lines)}, dice)
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = (
            write(Path(temporary) / "in", written),
            QueryShards(Path(temporary) / "shards", len(ids), 40),
        )
        try:
            opened = open_predictions(folder)
            opened.prepare(collection, shards)
            made = opened.queries(collection, shards, range(shards.count), lambda *_, **__: None)
            made = [queries for part in made for queries in part]
        except UserError as error:
            check_error(error, folder)
            return
    (content,) = contents.values()
    rows = [raw.decode().removeprefix("\ufeff").removesuffix("\r") for raw in content.split(b"\n")]
    rows = rows if rows[-1] else rows[:-1]
    if form == "txt":
        assert made == [line.split("\t") for line in rows]
        return
    expected: dict[str, list[str]] = {key: [] for key in ids}
    for record in map(json.loads, filter(None, rows)):
        expected[str(record["id"])] += record["predicted_queries"]
    assert made == [expected[key] for key in ids]


@QUICK
@given(seed=SEEDS)
def test_runs_are_read_as_they_stand_or_refused_in_a_line(seed):
    text = "".join(f"q{q} Q0 d{d} {d} {9.5 - d} tag\n" for q in range(2) for d in range(3))
    written, contents = damaged({"a.run": text}, random.Random(seed))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(Path(temporary), written)
        try:
            found = read_run(next(folder.iterdir()))
        except UserError as error:
            check_error(error, folder)
            return
    (content,) = contents.values()
    rows = [cells for line in lines_of(content) if (cells := line.split())]
    assert {(q, d, score) for q, some in found.items() for d, score in some} == {
        (cells[0], cells[2], float(cells[4])) for cells in rows
    }
