"""Searching by prefixes of docids: what a generative searcher's beams hold before the docids have ended.

A model that ranks docids well may still lose the right one early, where its beams hold better prefixes of
other docids. RIPOR (Zeng et al. 2024, section 3.3) trains against what the beams hold at several lengths.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.data.mined import rng_of
from retrieval_jax.data.trec import RankedList
from retrieval_jax.search.generative import GenerativeSearcher


class PrefixSearch:
    """Finds passages by the prefixes of docids that the beams of a search hold at given lengths.

    Args:
      searcher: the searcher. Prefixes are scored as it scores docids.
      lengths: the numbers of tokens. Docids that are shorter count as they are.
      passages_per_prefix: the most passages that stand for a prefix at one length.
      seed: of the draw of these passages.

    Raises:
      UserError: there is no length, or one is longer than every docid.
    """

    def __init__(
        self,
        searcher: GenerativeSearcher,
        lengths: Sequence[int],
        passages_per_prefix: int = 1,
        seed: int = 0,
    ):
        table = searcher.table
        if bad := [length for length in lengths if not 1 <= length <= table.length]:
            raise UserError(
                f"prefix_lengths: {bad[0]}: the docids of kind {table.kind} have up to {table.length} tokens"
            )
        self.searchers = [searcher.of_prefixes(length) for length in lengths]
        self.passages_per_prefix, self.seed = passages_per_prefix, seed

    def search(self, queries: Sequence[Query], k: int, left_out: Sequence[Iterable[str]]) -> list[RankedList]:
        """Finds passages of the prefixes of highest score.

        Of each prefix at most `passages_per_prefix` passages are taken, which are drawn by the seed and the
        query's id. The lengths take turns, a passage at a time, each with its best prefix first; a passage
        that two lengths give is listed once.

        Args:
          queries: the queries.
          k: the most passages of a query.
          left_out: for each query the ids of passages that shall not be drawn, as those that answer it.

        Returns:
          For each query (passage id, its prefix's score), in that order: scores of prefixes of different
          lengths do not compare.
        """
        texts = [query.text for query in queries]
        by_length = [searcher.find_docids(texts, k) for searcher in self.searchers]
        results = []
        for query, ids, *found in zip(queries, left_out, *by_length, strict=True):
            rng = rng_of(self.seed, query.id)
            rows = {*self.searchers[0].find_rows([*ids])}
            lists = [
                self._draw(searcher, docids, scores, rows, rng)
                for searcher, (docids, scores) in zip(self.searchers, found, strict=True)
            ]
            results.append(take_turns(lists)[:k])
        return results

    def _draw(
        self,
        searcher: GenerativeSearcher,
        docids: np.ndarray,
        scores: Sequence[float],
        left_out: set[int],
        rng: np.random.Generator,
    ) -> RankedList:
        """Draws passages of the prefixes that one query found at one length."""
        drawn, table = [], searcher.table
        docids_per_passage = math.ceil(len(table.tokens_NxL) / len(table.passage_ids))
        for (first, others), score in zip(searcher.passages.sharing(docids), scores, strict=False):
            count = 1 + len(others)
            # Enough even if all that shall not be drawn are among them, and few of a prefix of millions.
            enough = docids_per_passage * (self.passages_per_prefix + len(left_out))
            places = rng.choice(count, min(count, enough), replace=False)
            rows = np.where(places == 0, first, others[places - 1] if len(others) else first)
            passages = dict.fromkeys(table.passages_of(rows).tolist())
            kept = [row for row in passages if row not in left_out][: self.passages_per_prefix]
            drawn += [(table.passage_ids[row].as_py(), score) for row in kept]
        return drawn


def take_turns(lists: Iterable[RankedList]) -> RankedList:
    """Joins ranked lists: the first of each, then the second of each, and so on; each passage once."""
    turns = itertools.chain.from_iterable(itertools.zip_longest(*lists))
    joined: dict[str, float] = {}
    for passage, score in filter(None, turns):
        joined.setdefault(passage, score)
    return [*joined.items()]
