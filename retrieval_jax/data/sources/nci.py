"""Natural Questions and TriviaQA as NCI (Neural Corpus Indexer) prepares them.

    NQ_doc_content.tsv        document, -, -, title + abstract + content, -, -, language
    nq_SPLIT_doc_newid.tsv    query, NQ's own id, document, cluster id(s)
    Trivia_doc_content.tsv    TriviaQA's own id, document, title, content, title + content
    train.tsv dev.tsv test.tsv    query, TriviaQA's own ids, documents, cluster ids (each joined by commas)

Cells with a quote are in quotes where pandas wrote the file (see `tsv.unquoted`). A first line that names
the columns (docid, text, query and the like, see `tsv.NAMES`) is left out. A query's rows are joined; it is
named by its split and first line, as in `dev-17`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Set
from pathlib import Path

from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources import lines, tsv
from retrieval_jax.data.sources.folders import (
    Source,
    find_file,
    find_splits,
    folder_name,
    line_passages,
    source_error,
)
from retrieval_jax.data.sources.judged import FindRows
from retrieval_jax.data.sources.lines import ErrorLog, LineError, ParseError
from retrieval_jax.data.sources.tsv import columns, header_of, unquoted

_NQ = ("document", "-", "-", "text", "-", "-", "language")
_TRIVIA = ("original id", "document", "title", "content", "title + content")
_QUERY_COLUMNS = {0: "text", 2: "_id"}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The folders of one of the two; see `Layout`."""

    name: str
    marker: str  # the file of its passages
    queries: str
    splits: Callable[[Path], dict[str, Path]]
    parse_passage: Callable[[str], list[Passage]]
    columns: Mapping[int, str]  # of its passages, by which a header is known

    @property
    def needs(self) -> str:
        return f"{self.marker}, {self.queries}"

    def matches(self, files: Set[str]) -> bool:
        """See `Layout.matches`."""
        return self.marker in files

    def open_folder(self, folder: Path) -> Source:
        """See `Layout.open_folder`."""
        passages, splits = find_file(folder, self.marker), self.splits(folder)
        if not splits:
            raise source_error(
                folder / self.queries, "there are no queries", "add the file of at least one split"
            )
        return Source(
            folder_name(folder),
            (passages, *splits.values()),
            functools.partial(
                line_passages, [passages], self.parse_passage, header=header_of(passages, self.columns)
            ),
            functools.partial(_read, splits),
        )


def _read(splits: Mapping[str, Path], rows: FindRows, errors: ErrorLog) -> dict[str, list[Query]]:
    queries = {}
    for split, path in splits.items():
        header = header_of(path, _QUERY_COLUMNS)
        tsv.say_header(path, header)
        parsed = lines.parse_lines(path, _query, errors, header)
        found = [(line, text, key) for line, (text, keys) in parsed for key in keys]
        known = rows([key for _, _, key in found]) >= 0
        joined: dict[str, Query] = {}
        for (line, text, key), is_known in zip(found, known.tolist(), strict=True):
            query = joined.setdefault(text, Query(f"{split}-{line}", text, {}, missing={}))
            if is_known:
                query.positives[key] = 1
            else:
                query.missing[key] = 1
                what = f"document {key[:80]!r} is unknown"
                errors.add(LineError(path, line, "unknown passage", what, "add it, or remove this line"))
        errors.raise_first()
        if not joined:
            raise source_error(path, "there are no queries", "write one query a line")
        queries[split] = list(joined.values())
    return queries


def _nq_passage(text: str) -> list[Passage]:
    key, _, _, body, *_ = columns(text, _NQ)
    return [Passage(key, "", unquoted(body))]


def _trivia_passage(text: str) -> list[Passage]:
    _, key, title, body, _ = columns(text, _TRIVIA)
    return [Passage(key, unquoted(title), unquoted(body))]


def _query(text: str) -> tuple[str, list[str]]:
    query, *columns = text.split("\t")
    if len(columns) < 3:
        what = f"{len(columns) + 1} tab-separated columns instead of 4 or more"
        raise ParseError("wrong columns", what, "write query, original id, document, cluster id")
    return unquoted(query), columns[1].split(",")


def _nq_splits(folder: Path) -> dict[str, Path]:
    return {split: file for split, (file, _) in find_splits(folder, "nq_SPLIT_doc_newid.tsv").items()}


def _trivia_splits(folder: Path) -> dict[str, Path]:
    there = {file.name.removesuffix(".gz") for file in folder.iterdir()}
    return {
        split: find_file(folder, f"{split}.tsv")
        for split in ("train", "dev", "test")
        if f"{split}.tsv" in there
    }


NQ = _Layout(
    "NCI's NQ", "NQ_doc_content.tsv", "nq_SPLIT_doc_newid.tsv", _nq_splits, _nq_passage, {0: "_id", 3: "text"}
)
TRIVIA = _Layout(
    "NCI's TriviaQA",
    "Trivia_doc_content.tsv",
    "SPLIT.tsv",
    _trivia_splits,
    _trivia_passage,
    {1: "_id", 3: "text"},
)
