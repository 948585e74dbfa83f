"""The generative searcher: shared docids, passages that come and go, approximate search, docids refused."""

import dataclasses

import jax
import numpy as np
import pytest
from model_folders import exact_scores, random_params

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import EOS, Vocabulary, learn
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.fused import FusedSearcher
from retrieval_jax.search.fusion import Fusion
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.search.searcher import Searcher

VOCABULARY = 128


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "sentencepiece.model"
    learn(["the quick brown fox", "jumps over", "the lazy dog"], 60, path)
    return Vocabulary(path)


def searcher(vocabulary, kind, tokens, output_size=VOCABULARY, recall=None, score="log_prob"):
    """A searcher of random weights over passages p0, p1, …"""
    ids = arrow_ids.array([f"p{row}" for row in range(len(tokens))])
    table = DocidTable(kind, tokens, ids, output_size, "", search=docid_kind(kind).search.name)
    model = GenerativeRetriever(T5Config(VOCABULARY, 16, 2, 8, 32, 1, 1), score=score)
    params = jax.tree.map(lambda x: 3 * x, random_params(model))  # of larger differences between docids
    return GenerativeSearcher(
        model, params, table, vocabulary, input_length=6, beams=4, batch_size=2, recall_target=recall
    )


def test_passages_that_share_a_docid_are_all_found(vocabulary):
    docids = [(3, EOS), (2, 4, EOS), (3, EOS), (2, 5, 6, EOS), (3, EOS)]
    matrix = np.array([docid + (0,) * (4 - len(docid)) for docid in docids], np.int32)
    twins = ["p0", "p2", "p4"]
    searching = searcher(vocabulary, "naive", matrix)
    queries = ["the fox", "lazy", "over the dog"]
    rankings = searching.search(queries, k=10)
    for query, ranking in zip(queries, rankings, strict=True):
        scores = dict(ranking)
        assert len(ranking) == len(scores) == len(docids)
        assert [passage for passage, _ in ranking if passage in twins] == twins
        assert len({scores[twin] for twin in twins}) == 1
        assert len(set(scores.values())) == 3
        ((alone),) = searching.search([query], k=2)
        np.testing.assert_allclose([s for _, s in alone], [s for _, s in ranking[:2]], atol=1e-5)
        assert [p for p, _ in alone] == [p for p, _ in ranking[:2]]


def test_passages_that_share_a_docid_are_ordered_by_another_searcher(vocabulary):
    """Fused with a weight that is small against the differences of docids, whose order stays."""

    class Other(Searcher):
        def score(self, queries, candidates):
            return [[float(passage[1:]) for passage in wanted] for wanted in candidates]

    searching = searcher(vocabulary, "rq_2x9", np.array([[6, 4], [3, 5], [6, 4], [3, 5], [7, 2], [6, 4]]))
    fused = FusedSearcher([searching, Other()], Fusion("rerank", (1.0, 1e-6), 100))
    for query in ("the fox", "lazy", "over the dog"):
        (alone,), (ordered,) = searching.search([query], 6), fused.search([query], 6)
        groups = {score: [p for p, s in alone if s == score] for _, score in alone}
        assert sorted(map(tuple, groups.values())) == [("p0", "p2", "p5"), ("p1", "p3"), ("p4",)]
        assert [p for p, _ in ordered] == [p for group in groups.values() for p in reversed(group)]


