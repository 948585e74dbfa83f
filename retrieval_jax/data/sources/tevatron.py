"""Tevatron's JSONL: each line is a query with its positive and negative passages.

    train.jsonl         {"query_id", "query", "positive_passages": […], "negative_passages": […]}
    train.llm.jsonl     the same, judged by a language model (`train.human.jsonl`: by people)
    corpus.jsonl        {"docid", "title", "text"}; without it, the passages are those of all queries

A passage of a query is {"docid", "title", "text"}, a positive one may have a "grade" (whole number, 1 or
more); with a corpus.jsonl the "docid" is enough. A line's own "label" ("human", "llm") goes before the
file's. A split may have a file of each label, but a query only one line in a split.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources import lines
from retrieval_jax.data.sources.folders import (
    Source,
    find_file,
    folder_name,
    line_passages,
    source_error,
    split_name,
)
from retrieval_jax.data.sources.json_objects import bad_json, json_object, string
from retrieval_jax.data.sources.judged import FindRows
from retrieval_jax.data.sources.lines import ErrorLog, LineError, ParseError
from retrieval_jax.data.sources.passages import check_id

LABELS = ("human", "llm")
_LINE = ("query_id", "query", "positive_passages", "negative_passages")
_PASSAGE = ("docid", "title", "text")
CORPUS = "corpus.jsonl"


class Tevatron:
    """Tevatron's folders; see `Layout`."""

    name, needs = "Tevatron", "SPLIT.jsonl"

    def matches(self, files: Set[str]) -> bool:
        """See `Layout.matches`. Any `.jsonl` file but BEIR's is taken for a split."""
        jsonl = {file for file in files if file.endswith(".jsonl")}
        return bool(jsonl - {CORPUS}) and not files & {"queries.jsonl", "qrels"}

    def open_folder(self, folder: Path) -> Source:
        """See `Layout.open_folder`."""
        visible = (file.name for file in folder.iterdir() if not file.name.startswith("."))
        present = sorted({name.removesuffix(".gz") for name in visible})
        files: dict[str, list[tuple[Path, str]]] = {}  # split -> its files, and each one's label
        for file_name in present:
            if file_name.endswith(".jsonl") and file_name != CORPUS:
                file = find_file(folder, file_name)
                spelling, _, label = file_name.removesuffix(".jsonl").rpartition(".")
                if label not in LABELS:
                    spelling, label = file_name.removesuffix(".jsonl"), ""
                files.setdefault(split_name(file, spelling), []).append((file, label))
        judged = [file for some in files.values() for file, _ in some]
        has_corpus = CORPUS in present
        passages = (
            functools.partial(line_passages, [find_file(folder, CORPUS)], _corpus_passage)
            if has_corpus
            else functools.partial(line_passages, judged, _passages, repeats=True)
        )
        return Source(
            folder_name(folder),
            (*([find_file(folder, CORPUS)] if has_corpus else []), *judged),
            passages,
            functools.partial(_read, files, has_corpus),
        )


def _read(
    files: Mapping[str, Sequence[tuple[Path, str]]], has_corpus: bool, rows: FindRows, errors: ErrorLog
) -> dict[str, list[Query]]:
    queries = {}
    for split, some in files.items():
        seen: set[str] = set()
        queries[split] = []
        for path, label in some:
            # Without a corpus, what is wrong with a line was noted when its passages were read.
            noted = errors if has_corpus else ErrorLog()
            found = list(lines.parse_lines(path, functools.partial(_query, label), noted))
            known = iter((rows([p for _, q in found for p in (*q.positives, *q.negatives)]) >= 0).tolist())
            for line, query in found:
                unknown = {p for p in (*query.positives, *query.negatives) if not next(known)}
                if unknown:
                    what = f"passage {min(unknown)[:80]!r} is unknown"
                    noted.add(LineError(path, line, "unknown passage", what, f"add it to {CORPUS}"))
                if query.id in seen:
                    what = f"the query_id {query.id!r} was used on an earlier line of this split"
                    errors.add(LineError(path, line, "duplicate id", what, "make every id unique"))
                else:
                    queries[split].append(_without(query, unknown))
                seen.add(query.id)
        errors.raise_first()
        if not any(query.relevant for query in queries[split]):
            raise source_error(some[0][0], "no query has a positive passage", "write one query a line")
    return queries


def _without(query: Query, unknown: set[str]) -> Query:
    """The query whose positives that the collection lacks are its missing ones."""
    return dataclasses.replace(
        query,
        positives={p: grade for p, grade in query.positives.items() if p not in unknown},
        negatives=tuple(p for p in query.negatives if p not in unknown),
        missing={p: grade for p, grade in query.positives.items() if p in unknown},
    )


def _query(label: str, text: str) -> Query:
    return _record_query(json_object(text, _LINE), label)


def _record_query(record: dict, label: str) -> Query:
    key = string(record, "query_id", _LINE)
    check_id(key)
    positives = {}
    for passage in _list(record, "positive_passages"):
        grade = passage.get("grade", 1)
        if type(grade) is not int or grade < 1:
            hint = "write a whole number, 1 or more, or move it to negative_passages"
            raise ParseError(
                "bad grade", f"the grade {str(grade)[:80]!r} of a positive passage is wrong", hint
            )
        positives[sys.intern(string(passage, "docid", _PASSAGE))] = grade
    negatives = (string(passage, "docid", _PASSAGE) for passage in _list(record, "negative_passages"))
    negatives = tuple(dict.fromkeys(map(sys.intern, negatives)))
    if both := positives.keys() & set(negatives):
        what = f"passage {min(both)[:80]!r} is positive and negative"
        raise ParseError("another grade", what, "keep it in one of the two")
    own = record.get("label", label)
    if own not in ("", *LABELS):
        raise bad_json(f"the label {str(own)[:80]!r} is none of {', '.join(LABELS)}", _LINE)
    return Query(key, string(record, "query", _LINE), positives, negatives, own)


def _passages(text: str) -> list[Passage]:
    """All passages of a line, whose query must be good, too."""
    record = json_object(text, _LINE)
    _record_query(record, "")
    listed = [*_list(record, "positive_passages"), *_list(record, "negative_passages")]
    return [Passage(*(string(passage, field, _PASSAGE) for field in _PASSAGE)) for passage in listed]


def _corpus_passage(text: str) -> list[Passage]:
    record = json_object(text, _PASSAGE)
    return [Passage(*(string(record, field, _PASSAGE) for field in _PASSAGE))]


def _list(record: dict, field: str) -> list[dict]:
    found = record.get(field, [])
    if not (isinstance(found, list) and all(isinstance(passage, dict) for passage in found)):
        raise bad_json(f"{field!r} is not a list of passages", _LINE)
    return found
