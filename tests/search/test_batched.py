"""Batched search: which queries a searcher is asked, and what the run and the summary then say."""

import numpy as np
import pytest

from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.search import batched
from retrieval_jax.search.batched import search_in_batches, search_queries, search_texts, single_query_ms
from retrieval_jax.search.searcher import Searcher


class Recorder(Searcher):
    """Finds passages p0, p1, … for every query, as many as the text says, and notes the queries."""

    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked.append((list(queries), k))
        return [[(f"p{i}", -float(i)) for i in range(min(int(text), k))] for text in queries]


@pytest.fixture
def searcher(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(batched, "BATCH_SIZE", 3)
    return Recorder()


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_each_query_is_searched_for_once_in_batches(searcher: Recorder, count: int):
    texts = [str(i) for i in range(count)]
    found = [*search_in_batches(searcher, texts, 4, "search")]
    assert [(len(ranked_list), certain) for ranked_list, certain in found] == [
        (min(i, 4), None) for i in range(count)
    ]
    assert [text for queries, _ in searcher.asked for text in queries] == texts
    assert all(len(queries) <= 3 and k == 4 for queries, k in searcher.asked)


def test_a_query_that_is_a_passage_gets_one_more(searcher: Recorder):
    queries = [
        Query("a", "9", {}),
        Query("b", "9", {}, is_passage=True),
        *(Query(f"c{i}", "1", {}) for i in range(3)),
    ]
    run, summary, certain = search_queries(searcher, queries, 4, "search")
    assert {query: len(ranked_list) for query, ranked_list in run.items()} == {
        "a": 4,
        "b": 5,
        "c0": 1,
        "c1": 1,
        "c2": 1,
    }
    assert {k for _, k in searcher.asked} == {5}
    assert (summary["queries"], summary["fewer_than_k"]) == (5, 3)
    assert summary["queries_per_second"] > 0
    assert certain is None
    assert "certain" not in summary
    searcher.asked.clear()
    search_queries(searcher, queries[:1], 4, "search")
    assert {k for _, k in searcher.asked} == {4}


def test_the_certain_queries_are_named(searcher: Recorder, monkeypatch: pytest.MonkeyPatch):
    """Those of which nothing is known count neither way."""
    proven = {"5": True, "6": False, "7": None, "8": True}

    def search_certified(texts, k):
        return searcher.search(texts, k), [proven[text] for text in texts]

    monkeypatch.setattr(searcher, "search_certified", search_certified)
    _, summary, certain = search_queries(searcher, [Query(f"q{i}", i, {}) for i in proven], 4, "search")
    assert (summary["certain"], certain) == (0.6667, ["q5", "q8"])


@pytest.mark.parametrize("count", [1, 20, 21, 59])
def test_latency_is_of_queries_that_come_alone(searcher: Recorder, count: int):
    """A sample over the whole split; all shapes are compiled before any query is timed."""
    assert single_query_ms(searcher, [str(i) for i in range(count)], 4) >= 0
    texts = [text for (text,), _ in searcher.asked]
    half = len(texts) // 2
    assert texts[:half] == texts[half:]
    assert 1 <= half <= batched.SINGLE_QUERIES
    assert int(texts[-1]) >= count - -(-count // batched.SINGLE_QUERIES)


def test_one_querys_passages_have_their_texts(collection: Collection):
    rows = np.random.default_rng(0).permutation(collection.passage_count)[:5].tolist()
    passages = [collection.passage(row) for row in rows]

    class Fixed:
        def search(self, queries, k):
            return [[(passage.id, 1 / (1 + i)) for i, passage in enumerate(passages[:k])] for _ in queries]

    found = search_texts(Fixed(), collection, "a query", 4)
    assert found == [
        {"rank": 1 + i, "id": p.id, "score": 1 / (1 + i), "title": p.title, "text": p.text}
        for i, p in enumerate(passages[:4])
    ]
