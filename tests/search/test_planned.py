"""The planned searcher: a network with a lexical head, against the sum for every docid of every passage."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from model_folders import exact_scores, random_params

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import EOS, Vocabulary, learn
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.planned import PlannedSearcher

VOCABULARY, QUERIES = 128, ["the fox", "lazy", "over the dog"]
# Passages 0 to 4 have a docid each (0 and 2 the same), 1 and 3 have another one.
DOCIDS = np.array([[3, 5, EOS], [6, 4, EOS], [3, 5, EOS], [7, EOS, 0], [9, 4, EOS], [3, 8, EOS], [6, 4, EOS]])
OWNER = [0, 1, 2, 3, 4, 1, 3]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return learned(tmp_path_factory.mktemp("vocabulary") / "sentencepiece.model")


def learned(path):
    learn(["the quick brown fox", "jumps over", "the lazy dog"], 60, Path(path))
    return Vocabulary(Path(path))


def searcher(vocabulary, kind, docids, passages, dtype="float32", **settings):
    """A searcher of random weights over passages p0, p1, …, and sets with impacts in another order."""
    ids = [f"p{row}" for row in range(passages)]
    table = DocidTable(
        kind, docids, arrow_ids.array(ids), VOCABULARY, "", search=docid_kind(kind).search.name
    )
    config = T5Config(VOCABULARY, 16, 2, 8, 32, 1, 1, lexical_head=True, dtype=dtype)
    model = GenerativeRetriever(config, score=settings.pop("score", "log_prob"))
    params = jax.tree.map(lambda x: 3 * x, random_params(model))
    params["lexical_head"] = {
        "gain": np.ones(VOCABULARY, np.float32),
        "scale": np.float32(1),
        "bias": np.float32(0),
    }
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 60, (passages, 5)).astype(np.uint16)
    impacts = rng.integers(1, 256, (passages, 5)).astype(np.uint8)
    sets = TokenSets(tokens[::-1], impacts[::-1], 0.01, arrow_ids.array(ids[::-1]), "", "")
    made = PlannedSearcher(
        *(model, params, table, vocabulary), 6, sets=sets, batch_size=2, **{"beams": 8} | settings
    )
    return made, tokens, impacts


def lexical_scores(made, tokens, impacts, query):
    """Of all passages, in float64, from the weights that the network gives."""
    batch = {"encoder_input_tokens": made.vocabulary.batch([query], 6)}
    weights = np.array(made.model.lexical_weights(made.params, batch), np.float64)[0]
    assert weights.max() > 0
    return (np.where(tokens > 0, weights[tokens], 0) * impacts * 0.01).sum(axis=1)


def best_of(scores, owner, passages):
    return np.array([max(s for s, o in zip(scores, owner, strict=True) if o == p) for p in range(passages)])


@pytest.mark.parametrize("score", ["log_prob", "logits"])
def test_passages_have_the_sum_of_both_scores(vocabulary, score):
    """Shared docids, several docids, candidates, other weights, and a plan of all and of few passages."""
    made, tokens, impacts = searcher(vocabulary, "rq_2x9", DOCIDS[:5], 5, score=score)
    made.replace(
        dataclasses.replace(made.table, tokens_NxL=DOCIDS, extra_docid_passage_M=np.int32(OWNER[5:]))
    )
    ids = [f"p{row}" for row in range(5)]
    for weight in (1.0, 0.25):
        made.replace_weight(weight)
        given = made.score(QUERIES, [[*ids, "none"]] * 3)
        for query, ranking, scored in zip(QUERIES, made.search(QUERIES, 10), given, strict=True):
            exact = exact_scores(made.model, made.params, made.vocabulary.batch([query], 6)[0], DOCIDS)
            sums = weight * best_of(exact, OWNER, 5) + lexical_scores(made, tokens, impacts, query)
            np.testing.assert_allclose(scored, [*sums, np.nan], rtol=1e-4)
            assert [passage for passage, _ in ranking] == [ids[row] for row in np.argsort(-sums)]
            np.testing.assert_allclose([s for _, s in ranking], np.sort(sums)[::-1], rtol=1e-4)
    compiled = made._decode._cache_size()
    made.replace_weight(2.0)
    made.search(QUERIES, 10)
    assert made._decode._cache_size() == compiled


def test_atomic_docids_are_all_scored(vocabulary):
    docids = np.random.default_rng(1).permutation(np.arange(2, 32))[:, None]
    made, tokens, impacts = searcher(vocabulary, "atomic", docids, 30, sequential_weight=0.5)
    for query, ranking in zip(QUERIES, made.search(QUERIES, 30), strict=True):
        exact = exact_scores(made.model, made.params, made.vocabulary.batch([query], 6)[0], docids)
        sums = 0.5 * exact + lexical_scores(made, tokens, impacts, query)
        assert [passage for passage, _ in ranking] == [f"p{row}" for row in np.argsort(-sums)]
        np.testing.assert_allclose([s for _, s in ranking], np.sort(sums)[::-1], rtol=1e-4)


def check_eight_devices(path):
    """Plans, planned searches and searchers; called in a process that has eight devices."""
    import test_bonuses
    import test_planning

    assert jax.device_count() == 8
    vocabulary = learned(path)
    test_bonuses.test_a_mesh_makes_no_difference()
    with pytest.MonkeyPatch.context() as monkeypatch:
        test_planning.test_blocks_and_devices_make_no_difference(monkeypatch, with_impacts=True)
    docids = np.unique(np.random.default_rng(2).integers(2, VOCABULARY, (90, 3)), axis=0)
    settings = {"beams": 4, "plan_size": 20}
    for kind, tokens in (("rq_3x40", docids), ("atomic", np.arange(2, 92)[:, None])):
        alone, *_ = searcher(vocabulary, kind, tokens, len(tokens), **settings)
        shared, *_ = searcher(vocabulary, kind, tokens, len(tokens), mesh=make_mesh(2), **settings)
        for one, eight in zip(alone.search(QUERIES, 9), shared.search(QUERIES, 9), strict=True):
            assert [passage for passage, _ in one] == [passage for passage, _ in eight]
            np.testing.assert_allclose([s for _, s in one], [s for _, s in eight], rtol=1e-4, atol=1e-4)
    print("equal")


def test_eight_devices_find_what_one_finds(tmp_path):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    tests = Path(__file__).parents[1]
    script = "import sys; sys.path[:0] = sys.argv[2:]; import test_planned as test; "
    script += "test.check_eight_devices(sys.argv[1])"
    folders = map(str, (tests, tests / "search", tests / "decoding"))
    command = [sys.executable, "-c", script, str(tmp_path / "sentencepiece.model"), *folders]
    result = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True, check=False)
    assert result.stdout == "equal\n", result.stderr


def test_a_network_that_computes_in_bfloat16_plans_as_well(vocabulary):
    docids = np.unique(np.random.default_rng(2).integers(2, VOCABULARY, (40, 3)), axis=0)
    made, tokens, impacts = searcher(vocabulary, "rq_3x40", docids, 40, dtype="bfloat16", plan_size=40)
    made.replace_weight(0.0)  # lexical scores alone
    for query, ranking in zip(QUERIES, made.search(QUERIES, 5), strict=True):
        sums = lexical_scores(made, tokens, impacts, query)
        np.testing.assert_allclose([s for _, s in ranking], np.sort(sums)[::-1][:5], rtol=0.01)


def test_passages_without_a_set_are_named(vocabulary):
    made, *_ = searcher(vocabulary, "rq_2x9", DOCIDS[:5], 5)
    made.all_sets = dataclasses.replace(
        made.all_sets, passage_ids=arrow_ids.array(["p0", "p1", "p2", "p3", "x"])
    )
    with pytest.raises(UserError, match=r"sets: passage 'p4' has none: make the sets again"):
        made.replace(made.table)
