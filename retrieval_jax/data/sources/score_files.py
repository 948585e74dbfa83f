"""Scores of (query, passage) pairs, as other tools write them. The first line tells the form of a file.

    {"q1": {"p1": 3.5, …}, …}                  JSON, or JSONL with one query or more a line (RIPOR, PAG)
    {"qid": …, "docids": […], "scores": […]}   JSONL (RIPOR's lists)
    {"query_id": …, "positive_passages": [{"docid": …, "score": …}], "negative_passages": […]}    Tevatron
    q Q0 p rank score tag                      a TREC run
    q p score                                  TSV
    q positive negative score score            TSV: of the positive, of the negative
    {"qid": …, "pos": […], "neg": {system: [p, …]}}    JSONL of sentence-transformers: negatives, no scores

Any file may be in .gz. Ids may be whole numbers in JSON. Pickles are refused: to read one can run anything.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.sources import lines, tsv
from retrieval_jax.data.sources.json_objects import json_id, json_object
from retrieval_jax.data.sources.lines import ErrorLog, LineError, ParseError, format_error

Pair = tuple[str, str, float]  # query, passage, score; NaN where the form has none
_AT_ONCE = 1 << 17  # pairs whose passages are looked up together
_LARGEST = 3.4028235e38  # of float32
_HEAD = 1 << 20  # bytes of the first line by which the form of a file is told
_TABLES = {3: ("query", "passage", "score"), 6: ("query", "Q0", "passage", "rank", "score", "tag")}
_TABLES[5] = ("query", "positive", "negative", "positive's score", "negative's score")
_HINT = "write one of the forms that `retrieval-jax score --help` lists"


@dataclasses.dataclass(frozen=True)
class ScoreFile:
    """What a file of scores holds of the queries of a collection.

    Attributes:
      has_scores: whether there are scores; otherwise the passages are negatives, hardest first.
      scores: query id -> passage id -> score, NaN where there are none.
    """

    has_scores: bool
    scores: dict[str, dict[str, float]]


def read(path: str | Path, collection: Collection, errors: ErrorLog) -> ScoreFile:
    """Reads the scores of pairs of a collection's queries, of any split, and its passages.

    Args:
      path: the file, local or remote.
      collection: the collection.
      errors: receives the bad lines. A line is bad if it cannot be parsed, a score is no finite number, an id
        is unknown or a pair has another score than on an earlier line.

    Raises:
      UserError: the file cannot be read, has no known form or nothing in it, or a line is bad and `errors`
        does not skip.
    """
    named, path = path, paths.ensure_local(paths.as_path(path))
    text = _first_line(path)
    parse, header = _form(path, text)
    if text.strip() == "{":  # the object is written over several lines
        parsed = lines.parse_whole(path, parse, errors)
    else:
        parsed = lines.parse_lines(path, parse, errors, header)
    pairs = ((line, pair) for line, some in parsed for pair in some)
    scores = _checked(path, pairs, collection, errors)
    errors.raise_first()
    if not scores:
        raise UserError(format_error(named, None, "there are no scores of this collection's queries", _HINT))
    return ScoreFile(parse is not _negatives, scores)


def _first_line(path: Path) -> str:
    """Returns the first line that is not blank, by which the form is told. Raises UserError for a pickle."""
    raw = lines.first_line(path, _HEAD)
    if raw.startswith(b"\x80") or {".pkl", ".pickle"} & {*path.suffixes}:
        raise UserError(
            f"{path}: a pickle, which can run any program when it is read: if you trust it, write JSON: "
            "json.dump(pickle.load(open(…, 'rb')), open('scores.json', 'w'), default=float)"
        )
    return lines.text_of(raw.decode(errors="ignore").encode())


def _form(path: Path, text: str) -> tuple[Callable[[str], list[Pair]], str]:
    """Returns how the lines of a file are parsed, by its first line, and that line if it is a header."""
    if text.lstrip().startswith("{"):
        forms = (parse for keys, parse in _OBJECTS.items() if all(f'"{key}"' in text for key in keys))
        return next(forms, _queries), ""
    cells = text.split()
    if len(cells) not in _TABLES:
        what = f"no form of scores is known with {len(cells)} columns" if cells else "there is nothing in it"
        raise UserError(format_error(path, 1, what, _HINT))
    header = text if cells[0].lower() in ("query", *tsv.NAMES["_id"]) and not _is_number(cells[-1]) else ""
    tsv.say_header(path, header)
    return _row_parser(_TABLES[len(cells)]), header


def _checked(
    path: Path, pairs: Iterable[tuple[int, Pair]], collection: Collection, errors: ErrorLog
) -> dict[str, dict[str, float]]:
    """Collects the pairs of known queries and passages."""
    splits = [split for split, count in collection.query_counts.items() if count]
    queries = {query.id for split in splits for query in collection.queries(split)}
    found: dict[str, dict[str, float]] = {}
    pairs = iter(pairs)
    while some := list(itertools.islice(pairs, _AT_ONCE)):
        known = collection.find_rows([passage for _, (_, passage, _) in some]) >= 0
        for (line, (query, passage, score)), is_known in zip(some, known.tolist(), strict=True):
            hint = "take it out of the file, or name the collection that it is of"
            if query not in queries:
                what = f"query {query[:80]!r} is unknown"
                errors.add(LineError(path, line, "unknown query", what, hint))
            elif not is_known:
                what = f"passage {passage[:80]!r} is unknown"
                errors.add(LineError(path, line, "unknown passage", what, hint))
            else:
                of_query = found.setdefault(sys.intern(query), {})
                earlier = of_query.setdefault(sys.intern(passage), score)
                if earlier != score and not math.isnan(score):
                    what = f"query {query[:80]!r} and passage {passage[:80]!r} had another score before"
                    errors.add(LineError(path, line, "another score", what, "keep just one"))
        errors.raise_first()
    return found


def _row_parser(fields: Sequence[str]) -> Callable[[str], list[Pair]]:
    """Makes the parser of the rows of a table, whose columns white space separates."""

    def parse(text: str) -> list[Pair]:
        cells = text.split()
        if len(cells) != len(fields):
            what = f"{len(cells)} columns instead of {len(fields)}"
            raise ParseError("wrong columns", what, f"write {', '.join(fields)}")
        if len(fields) == 5:
            query, positive, negative, *scores = cells
            return [(query, positive, _number(scores[0])), (query, negative, _number(scores[1]))]
        query, *_, passage, score = cells if len(fields) == 3 else (cells[0], cells[2], cells[4])
        return [(query, passage, _number(score))]

    return parse


def _queries(text: str) -> list[Pair]:
    """Parses {query: {passage: score}}."""
    record = json_object(text, ("query ids", "their {passage id: score}"))
    pairs = []
    for query, of_query in record.items():
        if not isinstance(of_query, dict):
            raise _bad(f"{query[:80]!r} is not followed by {{passage id: score}}")
        pairs += [(query, passage, _number(score)) for passage, score in of_query.items()]
    return pairs


def _ranked(text: str) -> list[Pair]:
    """Parses {"qid", "docids", "scores"}."""
    record = json_object(text, ("qid", "docids", "scores"))
    query, ids, scores = json_id(record.get("qid")), _list(record, "docids"), _list(record, "scores")
    if len(ids) != len(scores):
        raise _bad(f"{len(ids)} docids have {len(scores)} scores")
    return [(query, json_id(passage), _number(score)) for passage, score in zip(ids, scores, strict=True)]


def _tevatron(text: str) -> list[Pair]:
    """Parses Tevatron's line; passages without a score are left out."""
    record = json_object(text, ("query_id", "positive_passages", "negative_passages"))
    query = json_id(record.get("query_id"))
    passages = [*_list(record, "positive_passages"), *_list(record, "negative_passages")]
    if not all(isinstance(passage, dict) for passage in passages):
        raise _bad("a passage is not an object")
    return [(query, json_id(p.get("docid")), _number(p["score"])) for p in passages if "score" in p]


