"""Mined hard negatives: how they are chosen, and their files, which are qrels of grade 0.

    negatives/NAME/manifest.json
    negatives/NAME/qrels.train.tsv        query, passage, 0; a query's hardest first
    negatives/NAME/qrels.dev.tsv          the same of the dev queries, if there are any: a dual encoder
                                          searches among these passages, and others, while it trains

`verbs/mine.py` makes them.
"""

import array
import dataclasses
import itertools
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrieval_jax.core import storage
from retrieval_jax.core.progress import log
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.distribution import describe, log_table
from retrieval_jax.data.query_folder import QueryFolder
from retrieval_jax.data.sources import lines, tsv

VERB = "mine"


class MinedNegatives(QueryFolder):
    """The mined negatives of a finished folder `negatives/NAME`."""

    verb, file = VERB, "qrels.{split}.tsv"

    def of_queries(self, collection: Collection, split: str = "train") -> dict[str, tuple[str, ...]]:
        """Reads the negatives of all queries of a split.

        Args:
          collection: the collection.
          split: train or dev. There may be none for dev.

        Returns:
          Query id -> passage ids, hardest first.

        Raises:
          UserError: they were mined for another collection, or the file is missing or damaged.
        """
        if (path := self.local_file(collection, split)) is None:
            return {}
        found: dict[str, list[str]] = {}
        fields = ("query", "passage", "grade")
        for _, (query, passage, _) in lines.parse_lines(
            path, lambda x: tsv.columns(x, fields), lines.ErrorLog()
        ):
            found.setdefault(query, []).append(passage)
        return {query: tuple(passages) for query, passages in found.items()}


@dataclasses.dataclass(frozen=True)
class NegativesRule:
    """Which of the passages that were found for a query become its negatives.

    Thresholds read the searcher's scores or a teacher's. A passage without a score passes none of them.

    Attributes:
      limit: the most negatives of a query; None for all.
      skip_top: passages to leave out at the top of the list.
      margin: how much lower than the query's best positive a negative must score at least. Here and with
        `relative_margin`, a query none of whose positives has a score has no negatives. None: no limit.
      relative_margin: the same as a share of that positive's score, without its sign: 0.05 is a ceiling of
        95% of a positive score (Moreira et al. 2024, section 3.3), and of 105% of a negative one.
      max_score: the highest score of a negative. None: no limit.
      sample: whether the negatives are drawn from all passages that remain; otherwise the hardest are kept.
      seed: of that draw, which depends on the query's id, too.
    """

    limit: int | None
    skip_top: int = 0
    margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    sample: bool = False
    seed: int = 0

    @property
    def reads_scores(self) -> bool:
        """Whether there is a threshold."""
        return (self.margin, self.relative_margin, self.max_score) != (None, None, None)

    def ceiling(self, best: float | None) -> float:
        """Returns the highest score that a negative may have.

        Args:
          best: the score of the query's best positive; None if none of them has a score.
        """
        ceilings = [float("inf") if self.max_score is None else self.max_score]
        if self.margin is not None:
            ceilings.append(float("-inf") if best is None else best - self.margin)
        if self.relative_margin is not None:
            ceilings.append(float("-inf") if best is None else best - self.relative_margin * abs(best))
        return min(ceilings)


class Chosen(NamedTuple):
    """The hard negatives of a query.

    Attributes:
      query: its id.
      negatives: passage ids, hardest first.
      scores: the score of each.
      positive: the score of the query's best positive; None if none of them has a score.
    """

    query: str
    negatives: list[str]
    scores: list[float]
    positive: float | None


