"""The planned searcher: a network with a lexical head, against the sum for every docid of every passage."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import ir_measures
import jax
import numpy as np
import pytest
from model_folders import compiled, exact_scores, random_params, write_model_folder
from safetensors.numpy import load_file

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import EOS, Vocabulary, learn
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.interop import stablehlo
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.planned import WEIGHTS, PlannedSearcher
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.run import docid_softmax

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
    tokens = rng.integers(0, vocabulary.model.get_piece_size(), (passages, 5)).astype(np.uint16)
    impacts = rng.integers(1, 256, (passages, 5)).astype(np.uint8)
    sets = TokenSets(tokens[::-1], impacts[::-1], 0.01, arrow_ids.array(ids[::-1]), "", "")
    made = PlannedSearcher(
        *(model, params, table, vocabulary), 6, sets=sets, batch_size=2, **{"beams": 8} | settings
    )
    return made, tokens, impacts


def lexical_scores(made, tokens, impacts, query):
    """Of all passages, in float64, from the weights that the network gives."""
    batch = {"encoder_input_tokens": made.vocabulary.batch([query], 6)}
    weights = np.array(compiled(made.model, "lexical_weights")(made.params, batch), np.float64)[0]
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
    made.replace_weight(0.0)
    (ranking,) = made.search(QUERIES[:1], 10)
    for docid in made.explain(QUERIES[0], ranking)["docids"]:
        own = [d for d, owner in zip(DOCIDS, OWNER, strict=True) if f"p{owner}" == docid["passage"]]
        exact = exact_scores(made.model, made.params, made.vocabulary.batch(QUERIES[:1], 6)[0], own)
        shown = sum(step["log_prob" if score == "log_prob" else "logit"] for step in docid["steps"])
        assert shown == pytest.approx(exact.max(), rel=1e-4)


def test_prefixes_have_their_bonuses(vocabulary):
    """The plan keeps all passages, so that a prefix's bonus is the best lexical score below it."""
    docids = np.unique(np.random.default_rng(3).integers(2, 7, (60, 3)), axis=0)
    made, tokens, impacts = searcher(vocabulary, "rq_3x40", docids, len(docids), beams=30)
    made.replace_weight(0.5)
    whole, prefixes = made.search(QUERIES, 9), made.of_prefixes(2)
    assert prefixes.planning.sets.tokens_PxM is made.planning.sets.tokens_PxM  # they are there once
    different, owner_N = np.unique(docids[:, :2], axis=0, return_inverse=True)
    for query, (rows, scores) in zip(QUERIES, prefixes.find_docids(QUERIES, 9), strict=True):
        exact = exact_scores(made.model, made.params, made.vocabulary.batch([query], 6)[0], different)
        best = np.zeros(len(different))
        np.maximum.at(best, owner_N, lexical_scores(made, tokens, impacts, query))
        sums = 0.5 * exact + best
        order = np.argsort(-sums)
        assert [docids[row, :2].tolist() for row in rows if row >= 0] == different[order].tolist()
        # Float32 rounds the terms, of different signs, and their sum may be near 0.
        rounding = 2e-5 * (0.5 * np.abs(exact) + best)[order]
        np.testing.assert_array_less(np.abs(scores[: len(sums)] - sums[order]), rounding)
    assert made.search(QUERIES, 9) == whole


def test_a_passage_more_compiles_nothing(vocabulary):
    """Nor a docid that two passages share for the first time."""
    docids = np.unique(np.random.default_rng(3).integers(2, 7, (30, 3)), axis=0)
    made, *_ = searcher(vocabulary, "rq_3x40", docids, len(docids))
    tables = [
        dataclasses.replace(
            made.table, tokens_NxL=docids[rows], passage_ids=made.table.passage_ids.slice(0, len(rows))
        )
        for rows in (np.arange(20), np.arange(21), np.array([*range(21), 4]))
    ]
    made.replace(tables[0])
    made.search(QUERIES, 5)
    compiled = made._decode._cache_size()
    for table in tables[1:]:
        made.replace(table)
        assert all(made.search(QUERIES, 5))
    assert made._decode._cache_size() == compiled


def test_atomic_docids_are_all_scored(vocabulary):
    docids = np.random.default_rng(1).permutation(np.arange(2, 32))[:, None]
    made, tokens, impacts = searcher(vocabulary, "atomic", docids, 30, sequential_weight=0.5)
    for query, ranking in zip(QUERIES, made.search(QUERIES, 30), strict=True):
        exact = exact_scores(made.model, made.params, made.vocabulary.batch([query], 6)[0], docids)
        sums = 0.5 * exact + lexical_scores(made, tokens, impacts, query)
        assert [passage for passage, _ in ranking] == [f"p{row}" for row in np.argsort(-sums)]
        np.testing.assert_allclose([s for _, s in ranking], np.sort(sums)[::-1], rtol=1e-4, atol=1e-4)
        (given,) = made.score([query], [[*(f"p{row}" for row in range(30)), "none"]])
        np.testing.assert_allclose(given, [*sums, np.nan], rtol=1e-4, atol=1e-4)


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
        candidates = [["p7", "p80", "none"]] * 3
        scores = [made.score(QUERIES, candidates) for made in (alone, shared)]
        np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)
        weights = shared._weights(shared.params, shared._batch(QUERIES[:2]))
        lexical = shared._scores(weights, shared.planning, np.zeros((len(weights), 32), np.int32))
        # Else a process of several could not read them.
        assert weights.is_fully_replicated
        assert lexical.is_fully_replicated
    print("equal")