def test_a_passage_is_found_by_the_best_of_its_docids(vocabulary):
    """Passages 0 to 3 have a docid, 1 and 3 have more, and the docid (6, 4) is of three of them."""
    docids = np.array([[3, 5], [6, 4], [2, 4], [7, 8], [9, 4], [6, 4], [6, 4], [2, 9]])
    owner = [0, 1, 2, 3, 1, 2, 3, 3]
    searching = searcher(vocabulary, "rq_2x9", docids[:4])
    searching.replace(
        dataclasses.replace(searching.table, tokens_NxL=docids, extra_docid_passage_M=np.int32(owner[4:]))
    )
    searching.beams, ids, queries = 6, ["p0", "p1", "p2", "p3"], ["the fox", "lazy", "over the dog"]
    for query, ranking, given in zip(
        queries, searching.search(queries, 10), searching.score(queries, [[*ids, "none"]] * 3), strict=True
    ):
        tokens_S = vocabulary.batch([query], searching.input_length)[0]
        exact = exact_scores(searching.model, searching.params, tokens_S, docids)
        best = [max(exact[row] for row in range(8) if owner[row] == passage) for passage in range(4)]
        np.testing.assert_allclose(given, [*best, np.nan], rtol=1e-5)
        order = sorted(range(4), key=lambda passage: (-best[passage].round(3), passage))
        assert [passage for passage, _ in ranking] == [ids[passage] for passage in order]
        np.testing.assert_allclose([score for _, score in ranking], np.sort(best)[::-1], rtol=1e-5)
        for docid, (passage, score) in zip(searching.explain(query, ranking)["docids"], ranking, strict=True):
            assert docid["passage"] == passage
            written = docids.tolist().index([step["token"] for step in docid["steps"]])
            assert exact[written] == pytest.approx(score, rel=1e-5)
            assert sum(step["log_prob"] for step in docid["steps"]) == pytest.approx(score, rel=1e-5)
        assert [p for p, _ in searching.search([query], 2)[0]] == [p for p, _ in ranking[:2]]
        certain = searching.explain(query, ranking)["certain"] > 0
        assert searching.search_certified([query], 10) == ([ranking], [certain])
    assert searching.search_certified([query], 0) == ([[]], [None])
    # Of a beam that missed the best docid, what was written is shown.
    worst = (ids[3], exact[[3, 6, 7]].min())
    (shown,) = searching.explain(query, [worst])["docids"]
    assert sum(step["log_prob"] for step in shown["steps"]) == pytest.approx(worst[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["atomic", "rq_3x40"])
def test_logits_are_added_up_and_explained_as_such(vocabulary, kind):
    """Against the sum of every docid's logits; no bound is known once something was pruned."""
    docids = np.unique(np.random.default_rng(0).integers(2, VOCABULARY, (12, 3)), axis=0)
    docids = np.arange(1, 13)[:, None] if kind == "atomic" else docids
    searching, query = searcher(vocabulary, kind, docids, score="logits"), "the lazy fox"
    ids = [f"p{row}" for row in range(12)]
    tokens_S = vocabulary.batch([query], searching.input_length)[0]
    exact = exact_scores(searching.model, searching.params, tokens_S, docids)
    assert exact.max() > 0  # no log-probability is
    np.testing.assert_allclose(searching.score([query], [ids])[0], exact, rtol=2e-5, atol=1e-4)
    for beams in (12, 13, 4):
        searching.beams = beams
        (ranking,) = searching.search([query], 12)
        rows = [ids.index(passage) for passage, _ in ranking]
        np.testing.assert_allclose([score for _, score in ranking], exact[rows], rtol=2e-5, atol=1e-4)
        if beams >= 12 or kind == "atomic":
            assert rows == np.argsort(-exact).tolist()
        explained = searching.explain(query, ranking)
        assert explained["certain"] == (12 if beams > 12 or kind == "atomic" else 0)
        assert searching.search_certified([query], 12) == ([ranking], [explained["certain"] > 0])
        for docid, (_, score) in zip(explained["docids"], ranking, strict=True):
            assert all(step.keys() == {"token", "text", "logit", "passages"} for step in docid["steps"])
            np.testing.assert_allclose(sum(step["logit"] for step in docid["steps"]), score, atol=1e-4)


def test_atomic_docids_are_all_found_where_more_are_asked_for(vocabulary):
    searching = searcher(vocabulary, "atomic", np.arange(1, 6, dtype=np.int32)[:, None])
    for ranking in searching.search(["the fox", "lazy"], k=10):
        assert sorted(passage for passage, _ in ranking) == [f"p{row}" for row in range(5)]
        scores = [score for _, score in ranking]
        assert scores == sorted(scores, reverse=True)
        assert np.exp(scores).sum() < 1  # the rest of the softmax has its share


def test_passages_come_and_go_without_recompiling(vocabulary):
    rng = np.random.default_rng(0)
    docids = np.unique(rng.integers(2, VOCABULARY, (400, 3)), axis=0)
    searching = searcher(vocabulary, "rq_3x40", docids)
    searching.beams = len(
        docids
    )  # with fewer, the search may find what it missed while another docid was there
    queries = ["the fox", "lazy"]
    before = searching.search(queries, k=4)
    ((best, _), *_) = before[0]

    def compiled():
        return searching._decode._cache_size()

    assert compiled() == 1
    searching.replace(searching.table.without([best, "no such passage"]))
    after = searching.search(queries, k=4)
    assert [p for p, _ in after[0]][:3] == [p for p, _ in before[0] if p != best]
    # It comes back under another name.
    searching.replace(searching.table.with_passages(["new"], docids[[int(best[1:])]]))
    assert [p for p, _ in searching.search(queries, k=4)[0]] == ["new", *(p for p, _ in before[0][1:])]
    assert compiled() == 1
    assert len(searching.table.ancestors) == 2
    with pytest.raises(UserError, match="there are no docids"):
        searching.replace(searching.table.without(searching.table.passage_ids.to_pylist()))
    assert [p for p, _ in searching.search(queries, k=4)[0]] == ["new", *(p for p, _ in before[0][1:])]


def test_atomic_passages_come_and_go_without_recompiling(vocabulary):
    searching = searcher(vocabulary, "atomic", np.arange(1, 21, dtype=np.int32)[:, None])
    (before,) = searching.search(["the fox"], k=20)
    searching.replace(searching.table.without([before[0][0]]))
    assert [p for p, _ in searching.search(["the fox"], k=20)[0]] == [p for p, _ in before[1:]]
    searching.replace(searching.table.with_passages(["new"], np.array([[100]])))
    (after,) = searching.search(["the fox"], k=20)
    assert {p for p, _ in after} == {p for p, _ in before[1:]} | {"new"}
    assert searching._decode._cache_size() == 1


@pytest.mark.parametrize("kind", ["atomic", "rq_3x40"])
def test_any_number_of_given_passages_is_scored_by_the_same_programs(vocabulary, kind, monkeypatch):
    docids = np.arange(1, 101, dtype=np.int32)[:, None]
    if kind != "atomic":
        docids = np.unique(np.random.default_rng(0).integers(2, VOCABULARY, (100, 3)), axis=0)
    searching, encodings = searcher(vocabulary, kind, docids), []
    searching.beams = len(docids)
    encode = searching._encode
    monkeypatch.setattr(searching, "_encode", lambda *args: encodings.append(1) or encode(*args))
    queries = ["the fox", "lazy"]
    expected = searching.search(queries, k=100)
    for count in (100, 40, 3):
        wanted = [[passage for passage, _ in ranking[-count:]] for ranking in expected]
        given = searching.score(queries, wanted)
        # These weights are large: one program's scores differ by 1e-5 of themselves between instruction sets.
        np.testing.assert_allclose(
            given, [[s for _, s in ranking[-count:]] for ranking in expected], rtol=1e-4
        )
    assert len(encodings) == 3
    assert encode._cache_size() == searching._token_scores._cache_size() == 1
    assert searching.search(queries, 0) == searching.search(queries, -1) == [[], []]


def test_a_server_s_re_ranker_compiles_before_anything_is_found(vocabulary):
    class Nothing(Searcher):
        def search(self, queries, k):
            return [[] for _ in queries]

    class Some(Searcher):
        def search(self, queries, k):
            return [[("p3", 2.0), ("p7", 1.0)] for _ in queries]

    searching = searcher(vocabulary, "atomic", np.arange(1, 21, dtype=np.int32)[:, None])
    fusion = Fusion("rerank", (0.0, 1.0), 100)
    FusedSearcher([Nothing(), searching], fusion).use_batch_sizes((1, 3))
    assert searching._token_scores._cache_size() == 2
    for queries in (["fox"], ["fox", "dog"]):
        expected = searching.score(["fox"], [["p3", "p7"]])[0]
        found = FusedSearcher([Some(), searching], fusion).search(queries, 5)[0]
        assert [passage for passage, _ in found] == (
            ["p3", "p7"] if expected[0] > expected[1] else ["p7", "p3"]
        )
    assert searching._token_scores._cache_size() == 2


def test_approximate_search_tells_its_recall(vocabulary):
    searching = searcher(vocabulary, "atomic", np.arange(1, 101, dtype=np.int32)[:, None], recall=0.9)
    assert searching.measured_recall(["the fox", "lazy", "dog"], k=10) == 1.0  # exact on a processor


def test_docids_that_the_model_cannot_write_are_refused(vocabulary):
    with pytest.raises(UserError, match=r"docids/rq_1x200: tokens up to 200.*below 128.*trained on"):
        searcher(vocabulary, "rq_1x200", np.array([[200], [5]]), output_size=201)
    with pytest.raises(UserError, match=r"docids/rq_2x9: .*prefix of another.*retrieval-jax docids"):
        searcher(vocabulary, "rq_2x9", np.array([[5, 0], [5, 3]]))
