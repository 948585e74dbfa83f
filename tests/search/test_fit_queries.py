"""The queries that weights are chosen with."""

import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.search import fit_queries

EQUAL = "all parts have the same weight"


def test_queries_of_dev_that_are_reported_are_told_of(collection, capsys, monkeypatch):
    def asked(split: str | None) -> list[Query]:
        return fit_queries.fit_queries(collection, split, "fused", EQUAL)

    assert asked(None) == []
    assert len(asked("dev")) == 10
    monkeypatch.setattr(collection, "query_counts", {"train": 50, "dev": 10})
    monkeypatch.setattr(fit_queries, "QUERIES", 4)
    some = asked("dev")
    assert len(some) == 4
    assert some == asked("dev")
    assert "figures of 'dev' are not of unseen queries" in capsys.readouterr().err
    monkeypatch.setattr(collection, "query_counts", {"train": 50})
    assert asked("dev") == []  # the default: a collection may have no such queries
    words = f"fused: no queries of split 'dev' to choose weights with: {EQUAL}"
    assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="no queries of split 'trian': choose one of train, or None"):
        asked("trian")


def test_what_is_reported_chooses_nothing():
    with pytest.raises(UserError, match=r"make_index.fit_split: 'test' is what figures are reported on"):
        fit_queries.check_fit_split("test")
    fit_queries.check_fit_split("dev")
    fit_queries.check_fit_split(None)
