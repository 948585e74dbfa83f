"""Collections on disk: folders of passages, queries and judgements (qrels), read as a stream.

There are two layouts. Any file may be compressed (`.gz`). The splits come from the names of the qrels files.

    BEIR    corpus.jsonl    queries.jsonl        qrels/SPLIT.tsv
    TSV     docs.tsv        queries.SPLIT.tsv    qrels.SPLIT.tsv

A `.jsonl` line is a JSON object; a `.tsv` line is a row without quoting, so its texts hold no tab or newline.
Both are read in three steps: `_lines` decompresses and decodes, `_rows` finds the fields of a line, and
`_passages`, `_texts` and `_positives` check them. What is wrong is a `UserError`: `FILE:LINE: what: mend`.
Nothing is repaired in silence: a collection that lost passages still trains, with metrics that are wrong.
"""

import dataclasses
import functools
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Container, Iterator
from pathlib import Path

from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.errors import UserError

_LAYOUTS = {  # name -> its passages, queries and qrels
    "BEIR": ("corpus.jsonl", "queries.jsonl", "qrels/SPLIT.tsv"),
    "TSV": ("docs.tsv", "queries.SPLIT.tsv", "qrels.SPLIT.tsv"),
}
_PASSAGE, _QUERY = ("_id", "title", "text"), ("_id", "text")
_QREL = ("query-id", "corpus-id", "score")  # also the header line that BEIR's qrels have
_SAME_SPLIT = {"validation": "dev", "valid": "dev", "val": "dev"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A collection that has been found but not yet read; `open_source` makes one from a folder.

    `name` is a dataset name ([a-z][a-z0-9_]*) and `files` are all files that are read, for fingerprints.
    `passages()` streams the passages in file order, from the start at each call. `queries(passage_ids)`, with
    the ids of those passages, reads split -> its queries that have a positive passage, in file order.
    """

    name: str
    files: tuple[Path, ...]
    passages: Callable[[], Iterator[Passage]]
    queries: Callable[[Container[str]], dict[str, list[Query]]]


def open_source(path: str | Path) -> Source:
    """Finds the files of the collection in a folder. Their contents are checked later, as they are read."""
    folder = Path(path)
    if not folder.is_dir():
        raise _fault(folder, None, "there is no such folder", "check the path")
    present = {file.name.removesuffix(".gz") for file in folder.iterdir()}
    layouts = [files for files in _LAYOUTS.values() if files[0] in present]
    if len(layouts) != 1:
        what = "the files of two layouts are here" if layouts else "neither layout is here"
        needs = "; ".join(f"{name} needs {', '.join(files)}" for name, files in _LAYOUTS.items())
        raise _fault(folder, None, what, f"have the files of exactly one, plain or .gz ({needs})")
    passages, splits = _file(folder, layouts[0][0]), _splits(folder, *layouts[0][1:])
    return Source(
        name=_dataset_name(folder),
        files=(passages, *dict.fromkeys(file for pair in splits.values() for file in pair)),
        passages=functools.partial(_passages, passages),
        queries=functools.partial(_queries, splits),
    )


def _dataset_name(folder: Path) -> str:
    """The folder's own name in snake_case, e.g. `MS MARCO-v2` -> `ms_marco_v2`, `2wiki` -> `data_2wiki`."""
    name = re.sub("[^a-z0-9]+", "_", os.path.basename(os.path.abspath(folder)).lower()).strip("_")
    return name if re.match("[a-z]", name) else f"data_{name}".rstrip("_")


def _file(folder: Path, name: str) -> Path:
    """The file of that name, plain or compressed. If both are there, which one is meant is anyone's guess."""
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.exists()]
    if len(found) != 1:
        what = "the file is here both plain and as .gz" if found else "the file is missing, as is its .gz"
        raise _fault(folder / name, None, what, "keep exactly one of the two")
    return found[0]


def _splits(folder: Path, queries_name: str, qrels_name: str) -> dict[str, tuple[Path, Path]]:
    """Split -> its queries file and its qrels file."""
    splits: dict[str, tuple[Path, Path]] = {}
    pattern = qrels_name.replace("SPLIT", "*")
    for qrels in sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")]):
        spelling = qrels.name.removesuffix(".gz").removesuffix(".tsv").removeprefix("qrels.")
        split = _SAME_SPLIT.get(spelling, spelling)
        if not re.fullmatch("[A-Za-z0-9_]+", split):
            raise _fault(qrels, None, f"{split!r} is no name for a split", "use letters, digits and _ only")
        if split in splits:
            raise _fault(qrels, None, f"{splits[split][1].name} is split {split!r} too", "keep just one")
        splits[split] = _file(folder, queries_name.replace("SPLIT", spelling)), qrels
    if not splits:
        raise _fault(folder / qrels_name, None, "there are no qrels", "add the file of at least one split")
    return splits


