"""A searcher that is asked with variations of the queries: a part of a fused searcher, named SEARCHER~KIND.

What a variation finds depends less on the one word that a person misspelled, and fusing the ranked lists of
several wordings finds more than each (Belkin et al. 1995, "Combining the evidence of multiple query
representations for information retrieval"; Bailey et al. 2017).
"""

from collections.abc import Sequence

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.variations import KINDS, MARK, vary
from retrieval_jax.data.vocabulary import valid_text
from retrieval_jax.search.searcher import RankedList, Searcher, can_score


class VariedSearcher(Searcher):
    """Searches for a variation of each query, which the query's text alone draws.

    Args:
      searcher: the searcher that is asked.
      variation: a kind of variation; see `variations`.
    """

    def __init__(self, searcher: Searcher, variation: str):
        self.searcher, self.variation = searcher, variation
        self.is_shared = searcher.is_shared

    def _varied(self, queries: Sequence[str]) -> list[str]:
        # What is drawn depends on the text, which has to be UTF-8.
        return [vary(query, self.variation, query) for query in map(valid_text, queries)]

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`."""
        return self.searcher.search(self._varied(queries), k)

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`."""
        return self.searcher.score(self._varied(queries), candidates)

    def truncates(self, query: str) -> bool:
        """See `Searcher.truncates`."""
        return self.searcher.truncates(*self._varied([query]))

    def compile_for(self, queries: Sequence[str]) -> None:
        """See `Searcher.compile_for`."""
        self.searcher.compile_for(self._varied(queries))

    def use_batch_sizes(self, sizes: Sequence[int]) -> None:
        """See `Searcher.use_batch_sizes`."""
        self.searcher.use_batch_sizes(sizes)


def searcher_name(part: str) -> str:
    """Returns the name of the searcher that a part asks: "exact" of "exact~shuffle".

    Raises:
      UserError: there is no such kind of variation.
    """
    name, mark, variation = part.partition(MARK)
    if mark and variation not in KINDS:
        raise UserError(
            f"make_index.parts: {part!r}: no kind of variation {variation!r}: it is one of {', '.join(KINDS)}"
        )
    return name


def asked_as(part: str, searcher: Searcher) -> Searcher:
    """Returns the searcher as a part of this name asks it: itself, or with variations of the queries."""
    variation = part.partition(MARK)[2]
    return VariedSearcher(searcher, variation) if variation else searcher


def can_score_passages(searcher: Searcher) -> bool:
    """Returns whether a searcher, or the one that it asks, has `Searcher.score`."""
    asked = searcher.searcher if isinstance(searcher, VariedSearcher) else searcher
    return can_score(type(asked))
