"""Explanations of an answer: what a searcher did to find its passages."""

from retrieval_jax.search.searcher import RankedList, Searcher


def explain(searcher: Searcher, query: str, ranked_list: RankedList) -> dict | None:
    """Explains how a searcher found its passages.

    It is called in the searcher's thread, after the search.

    Args:
      searcher: the searcher.
      query: the query.
      ranked_list: what it found.

    Returns:
      The explanation, as JSON; None for a searcher that explains nothing.
    """
    return None