def _passages(path: Path) -> Iterator[Passage]:
    """Streams a passages file; the set of ids seen is all that stays in memory."""
    seen: set[str] = set()
    for line, (key, title, text) in _rows(path, _PASSAGE):
        _check_id(path, line, key, seen)
        if not (title + text).strip():
            raise _fault(path, line, f"passage {key!r} has neither title nor text", "write one, or remove it")
        seen.add(key)
        yield Passage(key, title, text)
    if not seen:
        raise _fault(path, None, "there are no passages (empty collection)", "write one passage a line")


def _queries(splits: dict[str, tuple[Path, Path]], passage_ids: Container[str]) -> dict[str, list[Query]]:
    """Joins the queries and the qrels of every split."""
    queries, all_texts = {}, {}
    for split, (queries_path, qrels_path) in splits.items():
        texts = _texts(queries_path, all_texts)
        positives = _positives(qrels_path, texts, passage_ids)
        queries[split] = [Query(key, text, positives[key]) for key, text in texts.items() if key in positives]
    return queries


def _texts(path: Path, all_texts: dict[str, str]) -> dict[str, str]:
    """Query id -> text (empty in some real collections). Splits may share a query, but not an id alone."""
    texts: dict[str, str] = {}
    for line, (key, text) in _rows(path, _QUERY):
        _check_id(path, line, key, texts)
        if all_texts.setdefault(key, text) != text:
            raise _fault(path, line, f"query {key!r} has another text in another split", "rename one of them")
        texts[key] = text
    if not texts:
        raise _fault(path, None, "there are no queries", "write one query a line")
    return texts


def _positives(path: Path, texts: Container[str], passage_ids: Container[str]) -> dict[str, dict[str, int]]:
    """Query id -> {passage id: grade > 0}. The other rows are checked like these, then left out."""
    grades: dict[tuple[str, str], int] = {}
    for line, (query, passage, grade) in _rows(path, _QREL):
        if line == 1 and (query, passage, grade) == _QREL:
            continue
        if not re.fullmatch("-?[0-9]{1,9}", grade):
            mend = f"write 1 or more if the passage is relevant (a header must be {', '.join(_QREL)})"
            raise _fault(path, line, f"the grade {grade[:80]!r} is not a whole number", mend)
        for kind, key, known in (("query", query, texts), ("passage", passage, passage_ids)):
            if key not in known:
                raise _fault(path, line, f"{kind} {key[:80]!r} is unknown", "add it, or remove this line")
        if grades.setdefault((query, passage), int(grade)) != int(grade):
            raise _fault(path, line, "an earlier line has another grade for this pair", "keep just one")
    positives: dict[str, dict[str, int]] = {}
    for (query, passage), grade in grades.items():
        if grade > 0:
            positives.setdefault(query, {})[passage] = grade
    if not positives:
        raise _fault(path, None, "no query has a positive passage", "write a qrel with a grade of 1 or more")
    return positives


def _check_id(path: Path, line: int, key: str, seen: Container[str]) -> None:
    """Ids become columns of TREC run files, which whitespace separates."""
    if key.split() != [key]:
        raise _fault(path, line, f"the id {key[:80]!r} is empty or has whitespace", "write it without spaces")
    if key in seen:
        raise _fault(path, line, f"the id {key!r} was used on an earlier line", "make every id unique")


def _rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, the values of `fields`) from a .jsonl or a .tsv file."""
    for line, text in _lines(path):
        values = _json_values(path, line, text, fields) if ".jsonl" in path.suffixes else text.split("\t")
        if len(values) != len(fields):
            what = f"{len(values)} tab-separated columns instead of {len(fields)}"
            raise _fault(path, line, what, f"write {', '.join(fields)}, with no tab or newline inside them")
        yield line, values


def _json_values(path: Path, line: int, text: str, fields: tuple[str, ...]) -> list[str]:
    """The strings under the keys `fields` of a JSON object; the title alone may be left out."""
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("it is not an object, {...}")
        values = [record.get(field, "" if field == "title" else None) for field in fields]
        for field, value in zip(fields, values, strict=True):
            if not isinstance(value, str):
                raise ValueError(f"{field!r} is {'not a string' if field in record else 'missing'}")
            value.encode()  # JSON can escape half of a surrogate pair, which no file can hold in UTF-8
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 column", "column")  # it is always line 1 of this line
        mend = f"write one JSON object a line, with strings under {', '.join(fields)}"
        raise _fault(path, line, f"the JSON is wrong ({reason})", mend) from error
    return values


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yields (line number, text without its line end) of a plain or a .gz file, without the empty lines.

    Only `\n` and `\r\n` end a line. `str.splitlines` would also cut at U+2028 and the like, which texts hold.
    """
    line = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")  # -sig: without a byte order mark
                if text := text.removesuffix("\n").removesuffix("\r"):
                    yield line, text
    except UnicodeDecodeError as error:
        raise _fault(path, line, f"the line is not UTF-8 ({error.reason})", "save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _fault(path, line + 1, f"the file is unreadable here ({error})", "restore it") from error


def _fault(path: Path, line: int | None, what: str, mend: str) -> UserError:
    """The error for a line of a file, or for the file as a whole."""
    return UserError(" ".join(f"{path}{f':{line}' if line else ''}: {what}: {mend}".splitlines()))
