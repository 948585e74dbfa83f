"""Runs and relevance judgements (qrels) in TREC's file formats, which every evaluator reads.

run      qid Q0 docid rank score tag      a line for each passage of a ranked list
qrels    qid 0 docid grade                a line for each judged passage
"""

import array
import gzip
import itertools
import operator
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TypeVar

import numpy as np

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.storage import atomic_write

RankedList = list[tuple[str, float]]
"""(passage id, score) of each retrieved passage, best first, no passage twice."""
Run = dict[str, RankedList]
"""Query id -> the ranked list of that query."""
Qrels = dict[str, dict[str, int]]
"""Query id -> passage id -> grade; a passage is relevant if its grade is above 0."""

_N = TypeVar("_N", int, float)
_COLUMNS = ("qid", "Q0", "docid", "rank", "score", "tag")
_HINT = "correct this line, or write the run again with `retrieval-jax search`"


def drop_identical_ids(run: Run, queries: set[str]) -> Run:
    """Removes the passage with a query's own id from the query's ranked list, as BEIR's evaluation does.

    Args:
      run: the run.
      queries: ids of the queries that are passages; the lists of other queries stay as they are.

    Returns:
      The changed run.
    """
    return run | {
        query: [result for result in run[query] if result[0] != query] for query in run.keys() & queries
    }


def format_run(path: str | os.PathLike, run: Run, tag: str) -> bytes:
    """Returns the content of a run's file; a query without results has no line.

    The order of each list is the ranking. Evaluators ignore the rank and sort by score, and trec_eval holds
    scores as float32 and breaks ties by docid. The written scores therefore strictly decrease even as
    float32: a score that, as float32, is not below the score before it is replaced by the next smaller
    float32. All other scores are written so that they read back as the same float64.

    Args:
      path: the file, for messages.
      run: the run.
      tag: the name of the system, for the last column.

    Raises:
      UserError: an id or the tag is empty or has whitespace, a passage is twice in a list, a score is not a
        finite float32.
    """
    _check_word(path, "tag", tag)
    lines = []
    for qid, results in run.items():
        _check_word(path, "query id", qid)
        seen: set[str] = set()
        for pid, _ in results:
            _check_word(path, "passage id", pid)
            if pid in seen:
                raise UserError(
                    f"{path}: passage {pid!r} is ranked twice for query {qid!r}: keep the best rank"
                )
            seen.add(pid)
        scores = _strictly_decreasing(path, qid, [score for _, score in results])
        written = [(pid, score) for (pid, _), score in zip(results, scores, strict=True)]
        lines += run_lines(qid, written, tag)
    return "".join(lines).encode()


def run_lines(qid: str, results: Iterable[tuple[str, float]], tag: str) -> list[str]:
    """Returns the lines of a query in a run, with these scores: they read back as the same float64.

    Args:
      qid: the query's id.
      results: its ranked (passage id, score), best first.
      tag: the name of the system.
    """
    ranked = enumerate(results, start=1)
    return [f"{qid} Q0 {pid} {rank} {float(score)!r} {tag}\n" for rank, (pid, score) in ranked]


def read_run(path: str | os.PathLike) -> Run:
    """Reads a run of any tool.

    The order is that of the scores. As trec_eval does, this ignores the rank column (BEIR writes 0 in every
    line) and the order of the lines, holds scores as float32, and breaks ties by docid, the greater docid
    first. No scores tie in a run of `format_run`. Where a query's ranks, if they all differ, tell another
    order than its scores, a line on the console says so.

    Args:
      path: the file, plain or `.gz`.

    Returns:
      The run: queries in the file's order, each list ranked by score.

    Raises:
      UserError: the file cannot be read, or a line has another number of columns, a rank or score that is not
        a number, or a passage a second time. The message names the line.
    """
    found: dict[str, dict[str, float]] = {}
    ranks: dict[str, array.array] = {}  # in the order of the passages in `found`
    for where, qid, pid, rank, score in _run_rows(path):
        results = found.setdefault(qid, {})
        _check_new(pid, results.keys(), qid, where)
        results[pid] = score
        ranks.setdefault(qid, array.array("d")).append(rank)
    run = {qid: by_score(results) for qid, results in found.items()}
    if differ := sum(_ranked_otherwise(found[qid], ranks[qid], run[qid]) for qid in run):
        log(
            f"{path}: the ranks of {differ:,} of {len(run):,} queries tell another order than the scores: "
            "the scores count, and equal scores are in the order of docids, as in trec_eval"
        )
    return run