def test_eight_devices_find_what_one_finds(tmp_path):
    devices = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    tests = Path(__file__).parents[1]
    script = "import sys; sys.path[:0] = sys.argv[2:]; import test_planned as test; "
    script += "test.check_eight_devices(sys.argv[1])"
    folders = map(str, (tests, tests / "search", tests / "decoding"))
    command = [sys.executable, "-c", script, str(tmp_path / "sentencepiece.model"), *folders]
    result = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True, check=False)
    assert result.stdout == "equal\n", result.stderr


def test_a_network_that_computes_in_bfloat16_plans_as_well(vocabulary):
    docids = np.unique(np.random.default_rng(2).integers(2, VOCABULARY, (40, 3)), axis=0)
    made, tokens, impacts = searcher(
        vocabulary, "rq_3x40", docids, 40, dtype="bfloat16", plan_size=40, beams=40
    )
    exactly, *_ = searcher(vocabulary, "rq_3x40", docids, 40)  # the same network in float32
    for weight in (0.0, 1.0):
        made.replace_weight(weight)
        for query, ranking in zip(QUERIES, made.search(QUERIES, 5), strict=True):
            tokens_S = made.vocabulary.batch([query], 6)[0]
            sums = weight * exact_scores(exactly.model, exactly.params, tokens_S, docids)
            sums += lexical_scores(made, tokens, impacts, query)
            rtol = 0.15 if weight else 0.01  # random weights that are so large round much
            np.testing.assert_allclose([s for _, s in ranking], np.sort(sums)[::-1][:5], rtol=rtol)


def test_passages_without_a_set_are_named(vocabulary):
    made, *_ = searcher(vocabulary, "rq_2x9", DOCIDS[:5], 5)
    made.all_sets = dataclasses.replace(
        made.all_sets, passage_ids=arrow_ids.array(["p0", "p1", "p2", "p3", "x"])
    )
    with pytest.raises(UserError, match=r"sets: passage 'p4' has none: make the sets again"):
        made.replace(made.table)


