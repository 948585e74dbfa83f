"""Docids of every kind, made by the verb: a beam that holds them all finds what scoring every docid finds."""

import jax
import numpy as np
import pytest
from model_folders import random_params
from tables import docids_of

from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.training.run import docid_softmax

KINDS = {
    "atomic": [],
    "naive": [],
    "naive_digits": [],
    "semantic": ["--gin.semantic.leaf_size=5", "--gin.semantic.clusters_per_node=4"],
    "semantic_2d": ["--gin.semantic.leaf_size=5", "--gin.semantic.clusters_per_node=4"],
    "rq_3x4": [],
    "rq_2x4": ["--gin.residual.shared_codes='list'"],
}
QUERIES = ["smooth a noisy signal", "progress bar", "gradient clipping"]


@pytest.fixture(scope="module")
def embeddings(collection, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "vectors.npy"
    np.save(path, np.random.default_rng(0).normal(size=(collection.passage_count, 8)).astype(np.float32))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_beam_a_docid_finds_what_scoring_every_docid_finds(
    kind, arguments, collection, embeddings, tmp_path, cli
):
    vectors = [f"--gin.EMBEDDINGS={str(embeddings)!r}"] if kind[0] in "sr" else []
    status, made, err = cli("docids", *arguments, f"--gin.DOCIDS={kind!r}", *vectors, *KINDS[kind])
    assert status == 0, err
    table = DocidTable.open(made["docids"])
    vocabulary = Vocabulary(collection.vocabulary_path)
    model = GenerativeRetriever(T5Config(vocabulary.size, 16, 2, 8, 16, 1, 1, **docid_softmax(table)))
    params = random_params(model)
    searcher = GenerativeSearcher(model, params, table, vocabulary, 12, beams=len(table.passage_ids))
    rankings = searcher.search(QUERIES, k=1000)
    assert searcher.search([], k=1000) == []
    half, whole = (searcher.search([f"progress {c} bar"], k=5) for c in ("\ud83d", "\ufffd"))
    assert half == whole

    targets = np.asarray(table.tokens_NxL, np.int32)
    starts = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    score = jax.jit(model.score_batch)
    for query, ranking in zip(QUERIES, rankings, strict=True):
        batch = {
            "encoder_input_tokens": np.tile(vocabulary.batch([query], 12), (len(targets), 1)),
            "decoder_input_tokens": starts,
            "decoder_target_tokens": targets,
            "decoder_loss_weights": targets > 0,
        }
        exact = dict(
            zip(table.passage_ids.to_pylist(), np.asarray(score(params, batch)).tolist(), strict=True)
        )
        assert {passage for passage, _ in ranking} == exact.keys()
        (given,) = searcher.score([query], [[*exact, "no such passage"]])
        np.testing.assert_allclose(given, [*exact.values(), np.nan], atol=1e-3)
        found = dict(ranking)
        np.testing.assert_allclose(given[:-1], [found[passage] for passage in exact], atol=1e-5)
        assert len(ranking) == len(exact)
        scores = [score for _, score in ranking]
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, [exact[passage] for passage, _ in ranking], atol=1e-3)
        explained = searcher.explain(query, ranking[:5])
        assert explained["certain"] == 5
        for docid, (passage, total) in zip(explained["docids"], ranking[:5], strict=True):
            tokens = docids_of(table)[passage]
            assert docid["passage"] == passage
            assert [step["token"] for step in docid["steps"]] == [*tokens]
            assert sum(step["log_prob"] for step in docid["steps"]) == pytest.approx(total, abs=1e-5)
            assert docid["steps"][-1]["passages"] == [*docids_of(table).values()].count(tokens)
    if kind == "atomic":  # nothing was pruned, so nothing is searched for, or compiled, to explain it
        compiled = searcher._decode._cache_size()
        assert searcher.explain(QUERIES[0], rankings[0][:3])["certain"] == 3
        assert searcher._decode._cache_size() == compiled
    if kind == "semantic":
        few = GenerativeSearcher(model, params, table, vocabulary, 12, beams=4)
        for query, ranking in zip(QUERIES, rankings, strict=True):
            found = few.search([query], k=4)[0]
            certain = few.explain(query, found)["certain"]
            assert [p for p, _ in found[:certain]] == [p for p, _ in ranking[:certain]]
            assert certain < 4  # the last of the beams is itself no better than what was pruned
    if kind == "naive":
        steps = searcher.explain(QUERIES[0], rankings[0][:1])["docids"][0]["steps"]
        text = "".join(step["text"] for step in steps)
        assert text.replace("\u2581", "") == f"{rankings[0][0][0].lower()}end"  # as the vocabulary writes it