def iterate_run(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, float]]]:
    """Reads a run one query after the other, as its lines are: for files that memory may not hold.

    Args:
      path: the file, plain or `.gz`, with the lines of each query together.

    Yields:
      (query id, {passage id: score}), in the file's order.

    Raises:
      UserError: see `read_run`; or a query's lines are not together.
    """
    seen: set[str] = set()
    for qid, rows in itertools.groupby(_run_rows(path), key=operator.itemgetter(1)):
        results: dict[str, float] = {}
        for where, _, pid, _, score in rows:
            if qid in seen:
                raise UserError(f"{where}: query {qid!r} again, after others: sort the lines by query")
            _check_new(pid, results.keys(), qid, where)
            results[pid] = score
        seen.add(qid)
        yield qid, results


def _run_rows(path: str | os.PathLike) -> Iterator[tuple[str, str, str, int, float]]:
    """Yields ("file:line", query id, passage id, rank, score) of each line of a run."""
    for where, (qid, _, pid, rank, score, _) in _rows(path):
        number = _number(int, rank, where, "rank", "a whole number")
        yield where, qid, pid, number, _number(float, score, where, "score", "a finite number")


def by_score(results: Mapping[str, float]) -> RankedList:
    """Returns the ranked list of {passage id: score}, in the order of `read_run`."""
    by_docid = sorted(results.items(), reverse=True)
    with np.errstate(over="ignore"):
        return sorted(by_docid, key=lambda result: -np.float32(result[1]))


def _ranked_otherwise(passages: Iterable[str], ranks: Sequence[float], ranked_list: RankedList) -> bool:
    """Returns whether a query's ranks, if they all differ, tell another order than its scores."""
    if len(set(ranks)) < len(ranks):
        return False
    ordered = [pid for _, pid in sorted(zip(ranks, passages, strict=True))]
    return ordered != [pid for pid, _ in ranked_list]


def write_qrels(path: str | os.PathLike, qrels: Qrels) -> None:
    """Writes qrels; a query without judgements writes no line. The file appears whole or not at all.

    Args:
      path: the file; one in `.gz` is compressed.
      qrels: the relevance judgements.

    Raises:
      UserError: an id is empty or has whitespace, or the path cannot be written.
    """
    lines = []
    for qid, grades in qrels.items():
        _check_word(path, "query id", qid)
        for pid, grade in grades.items():
            _check_word(path, "passage id", pid)
            lines.append(f"{qid} 0 {pid} {int(grade)}\n")
    atomic_write(path, "".join(lines).encode())


def _strictly_decreasing(path: str | os.PathLike, qid: str, scores: list[float]) -> list[float]:
    """Returns the scores as `format_run` writes them."""
    written: list[float] = []
    limit = float(np.finfo(np.float32).max)
    for score in map(float, scores):  # numpy's own scalars print as "np.float32(1.0)"
        if abs(score) <= limit and written and np.float32(score) >= np.float32(written[-1]):
            with np.errstate(over="ignore"):  # below the smallest float32: refused next
                score = float(np.nextafter(np.float32(written[-1]), np.float32(-np.inf)))
        if not abs(score) <= limit:  # also true of NaN
            raise UserError(
                f"{path}: score {score!r} for query {qid!r} is not a finite float32: leave such results out"
            )
        written.append(score)
    return written


def _rows(path: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """Yields ("file:line", fields) of each line that is not blank, with a run's number of fields."""
    opener = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opener(paths.ensure_local(path), "rb") as file:
            # Bytes, line by line, so that a decoding error knows its line.
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                try:
                    fields = line.decode("utf-8").removeprefix("\ufeff").split()
                except UnicodeDecodeError:
                    raise UserError(f"{where}: not UTF-8 text: {_HINT}") from None
                if fields and len(fields) != len(_COLUMNS):
                    raise UserError(
                        f"{where}: {len(fields)} columns where a TREC run has {len(_COLUMNS)} "
                        f"({' '.join(_COLUMNS)}): {_HINT}"
                    )
                if fields:
                    yield where, fields
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path of the TREC run") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: a cut or damaged .gz
        raise UserError(f"{path}: cannot be read ({error}): check the path of the TREC run") from None


def _number(kind: type[_N], text: str, where: str, column: str, expected: str) -> _N:
    try:
        number = kind(text) if text.isascii() and "_" not in text else None  # Python's own ways to write them
    except ValueError:
        number = None
    if number is None or not -1e308 < number < 1e308:
        raise UserError(f"{where}: {column} {text!r} is not {expected}: {_HINT}")
    return number


def _check_new(pid: str, seen: Set[str], qid: str, where: str) -> None:
    if pid in seen:
        raise UserError(f"{where}: passage {pid!r} a second time for query {qid!r}: {_HINT}")


def _check_word(path: str | os.PathLike, what: str, word: str) -> None:
    if word.split() != [word]:
        raise UserError(
            f"{path}: {what} {word!r} is empty or has whitespace, which TREC files cannot hold: rename it"
        )