def choose_negatives(
    query: Query,
    ranked_list: Sequence[tuple[str, float]],
    rule: NegativesRule,
    other_positives: Iterable[str] = (),
    first_copies: Mapping[str, str] = types.MappingProxyType({}),
    teacher_scores: Mapping[str, float] | None = None,
) -> Chosen:
    """Chooses the hardest passages that are not known to answer a query.

    Args:
      query: the query.
      ranked_list: (passage id, score) of the passages that were found for it, best first.
      rule: which of them to keep.
      other_positives: passages that answer the query besides its positives; see `KnownAnswers`.
      first_copies: passage id -> the first passage with the same text, for passages that are a later copy.
      teacher_scores: passage id -> the score that the rule reads, also of positives that were not found; NaN
        or missing where a passage has none. None: the scores of `ranked_list`.

    Returns:
      The negatives, in the order of `ranked_list`.
    """
    first_of = first_copies.get
    positives = {first_of(passage, passage) for passage in query.positives}
    answers = positives | {first_of(passage, passage) for passage in other_positives}
    scores = dict(ranked_list) if teacher_scores is None else teacher_scores
    of_positives = [score for passage, score in scores.items() if first_of(passage, passage) in positives]
    best = max((score for score in of_positives if not math.isnan(score)), default=None)
    allowed = (p for p, _ in ranked_list[rule.skip_top :] if first_of(p, p) not in answers)
    if rule.reads_scores:
        ceiling = rule.ceiling(best)
        allowed = (p for p in allowed if scores.get(p, math.nan) <= ceiling)
    negatives = [*itertools.islice(allowed, None if rule.sample else rule.limit)]
    if rule.sample and len(negatives) > rule.limit:
        rng = rng_of(rule.seed, query.id)
        drawn = rng.choice(len(negatives), rule.limit, replace=False)
        negatives = [negatives[place] for place in sorted(drawn.tolist())]
    return Chosen(query.id, negatives, [scores.get(passage, math.nan) for passage in negatives], best)


def choose_all(
    collection: Collection,
    queries: Sequence[Query],
    ranked_lists: Iterable[Sequence[tuple[str, float]]],
    rule: NegativesRule,
) -> Iterator[Chosen]:
    """Yields the hard negatives of each query; see `choose_negatives`.

    Args:
      collection: the collection, which knows the copies of each passage.
      queries: all queries whose positives are known; those of one text share them.
      ranked_lists: the passages that were found for each of these queries, in their order.
      rule: which of them to keep.
    """
    answers = KnownAnswers(queries)
    for query, ranked_list in zip(queries, ranked_lists, strict=True):
        others = answers.others(query, None)
        yield choose_negatives(query, ranked_list, rule, others, collection.first_ids)


def rng_of(seed: int, query_id: str) -> np.random.Generator:
    """Makes the random numbers of a query, which are the same whatever other queries draw."""
    return np.random.default_rng([seed, int(storage.hash_fraction(query_id) * 2**53)])


def write(folder: Path, split: str, chosen: Iterable[Chosen], limit: int = 1) -> dict[str, object]:
    """Writes the negatives of a split into a new folder.

    Args:
      folder: a local folder.
      split: train or dev.
      chosen: the negatives of each query. Their `scores` may be a sample.
      limit: the negatives of a query that were wanted, at least.

    Returns:
      The facts for the folder's manifest, of this split. "distribution" is that of the scores of each query's
      best positive and of the negatives.
    """
    path = folder / MinedNegatives.file_name(split)
    counts, positives, negatives = array.array("i"), array.array("f"), array.array("f")
    with path.open("w") as file:
        for query in chosen:
            file.writelines(f"{query.query}\t{passage}\t0\n" for passage in query.negatives)
            counts.append(len(query.negatives))
            negatives.extend(query.scores)
            positives.extend([] if query.positive is None else [query.positive])
    return {
        "fingerprint": storage.checksum(path),
        "queries": len(counts),
        "with_negatives": sum(map(bool, counts)),
        "fewer_than_wanted": sum(count < limit for count in counts),
        "negatives": sum(counts),
        "distribution": {"positives": describe(positives), "negatives": describe(negatives)},
    }


def log_scores(facts: Mapping, limit: int) -> None:
    """Logs how the scores are distributed, and how many queries have too few negatives.

    Args:
      facts: what `write` returned.
      limit: the negatives of a query that were wanted.
    """
    log_table(facts["distribution"], "scores, by quantile (of positives: each query's best)")
    without = facts["queries"] - facts["with_negatives"]
    log(
        f"{facts['fewer_than_wanted']:,} of {facts['queries']:,} queries have fewer than {limit} negatives, "
        f"{without:,} of them none"
    )