def test_a_searcher_is_made_opened_exported_and_compiled_for_others(
    own_work, arguments, collection, cli, tmp_path
):
    """Its weight is chosen on dev queries; what is exported finds the same, also as StableHLO."""
    work, arguments = own_work, [*arguments, f"--gin.WORK_DIR='{own_work.folder}'"]
    status, made, err = cli("docids", *arguments, "--gin.DOCIDS='naive_digits'")
    assert status == 0, err
    table, vocabulary = DocidTable.open(made["docids"]), Vocabulary(collection.vocabulary_path)
    config = T5Config(vocabulary.size, 16, 2, 8, 32, 1, 1, lexical_head=True, **docid_softmax(table))
    model, name = GenerativeRetriever(config), "planned_digits"
    params = random_params(model)
    params["lexical_head"] = jax.tree.map(abs, params["lexical_head"])
    facts = {"docids": "naive_digits", "docids_fingerprint": table.fingerprint()}
    write_model_folder(work.model(name), model, params, collection, **facts)
    storage.write_json(work.model(name) / "settings.json", {"joint_ranking.sequential_weight": "0.5"})
    model_dir = f"--MODEL_DIR={work.model(name)}"
    settings = [model_dir, "--gin.make_index.kind='planned'", "--gin.make_index.beams=4"]
    status, _, err = cli("index", *arguments, *settings)
    assert status == 2
    assert "make_index.sets: the passages' sets of tokens are not named: make some" in err
    shape, pieces = (len(table.passage_ids), 8), vocabulary.model.get_piece_size()
    tokens = np.random.default_rng(0).integers(0, pieces, shape).astype(np.uint16)
    sets = TokenSets(tokens, None, 1.0, table.passage_ids, collection.fingerprint, vocabulary.checksum)
    storage.build_once(work.sets(name), {"made": "here"}, sets.write)
    settings += [f"--gin.SETS={name!r}", "--gin.make_index.plan_size=5"]
    status, told, err = cli("index", *arguments, *settings)
    assert status == 0, err
    assert told["sequential_weight"] in [0.5 * factor for factor in WEIGHTS]
    assert told["fitted"]["split"] == "dev"
    assert 0 < told["fitted"]["queries"] <= 200
    searching = Searcher.open(told["searcher"])
    assert searching.sequential_weight == told["sequential_weight"]
    ndcgs = {0.5 * factor: dev_ndcg(searching, collection, 0.5 * factor) for factor in WEIGHTS}
    assert told["fitted"]["nDCG@10"] == pytest.approx(max(ndcgs.values()), abs=1e-6)
    assert ndcgs[told["sequential_weight"]] == pytest.approx(max(ndcgs.values()), abs=1e-6)
    searching.replace_weight(told["sequential_weight"])
    queries = ["smooth a noisy signal", "progress bar"]
    found = searching.search(queries, 4)
    for query, ranking in zip(queries, found, strict=True):
        why = searching.explain(query, ranking)
        plan = why["plan"]
        assert plan["passages"] == 5
        lexical = dict(zip(sets.passage_ids.to_pylist(), all_lexical(searching, query, tokens), strict=True))
        best = sorted(lexical, key=lambda passage: -lexical[passage])[:5]
        assert [passage["passage"] for passage in plan["first"]] == best
        assert plan["lowest"] == pytest.approx(lexical[best[-1]], rel=1e-4)
        written = [passage for passage, _ in ranking]
        for passage in plan["first"]:
            assert passage["lexical"] == pytest.approx(lexical[passage["passage"]], rel=1e-4)
            assert (passage["followed"] == passage["tokens"]) == (passage["passage"] in written)
        for docid, (passage, score) in zip(why["docids"], ranking, strict=True):
            assert docid["lexical"] == pytest.approx(lexical[passage], rel=1e-4)
            assert docid["plan_rank"] == (best.index(passage) + 1 if passage in best else None)
            total = sum(step["log_prob"] for step in docid["steps"]) * searching.sequential_weight
            assert total + docid["lexical"] == pytest.approx(score, rel=1e-4, abs=1e-4)
            assert sum(token["score"] for token in docid["tokens"]) == pytest.approx(
                docid["lexical"], rel=1e-4
            )

    searcher_name = f"--gin.SEARCHER={Path(told['searcher']).name!r}"
    for form in ("searcher", "stablehlo"):
        output = [f"--gin.export.output={str(tmp_path / form)!r}", f"--gin.export.format={form!r}"]
        status, _, err = cli("export", *arguments, searcher_name, *output)
        assert status == 0, err
    assert Searcher.open(tmp_path / "searcher").search(queries, 4) == found
    program = stablehlo.load_program(tmp_path / "stablehlo", "search")
    arrays = [load_file(tmp_path / "stablehlo" / f"{part}.safetensors") for part in ("weights", "docids")]
    rows, scores = program.call(*arrays, vocabulary.batch(queries, 24).astype(np.int32))
    for ranking, row_K, score_K in zip(found, rows, scores, strict=True):
        assert [passage for passage, _ in ranking] == [table.passage_ids[int(row)].as_py() for row in row_K]
        np.testing.assert_allclose(score_K, [score for _, score in ranking], rtol=1e-4)

    part = ["--gin.make_index.kind='bm25'", "--gin.make_index.name='words'"]
    fused = ["--gin.make_index.kind='fused'", f"--gin.make_index.parts=('words', {searcher_name[15:]})"]
    for some in (part, [*fused, "--gin.make_index.name='both'"]):
        status, _, err = cli("index", *arguments, *some)
        assert status == 0, err
    assert all(Searcher.open(work.searcher("both")).search(queries, 4))
    status, mined, err = cli("mine", *arguments, searcher_name, "--gin.mine.prefix_lengths=(1, 2)")
    assert status == 0, err
    assert mined["queries"]

    status, _, err = cli("index", *arguments, *part, f"--gin.SETS={name!r}")
    assert status == 2
    assert "make_index.sets: only a planned or lexical searcher has sets, and this is of the kind bm25" in err
    others = dataclasses.replace(sets, tokens_PxM=np.roll(tokens, 1, axis=0))
    storage.build_once(work.sets(name), {"made": "again"}, others.write)
    with pytest.raises(UserError, match=r"sets/planned_digits: not the sets that .* was made of: `retr"):
        Searcher.open(told["searcher"])


def dev_ndcg(searching, collection, weight):
    """The mean nDCG@10 of what a searcher finds for dev queries with a weight."""
    searching.replace_weight(weight)
    queries = [query for query in collection.queries("dev") if query.relevant]
    qrels = [ir_measures.Qrel(q.id, p, grade) for q in queries for p, grade in q.relevant.items()]
    lists = searching.search([query.text for query in queries], 11)
    run = [
        ir_measures.ScoredDoc(query.id, passage, score)
        for query, ranking in zip(queries, lists, strict=True)
        for passage, score in [pair for pair in ranking if not (query.is_passage and pair[0] == query.id)][
            :10
        ]
    ]
    return ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]


def all_lexical(searching, query, tokens):
    """The lexical scores of all passages, in float64."""
    batch = {"encoder_input_tokens": searching.vocabulary.batch([query], searching.input_length)}
    weights = np.array(compiled(searching.model, "lexical_weights")(searching.params, batch), np.float64)[0]
    return np.where(tokens > 0, weights[tokens], 0).sum(axis=1)
