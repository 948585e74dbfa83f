"""Making synthetic queries: shards of passages, each made once, wherever the queries come from.

A source of queries is a model (`models.query_sampler`) or released files (`predictions`). What a shard holds
does not depend on which host made it, or on how often the work was interrupted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from retrieval_jax.core.progress import bar
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.synthetic import QueryShards

Advance = Callable[..., None]  # of a progress bar: (more passages, note="")
Search = Callable[[Sequence[str], int], Sequence[Sequence[tuple[str, float]]]]
"""(queries, k) -> for each query at most k (passage id, score), best first: `Searcher.search`."""


class QuerySource(Protocol):
    """Where queries come from."""

    def prepare(self, collection: Collection, shards: QueryShards) -> None:
        """Called once, on the first host, before any shard is made."""

    def queries(
        self, collection: Collection, shards: QueryShards, numbers: Sequence[int], advance: Advance
    ) -> Iterator[list[list[str]]]:
        """Yields for each of these shards the queries of each of its passages.

        Args:
          collection: the passages.
          shards: how the passages are divided.
          numbers: the shards to make, ascending.
          advance: called with the number of passages that are done.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ConsistencyFilter:
    """Keeps a query only if a searcher finds the passage that it was generated from (Alberti et al., 2019).

    Attributes:
      search: finds passages.
      k: how many passages it finds for a query.
      batch_size: the most queries of one call of `search`.
    """

    search: Search
    k: int
    batch_size: int

    def keep(self, passage_ids: Sequence[str], queries: Sequence[Sequence[str]]) -> list[list[str]]:
        """Returns, for each passage, those of its queries for which its id is among the first k."""
        kept: list[list[str]] = [[] for _ in queries]
        asked = [(row, query) for row, some in enumerate(queries) for query in some]
        for first in range(0, len(asked), self.batch_size):
            batch = asked[first : first + self.batch_size]
            ranked_lists = self.search([query for _, query in batch], self.k)
            for (row, query), ranked in zip(batch, ranked_lists, strict=True):
                if any(found == passage_ids[row] for found, _ in ranked):
                    kept[row].append(query)
        return kept


def make_shards(
    collection: Collection,
    shards: QueryShards,
    numbers: Sequence[int],
    source: QuerySource,
    count: int,
    consistency_filter: ConsistencyFilter | None = None,
    name: str = "queries",
) -> None:
    """Makes shards and writes each one when it is complete.

    Args:
      collection: the passages.
      shards: how the passages are divided, and the folder of the shards.
      numbers: the shards to make, ascending.
      source: where the queries come from.
      count: the most queries of a passage that are taken from the source.
      consistency_filter: chooses among the distinct queries; None keeps all of them.
      name: the name of the work on the progress bar.
    """
    if not numbers:
        return
    with bar(f"generate {name}", sum(len(shards.rows(number)) for number in numbers)) as advance:
        queries_of_shards = source.queries(collection, shards, numbers, advance)
        for number, made in zip(numbers, queries_of_shards, strict=True):
            made = [queries[:count] for queries in made]
            kept = different = [distinct(queries) for queries in made]
            if consistency_filter:
                ids = collection.ids.take(list(shards.rows(number))).to_pylist()
                kept = consistency_filter.keep(ids, different)
            shards.write(
                number,
                (
                    {"queries": queries, "made": len(all_made), "distinct": len(all_distinct)}
                    for queries, all_made, all_distinct in zip(kept, made, different, strict=True)
                ),
            )


def distinct(queries: Sequence[str]) -> list[str]:
    """Returns the first of the queries that differ in case and white space alone, none that is empty.

    White space is replaced by single blanks.
    """
    first: dict[str, str] = {}
    for query in queries:
        words = " ".join(query.split())
        first.setdefault(words.casefold(), words)
    first.pop("", None)
    return list(first.values())
