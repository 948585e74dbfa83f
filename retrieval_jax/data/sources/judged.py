"""Queries with their judgements (qrels): two files for each split, which are joined and checked."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.data.sources import lines, tsv
from retrieval_jax.data.sources.lines import ErrorLog, LineError, ParseError, format_error
from retrieval_jax.data.sources.passages import check_id

FindRows = Callable[[Sequence[str]], np.ndarray]  # passage ids -> their rows, -1 where unknown
Qrel = tuple[int, str, str, int]  # line, query, passage, grade
HEADER = ("query-id", "corpus-id", "score")  # of BEIR's qrels; may be left out


@dataclasses.dataclass(frozen=True)
class Split:
    """The files of a split, and how their lines are parsed.

    Attributes:
      queries: the file of queries.
      qrels: the file of judgements.
      parse_query: a function from a line to (query id, text); it raises ParseError for a bad line.
      parse_qrel: a function from a line to (query id, passage id, grade); it raises ParseError for a bad
        line.
      header: the first line of the queries if it is a header (see `tsv.Table`); otherwise "".
    """

    queries: Path
    qrels: Path
    parse_query: Callable[[str], Sequence[str]]
    parse_qrel: Callable[[str], Sequence[str]]
    header: str = ""


def read(splits: Mapping[str, Split], rows: FindRows, errors: ErrorLog) -> dict[str, list[Query]]:
    """Reads the judged queries of all splits.

    The texts of other queries do not stay in memory. A query may be in several splits if its text is the
    same.

    Args:
      splits: split -> its files.
      rows: finds the rows of passage ids, -1 for unknown ones.
      errors: receives the bad lines.

    Returns:
      Split -> its queries, in the order of their file.

    Raises:
      UserError: a line is bad and `errors` does not skip, or a split has no query with a positive passage.
    """
    qrels = {name: list(_qrels(split, errors)) for name, split in splits.items()}
    errors.raise_first()
    judged = collections.defaultdict(set)  # a file of queries may serve several splits
    for name, split in splits.items():
        judged[split.queries, split.parse_query, split.header].update(query for _, query, _, _ in qrels[name])
    known: dict[str, str] = {}
    texts = {}
    for (path, parse, header), ids in judged.items():
        texts[path] = _texts(path, parse, header, ids, known, errors)
    errors.raise_first()
    queries = {
        name: _join(split.qrels, qrels.pop(name), texts[split.queries], rows, errors)
        for name, split in splits.items()
    }
    errors.raise_first()
    return queries


def _qrels(split: Split, errors: ErrorLog) -> Iterator[Qrel]:
    path = split.qrels
    for line, (query, passage, grade) in lines.parse_lines(path, split.parse_qrel, errors):
        if line == 1 and (query, passage, grade) == HEADER:
            continue
        if re.fullmatch("-?[0-9]{1,9}", grade):
            yield line, query, passage, int(grade)
        else:
            what = f"the grade {grade[:80]!r} is not a whole number"
            hint = f"write 1 or more if the passage is relevant (a header must be {', '.join(HEADER)})"
            errors.add(LineError(path, line, "bad grade", what, hint))


def _texts(
    path: Path, parse: Callable, header: str, wanted: set[str], known: dict[str, str], errors: ErrorLog
) -> dict[str, str]:
    """Returns query id -> text (which is empty in some real collections) of the wanted ids."""
    seen: set[str] = set()
    texts: dict[str, str] = {}

    def query(content: str) -> tuple[str, str]:
        key, text = parse(content)
        check_id(key)
        if key in seen:
            raise ParseError("duplicate id", f"the id {key!r} was used on an earlier line", "make it unique")
        seen.add(key)
        if key in wanted and known.setdefault(key, text) != text:
            what = f"query {key!r} has another text in another split"
            raise ParseError("another text", what, "rename one of them")
        return key, text

    tsv.say_header(path, header)
    for _, (key, text) in lines.parse_lines(path, query, errors, header):
        if key in wanted:
            texts[key] = text
    if not seen:
        errors.raise_first()
        raise UserError(format_error(path, None, "there are no queries", "write one query a line"))
    return texts


def _join(
    path: Path, qrels: list[Qrel], texts: dict[str, str], rows: FindRows, errors: ErrorLog
) -> list[Query]:
    """Returns the judged queries of a split. Passages with a grade of 0 or less are their negatives."""
    known = rows([passage for _, _, passage, _ in qrels]) >= 0
    grades: dict[str, dict[str, int]] = {}
    missing: dict[str, dict[str, int]] = {}
    for (line, query, passage, grade), is_known in zip(qrels, known.tolist(), strict=True):
        hint = "add it, or remove this line"
        if query not in texts:
            errors.add(LineError(path, line, "unknown query", f"query {query[:80]!r} is unknown", hint))
        elif not is_known:
            unknown = missing.setdefault(query, {})
            if grade > 0:
                unknown[passage] = grade
            errors.add(LineError(path, line, "unknown passage", f"passage {passage[:80]!r} is unknown", hint))
        elif grades.setdefault(query, {}).setdefault(passage, grade) != grade:
            what = "an earlier line has another grade for this pair"
            errors.add(LineError(path, line, "another grade", what, "keep just one"))
    queries = []
    for key, text in texts.items():
        if key not in grades and key not in missing:
            continue  # another split's
        judged = grades.get(key, {})
        positives = {passage: grade for passage, grade in judged.items() if grade > 0}
        negatives = tuple(passage for passage, grade in judged.items() if grade <= 0)
        queries.append(Query(key, text, positives, negatives, missing=missing.get(key, {})))
    if not any(query.relevant for query in queries):
        errors.raise_first()
        hint = "write a qrel with a grade of 1 or more"
        raise UserError(format_error(path, None, "no query has a positive passage", hint))
    return queries
