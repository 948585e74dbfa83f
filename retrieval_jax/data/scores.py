"""A teacher's scores of (query, passage) pairs, from which a retriever learns to rank, and their files.

    scores/NAME/manifest.json
    scores/NAME/run.train.trec      query Q0 passage rank score TAG: TREC runs, best first, the positives of
    scores/NAME/run.dev.trec        each query among them; the second one where there are dev queries

`verbs/score.py` makes them. A teacher is a searcher of the project, or what somebody else's file holds.
"""

import array
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data import trec
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.distribution import describe
from retrieval_jax.data.query_folder import QueryFolder

VERB = "score"
_AT_ONCE = 1 << 20  # ids whose rows are looked up together


@dataclasses.dataclass(frozen=True)
class ScoredPassages:
    """The passages that a teacher scored for one query, best first.

    Attributes:
      rows_P: int64, their rows in the collection.
      first_rows_P: int64, for each the first row whose passage has the same text.
      scores_P: float32.
    """

    rows_P: np.ndarray
    first_rows_P: np.ndarray
    scores_P: np.ndarray

    def by_text(self) -> dict[int, float]:
        """The score of each text, by the first row that has it; of copies, the highest one."""
        return dict(zip(self.first_rows_P[::-1].tolist(), self.scores_P[::-1].tolist(), strict=True))


class ScoredRows:
    """The passages that a teacher scored, by query; one array holds those of all queries.

    Args:
      collection: the collection.
      scores: (query id, {passage id: score}) of each query, best first.
    """

    def __init__(self, collection: Collection, scores: Iterable[tuple[str, Mapping[str, float]]]):
        self.number: dict[str, int] = {}  # of each query
        counts, ids, rows, values = [0], [], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for query, of_passages in scores:
            self.number[query] = len(self.number)
            counts.append(len(of_passages))
            ids += of_passages
            values.append(np.fromiter(of_passages.values(), np.float32, len(of_passages)))
            if len(ids) > _AT_ONCE:
                rows.append(collection.find_rows(ids))
                ids = []
        rows.append(collection.find_rows(ids))
        self.starts = np.cumsum(counts, dtype=np.int64)
        self.rows, self.scores = np.concatenate(rows), np.concatenate(values)
        self.first_rows = collection.first_copies(self.rows)

    def __getitem__(self, query: str) -> ScoredPassages:
        """Gives the scored passages of the query with this id, none where the teacher scored none."""
        i = self.number.get(query)
        some = slice(0) if i is None else slice(self.starts[i], self.starts[i + 1])
        return ScoredPassages(self.rows[some], self.first_rows[some], self.scores[some])


class TeacherScores(QueryFolder):
    """The scores of a finished folder `scores/NAME`."""

    verb, file = VERB, "run.{split}.trec"

    @property
    def scored_by(self) -> dict[str, str] | None:
        """The searcher that gave the scores: {"kind"}, and of a generative one {"score": its model's}.

        None where they were read from a file, whose scores may be anything.
        """
        return self.recipe.get("scored_by")

    def by_row(self, collection: Collection, split: str = "train") -> ScoredRows:
        """Reads the scores of all queries of a split, as `read` does, into arrays."""
        return ScoredRows(collection, self.read(collection, split))

    def read(self, collection: Collection, split: str = "train") -> Iterator[tuple[str, dict[str, float]]]:
        """Reads the scores of one query after the other.

        Args:
          collection: the collection.
          split: train or dev. There may be none for dev.

        Yields:
          (query id, {passage id: score}), best first.

        Raises:
          UserError: they were made for another collection, or the file is missing or damaged.
        """
        if (path := self.local_file(collection, split)) is None:
            return
        yield from trec.iterate_run(path)


def first_of_run(path: Path, collection: Collection, queries: Set[str], depth: int) -> ScoredRows:
    """Reads the first passages of some queries' lists of a run; the other lines are never in memory together.

    Args:
      path: the run, with the lines of each query together.
      collection: the collection.
      queries: ids of queries.
      depth: how many passages of each of them, at most.

    Raises:
      UserError: see `trec.iterate_run`; or one of the passages is not in the collection.
    """

    def lists() -> Iterator[tuple[str, dict[str, float]]]:
        for query, results in trec.iterate_run(path):
            if query in queries:
                yield query, dict(trec.by_score(results)[:depth])

    found = ScoredRows(collection, lists())
    if (found.rows < 0).any():
        ids = itertools.chain.from_iterable(results for _, results in lists())
        unknown = next(itertools.compress(ids, found.rows < 0))
        raise UserError(
            f"{path}: passage {unknown!r} is not in {collection.folder}: make the run again with "
            "`retrieval-jax search`"
        )
    return found


def candidates(
    query: Query, found: Iterable[Sequence[str]], depth: int, first_copies: Mapping[str, str]
) -> list[str]:
    """Chooses the passages of a query that a teacher is to score: its positives, then what was found for it.

    Args:
      query: the query.
      found: passage ids, hardest first, one sequence for each source.
      depth: passages of each source that count.
      first_copies: passage id -> the first passage with the same text, for passages that are a later copy.

    Returns:
      Passage ids: all positives, and of other passages with the same text, also as a positive, the first one
      that was found; never the passage that the query itself is.
    """
    chosen = {first_copies.get(passage, passage): passage for passage in query.positives}
    own = {first_copies.get(query.id, query.id)} if query.is_passage else set()
    for passage in itertools.chain.from_iterable(some[:depth] for some in found):
        original = first_copies.get(passage, passage)
        if original not in own:
            chosen.setdefault(original, passage)
    return [*dict.fromkeys([*query.positives, *chosen.values()])]


def write(
    folder: Path,
    split: str,
    scores: Iterable[tuple[str, Mapping[str, float]]],
    positives: Mapping[str, Iterable[str]],
) -> dict[str, object]:
    """Writes the scores of a split into a new folder.

    Args:
      folder: a local folder.
      split: train or dev.
      scores: (query id, {passage id: score}) of each query, each query once, in any order of the passages.
      positives: query id -> its positives, for the facts.

    Returns:
      The facts for the folder's manifest, of this split. "distribution" is that of the scores of positives
      and of the other passages.
    """
    path, queries, answered = folder / TeacherScores.file_name(split), 0, 0
    values = {"positives": array.array("f"), "others": array.array("f")}
    with path.open("w") as file:
        for query, of_passages in scores:
            ranked = sorted(of_passages.items(), key=lambda pair: -pair[1])
            file.writelines(trec.run_lines(query, ranked, VERB))
            queries += bool(ranked)
            right = {*positives.get(query, ())}
            answered += any(passage in right for passage in of_passages)
            for passage, score in ranked:
                values["positives" if passage in right else "others"].append(score)
    return {
        "fingerprint": storage.checksum(path),
        "queries": queries,
        "without_positive": queries - answered,
        "pairs": sum(map(len, values.values())),
        "distribution": {name: describe(some) for name, some in values.items()},
    }