def _negatives(text: str) -> list[Pair]:
    """Parses {"qid", "pos", "neg": {system: [passage, …]}}: the first of each system first."""
    record = json_object(text, ("qid", "pos", "neg"))
    query, systems = json_id(record.get("qid")), record.get("neg")
    if not isinstance(systems, dict):
        raise _bad("'neg' is not {system: [passage ids]}")
    in_turn = itertools.zip_longest(*(_list(systems, system) for system in systems))
    passages = (json_id(passage) for some in in_turn for passage in some if passage is not None)
    return [(query, passage, math.nan) for passage in dict.fromkeys(passages)]


_OBJECTS = {
    ("qid", "neg"): _negatives,
    ("qid", "docids", "scores"): _ranked,
    ("query_id", "positive_passages"): _tevatron,
}
"""Keys of the first line -> the parser of the file's lines."""


def _list(record: dict, field: str) -> list:
    values = record.get(field, [])
    if not isinstance(values, list):
        raise _bad(f"{field[:80]!r} is not a list")
    return values


def _bad(what: str) -> ParseError:
    return ParseError("bad JSON", f"the JSON is wrong ({what})", _HINT)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text  # Python's own ways to write them


def _number(value: object) -> float:
    """Returns a score. Raises ParseError unless it is a finite float32."""
    number = float(value) if isinstance(value, str) and _is_number(value) else value
    if type(number) not in (int, float) or not abs(number) <= _LARGEST:  # also true of NaN
        what = f"the score {str(value)[:80]!r} is not a finite number"
        raise ParseError("bad score", what, "write a number, or leave the pair out")
    return float(number)
