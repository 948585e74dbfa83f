"""Mining for some of the queries, with a teacher, and the scores that are shown of many."""

import numpy as np
import pytest
from teacher import random_scores

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.mined import NegativesRule
from retrieval_jax.data.scores import ScoredRows
from retrieval_jax.search import mining
from retrieval_jax.search.mining import Miner, scores_as_teacher, searcher_as_teacher
from retrieval_jax.search.searcher import Searcher


@pytest.fixture(scope="module")
def miner(collection, tmp_path_factory, bm25_of) -> Miner:
    return Miner(collection, bm25_of(tmp_path_factory.mktemp("bm25"), collection.passages()), 12)


def test_a_query_s_negatives_do_not_depend_on_the_others_that_are_mined_for(miner, collection, monkeypatch):
    queries = collection.queries("train")
    rule = NegativesRule(4, skip_top=1, sample=True, seed=5)
    whole = [*miner.mine(queries, range(len(queries)), rule, "mine")]
    assert [chosen.query for chosen in whole] == [query.id for query in queries]
    assert [*miner.mine(queries, [7, 3, 50], rule, "mine")] == [whole[7], whole[3], whole[50]]
    # Of many scores every n-th is shown, each rank as often.
    monkeypatch.setattr(mining, "SCORES_SHOWN", 2 * len(queries))
    some = [*miner.mine(queries, range(len(queries)), rule, "mine")]
    assert [chosen.negatives for chosen in some] == [chosen.negatives for chosen in whole]
    parts = [(a.scores[::2], a.scores[1::2]) for a in whole if len(a.negatives) == 4]
    shown = [b.scores for b in some if len(b.negatives) == 4]
    starts = [pair.index(scores) for pair, scores in zip(parts, shown, strict=True)]
    assert 0.3 * len(starts) < sum(starts) < 0.7 * len(starts)


def test_a_teacher_scores_positives_that_were_not_found(miner, collection):
    queries = collection.queries("train")
    narrow = Miner(collection, miner.finder, 1)
    teacher = searcher_as_teacher(miner.finder, "bm25")
    rule = NegativesRule(1, margin=0.0)
    alone = [*narrow.mine(queries, range(len(queries)), rule, "mine")]
    taught = [*narrow.mine(queries, range(len(queries)), rule, "mine", teacher)]
    for query, chosen in zip(queries, taught, strict=True):
        (scores,) = miner.finder.score([query.text], [[*query.positives]])
        assert chosen.positive == pytest.approx(max(scores))
        assert all(score <= chosen.positive for score in chosen.scores)
    assert any(chosen.positive is None for chosen in alone)

    class Other(Searcher):
        kind = "other"

    with pytest.raises(UserError, match=r"mine.teacher: mine \(other\) cannot score"):
        searcher_as_teacher(Other(), "mine")


def test_a_teacher_s_scores_on_disk_are_those_of_a_text(collection):
    given, queries = random_scores(collection), collection.queries("train")[:20]
    teacher = scores_as_teacher(ScoredRows(collection, given.items()), collection)
    everything = collection.ids.to_pylist()
    for query, found in zip(queries, teacher(queries, [everything] * len(queries)), strict=True):
        wanted: dict[str, float] = {}
        for passage, score in given.get(query.id, {}).items():
            text = collection.first_ids.get(passage, passage)
            wanted[text] = max(score, wanted.get(text, -np.inf))
        scores = [wanted.get(collection.first_ids.get(passage, passage), np.nan) for passage in everything]
        np.testing.assert_allclose([found[passage] for passage in everything], scores, rtol=1e-6)
