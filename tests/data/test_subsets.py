"""Subsets follow the paper's recipe, whatever the collection."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.data.subsets import choose, keep


def rows(ids) -> np.ndarray:
    """Passage i has the id str(i); ids below zero are unknown."""
    return np.array([max(int(i), -1) for i in ids], np.int64)


def queries_of(passages: list[int]) -> list[Query]:
    return [Query(f"q{i}", "text", {str(p): 1}) for i, p in enumerate(passages)]


numbers = st.lists(st.integers(0, 59), max_size=30)


@settings(deadline=None)
@given(numbers, numbers, numbers, st.integers(1, 80), st.integers(0, 3))
def test_the_paper_s_recipe(train, dev, test, size, seed):
    queries = {"train": queries_of(train), "dev": queries_of(dev), "test": queries_of(test)}
    first, second = set(dev) | set(test), set(train) - set(dev) - set(test)
    if len(first) > size:
        with pytest.raises(UserError, match=f"SUBSET: {size} passages .* {len(first)} that are relevant"):
            choose(60, queries, rows, size, seed)
        return
    found = choose(60, queries, rows, size, seed)
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == min(size, 60)
    chosen = set(found.tolist())
    assert first <= chosen
    if len(first | second) >= size:
        assert chosen <= first | second  # no others, as long as there are relevant ones
    else:
        assert first | second <= chosen
    assert choose(60, queries, rows, size, seed).tolist() == found.tolist()


def test_the_seed_chooses():
    queries = {"train": queries_of(list(range(500))), "dev": queries_of([900, 901])}
    chosen = [choose(1000, queries, rows, 100, seed).tolist() for seed in (0, 1)]
    assert chosen[0] != chosen[1]
    # Not the first ones: spread over the train-relevant passages.
    assert 150 < np.mean(chosen[0][:-2]) < 350
    more = choose(1000, queries, rows, 600, 0)
    assert np.mean(more[more >= 500]) > 650


def test_queries_keep_what_is_left():
    known = {"1", "2"}
    queries = {
        "train": [
            Query("a", "x", {"1": 1, "3": 2}, ("2", "4"), "llm"),
            Query("b", "y", {"3": 1}, ("1",)),
            Query("c", "z", {"2": 3}),
        ],
        "dev": [Query("d", "w", {"4": 1})],
    }
    kept = keep(queries, lambda ids: np.array([0 if i in known else -1 for i in ids], np.int64))
    assert kept == {
        "train": [Query("a", "x", {"1": 1}, ("2",), "llm"), Query("c", "z", {"2": 3})],
        "dev": [Query("d", "w", {})],  # judged, and counted
    }
