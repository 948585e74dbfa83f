"""Mining hard negatives: what a searcher finds for queries, as far as it does not answer them."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from retrieval_jax.core import storage
from retrieval_jax.core.progress import bar
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.mined import Chosen, NegativesRule, choose_negatives
from retrieval_jax.data.scores import ScoredRows
from retrieval_jax.search.batched import BATCH_SIZE
from retrieval_jax.search.searcher import RankedList, Searcher, check_scores

if TYPE_CHECKING:  # a searcher without a model mines without importing Flax and Orbax
    from retrieval_jax.search.prefixes import PrefixSearch

SCORES_SHOWN = 1 << 17  # about so many scores of a split are kept for the quantiles

Teacher = Callable[[Sequence[Query], Sequence[Sequence[str]]], Sequence[Mapping[str, float]]]
"""(queries, passage ids for each) -> for each query passage id -> score, NaN or missing where it has none."""


@dataclasses.dataclass(frozen=True)
class Miner:
    """Finds hard negatives of a collection's queries.

    Attributes:
      collection: the collection.
      finder: finds the passages: a searcher, or what the beams of one hold at given lengths.
      depth: passages to find for each query.
    """

    collection: Collection
    finder: "Searcher | PrefixSearch"
    depth: int

    def mine(
        self,
        queries: Sequence[Query],
        rows: Sequence[int],
        rule: NegativesRule,
        description: str,
        teacher: Teacher | None = None,
    ) -> Iterator[Chosen]:
        """Mines for some queries of a split, BATCH_SIZE at a time, with a progress bar.

        Args:
          queries: all queries whose positives are known; those of one text share them.
          rows: which of them to mine for.
          rule: which passages become negatives.
          description: what the progress bar says.
          teacher: gives the scores that the rule reads; None for the searcher's own.

        Yields:
          The negatives of each query. Of more than SCORES_SHOWN scores in all, a part is given, and none of
          prefixes without a teacher, as those of different lengths do not compare.
        """
        answers, first_copies = KnownAnswers(queries), self.collection.first_ids
        every = math.ceil(rule.limit * len(queries) / SCORES_SHOWN)
        comparable = teacher or isinstance(self.finder, Searcher)
        with bar(description, len(rows)) as advance:
            for first in range(0, len(rows), BATCH_SIZE):
                batch = [queries[row] for row in rows[first : first + BATCH_SIZE]]
                others = [answers.others(query, None) for query in batch]
                found = self._find(batch, others)
                scores: Sequence[Mapping[str, float] | None] = [None] * len(batch)
                if teacher:
                    scores = teacher(batch, [_candidates(*pair) for pair in zip(batch, found, strict=True)])
                for query, *known in zip(batch, found, others, scores, strict=True):
                    ranked_list, other_positives, of_teacher = known
                    chosen = choose_negatives(
                        query, ranked_list, rule, other_positives, first_copies, of_teacher
                    )
                    start = int(storage.hash_fraction(query.id) * every)  # each rank is shown as often
                    yield chosen._replace(scores=chosen.scores[start::every] if comparable else [])
                advance(len(batch))

    def _find(self, batch: Sequence[Query], others: Sequence[Sequence[str]]) -> Sequence[RankedList]:
        if isinstance(self.finder, Searcher):
            return self.finder.search([query.text for query in batch], self.depth)
        left_out = [{*query.positives, *some} for query, some in zip(batch, others, strict=True)]
        return self.finder.search(batch, self.depth, left_out)


def _candidates(query: Query, ranked_list: RankedList) -> list[str]:
    """Returns the passages that a teacher scores: those that were found, and the positives."""
    return [*dict.fromkeys([*(passage for passage, _ in ranked_list), *query.positives])]


def searcher_as_teacher(searcher: Searcher, name: str) -> Teacher:
    """Makes a teacher of a searcher.

    Args:
      searcher: the searcher.
      name: what people call it.

    Raises:
      UserError: it cannot score passages that another searcher found.
    """
    check_scores(type(searcher), name, "mine.teacher")

    def score(queries: Sequence[Query], candidates: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        scores = searcher.score([query.text for query in queries], candidates)
        return [
            dict(zip(ids, of_query, strict=True)) for ids, of_query in zip(candidates, scores, strict=True)
        ]

    return score


def scores_as_teacher(scores: ScoredRows, collection: Collection) -> Teacher:
    """Makes a teacher of scores on disk: a passage has the score of its text.

    Args:
      scores: the scores, of the same queries.
      collection: the collection.
    """
    first_copies = collection.first_ids

    def score(queries: Sequence[Query], candidates: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        found = []
        for query, passages in zip(queries, candidates, strict=True):
            of_text = scores[query.id].by_text()
            ids = collection.ids.take(pa.array(of_text.keys(), pa.int64())).to_pylist()
            known = dict(zip(ids, of_text.values(), strict=True))
            found.append({p: known.get(first_copies.get(p, p), math.nan) for p in passages})
        return found

    return score
