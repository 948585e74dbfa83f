"""Batched search: the queries of a split, or one question, answered by a searcher."""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence

from retrieval_jax.core.progress import bar
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.search.searcher import RankedList, Searcher

BATCH_SIZE = 32  # queries that are searched for at once
SINGLE_QUERIES = 20  # queries whose latencies are measured


def search_in_batches(
    searcher: Searcher, queries: Sequence[str], k: int, description: str
) -> Iterator[tuple[RankedList, bool | None]]:
    """Searches for queries, BATCH_SIZE at a time, with a progress bar.

    Args:
      searcher: the searcher.
      queries: the queries' texts.
      k: passages to find for each query.
      description: what the progress bar says.

    Yields:
      The ranked list of each query, in the queries' order, and what `Searcher.search_certified` tells of it.
    """
    with bar(description, len(queries)) as advance:
        for first in range(0, len(queries), BATCH_SIZE):
            found = searcher.search_certified(queries[first : first + BATCH_SIZE], k)
            yield from zip(*found, strict=True)
            advance(len(found[0]))


def score_in_batches(
    searcher: Searcher, pairs: Iterable[tuple[str, Sequence[str]]], count: int, description: str
) -> Iterator[dict[str, float]]:
    """Scores the candidates of queries, BATCH_SIZE queries at a time, with a progress bar.

    Args:
      searcher: the searcher.
      pairs: (the text of a query, ids of its candidates).
      count: how many there are.
      description: what the progress bar says.

    Yields:
      The score of each of a query's candidates; see `Searcher.score`.
    """
    pairs = iter(pairs)
    with bar(description, count) as advance:
        while some := list(itertools.islice(pairs, BATCH_SIZE)):
            texts, candidates = map(list, zip(*some, strict=True))
            for ids, scores in zip(candidates, searcher.score(texts, candidates), strict=True):
                yield dict(zip(ids, scores, strict=True))
            advance(len(some))


def search_queries(
    searcher: Searcher, queries: Sequence[Query], k: int, description: str
) -> tuple[dict[str, RankedList], dict[str, float], list[str] | None]:
    """Searches for a collection's queries and measures the time.

    For a query that is itself a passage (as in ArguAna and Quora) k + 1 passages are sought, because
    evaluations remove that passage from the query's results.

    Args:
      searcher: the searcher.
      queries: the queries, at least one.
      k: passages to find for each query.
      description: what the progress bar says.

    Returns:
      The run (query id -> ranked list); a summary: "queries" (their number), "queries_per_second" (the
      throughput in batches of BATCH_SIZE queries, by wall time, without compilation), "fewer_than_k"
      (queries for which fewer passages were found) and, where it is known, "certain" (the share of queries
      whose first passage is proven to be that of an exhaustive search); and the ids of these queries, None
      where it is not known.
    """
    texts = [query.text for query in queries]
    depth = k + any(query.is_passage for query in queries)
    searcher.search(texts[:BATCH_SIZE], depth)  # compiles: users wait for that once, not for every query
    for first in range(0, len(texts), BATCH_SIZE):
        searcher.compile_for(texts[first : first + BATCH_SIZE])
    start = time.monotonic()
    found = [*search_in_batches(searcher, texts, depth, description)]
    seconds = time.monotonic() - start
    ranked_lists = [ranked_list for ranked_list, _ in found]
    summary = {
        "queries": len(queries),
        "queries_per_second": round(len(queries) / seconds, 3),
        "fewer_than_k": sum(len(ranked_list) < k for ranked_list in ranked_lists),
    }
    certain = None
    if known := [certain for _, certain in found if certain is not None]:
        summary["certain"] = round(sum(known) / len(known), 4)
        certain = [query.id for query, (_, is_certain) in zip(queries, found, strict=True) if is_certain]
    pairs = zip(queries, ranked_lists, strict=True)
    return {query.id: ranked_list[: k + query.is_passage] for query, ranked_list in pairs}, summary, certain


def single_query_ms(searcher: Searcher, queries: Sequence[str], k: int) -> float:
    """Measures the latency: the wall time of a search for one query alone.

    The searcher pads its batches to a single query from now on, as a server's do.

    Args:
      searcher: the searcher.
      queries: the queries' texts, at least one, of which SINGLE_QUERIES at most are searched for.
      k: passages to find for each query.

    Returns:
      The median in milliseconds, without compilation.
    """
    searcher.use_batch_sizes([1])
    sample = queries[:: -(-len(queries) // SINGLE_QUERIES)]
    for query in sample:
        searcher.search([query], k)  # compiles for its length
    took = []
    for query in sample:
        start = time.monotonic()
        searcher.search([query], k)
        took.append(time.monotonic() - start)
    return round(1000 * statistics.median(took), 3)


def search_texts(searcher: Searcher, collection: Collection, query: str, k: int) -> list[dict]:
    """Searches for one query and reads the texts of its passages.

    Returns:
      A dict of "rank" (from 1), "id", "score", "title" and "text" for each passage, best first.
    """
    (ranked_list,) = searcher.search([query], k)
    passages = collection.get(collection.find_rows([passage_id for passage_id, _ in ranked_list]).tolist())
    return [
        {"rank": rank, "id": p.id, "score": score, "title": p.title, "text": p.text}
        for rank, (p, (_, score)) in enumerate(zip(passages, ranked_list, strict=True), start=1)
    ]
