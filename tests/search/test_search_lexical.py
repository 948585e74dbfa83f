"""The learned-sparse searcher: BM25 of the vocabulary's tokens before training, and brute force."""

import math
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from model_folders import initial_params, write_model_folder

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.term_weights import token_idf
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.main import run
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.search.lexical import LexicalSearcher
from retrieval_jax.search.searcher import Searcher


@pytest.fixture(scope="module")
def lexical_work(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """An untrained lexical encoder, whose gains are the IDF, and its searcher with BM25's sets."""
    work = Workspace(tmp_path_factory.mktemp("lexical") / "work")
    work.folder.mkdir()
    work.collection.symlink_to(collection.folder)
    vocabulary = Vocabulary(collection.vocabulary_path)
    sizes = {"branch_init_scale": 1e-3, "embedding_init_std": 0.05}
    model = LexicalEncoder(T5Config(vocabulary.size, 128, 2, 8, 16, 0, 1, **sizes))
    params = initial_params(model)
    # All rows of the same length, so that a token's weight is its gain to the last bits.
    table = np.asarray(params["token_embedder"]["embedding"])
    table = 0.05 * table / np.sqrt(np.mean(table**2, axis=1, keepdims=True))
    params["token_embedder"]["embedding"] = jax.numpy.asarray(table)
    params["lexical_head"]["gain"] = jax.numpy.asarray(token_idf(collection, vocabulary))
    write_model_folder(work.model("lexical"), model, params, collection)
    verb(work, "sets", m=48)
    verb(work, "index", MODEL_DIR=work.model("lexical"))
    return work


def verb(work: Workspace, name: str, **values: object) -> dict:
    own = {"sets": "make_sets", "index": "make_index"}.get(name, name)
    settings = {"WORK_DIR": str(work.folder)}
    for key, value in values.items():
        settings[key if key.isupper() else f"{own}.{key}"] = str(value) if isinstance(value, Path) else value
    return run(name, [], [f"{key} = {value!r}" for key, value in settings.items()])


@pytest.fixture(scope="module")
def queries(collection: Collection) -> list[str]:
    return [query.text for query in collection.queries("test")]


def test_an_untrained_head_with_bm25_sets_is_bm25(
    lexical_work: Workspace, collection: Collection, queries: list
):
    """Over the pieces that sets keep, in float64; impacts are rounded to 1/255."""
    vocabulary = Vocabulary(collection.vocabulary_path)
    counts = [Counter(vocabulary.encode(passage.full_text)) for passage in collection.passages()]
    lengths = [count.total() for count in counts]
    mean, df = sum(lengths) / len(lengths), Counter(token for count in counts for token in count)
    idf = {token: math.log(1 + (len(counts) - n + 0.5) / (n + 0.5)) for token, n in df.items()}
    searcher = Searcher.open(lexical_work.searcher("lexical"))
    ids, kept = collection.ids.to_pylist(), [set(tokens) for tokens in searcher.sets.tokens_PxM.tolist()]
    assert searcher.sets.tokens_PxM.dtype == np.uint16
    for query, found in zip(queries, searcher.search(queries, len(ids)), strict=True):
        terms = {token for token in vocabulary.batch([query], 24)[0].tolist() if token > 2 and token in df}
        error = sum(idf[t] for t in terms) / (2 * 255) + 1e-3
        assert len(found) > 5
        for passage_id, score in found:
            place = ids.index(passage_id)
            count, norm = counts[place], 0.9 * (0.6 + 0.4 * lengths[place] / mean)
            wanted = sum(idf[t] * count[t] / (count[t] + norm) for t in terms & kept[place])
            assert abs(score - wanted) < error
        assert {ids.index(p) for p, _ in found} == {n for n, tokens in enumerate(kept) if terms & tokens}


@pytest.fixture(scope="module")
def random_searchers(lexical_work: Workspace) -> list[LexicalSearcher]:
    """Random sets of 1,000 passages, with impacts and without, on one device and on a mesh."""
    rng = np.random.default_rng(0)
    opened = Searcher.open(lexical_work.searcher("lexical"))
    tokens = rng.integers(0, 500, (1000, 16)).astype(np.uint16)
    impacts = rng.integers(0, 256, tokens.shape).astype(np.uint8)
    ids = [f"p{n}" for n in range(1000)]
    made = []
    for given in (impacts, None):
        sets = TokenSets(tokens, given, 0.01 if given is not None else 1.0, arrow_ids.array(ids), "c", "v")
        made += [LexicalSearcher(opened.encoder, sets, mesh) for mesh in (None, all_devices())]
    return made


def test_the_ranking_is_that_of_all_scores(random_searchers: list[LexicalSearcher], queries: list[str]):
    """In float64; on a mesh to the last bit as without; `score` gives the same."""
    assert random_searchers[1].mesh.size == jax.device_count()
    for one, eight in (random_searchers[:2], random_searchers[2:]):
        weights = one.encoder(queries).astype(np.float64)
        tokens, impacts = np.asarray(one.sets.tokens_PxM, int), one.sets.impacts_PxM
        counted = (tokens > 0) * (1.0 if impacts is None else impacts * one.sets.impact_scale)
        found = one.search(queries, 100)
        assert found == eight.search(queries, 100)
        for query, weights_V, ranked in zip(queries, weights, found, strict=True):
            scores = (weights_V[tokens] * counted).sum(1)
            order = np.argsort(-scores, kind="stable")[:100]
            ids, got = zip(*ranked, strict=True)
            np.testing.assert_allclose(got, scores[order], rtol=1e-5)
            np.testing.assert_allclose([scores[int(name[1:])] for name in ids], scores[order], rtol=1e-5)
            (again,) = one.score([query], [[*ids[:3], "unknown"]])
            np.testing.assert_allclose(again, [*got[:3], np.nan], rtol=1e-5)
        assert one.search(queries, 7) == [ranked[:7] for ranked in found]


def test_explanations_add_up(lexical_work: Workspace, queries: list[str]):
    searcher = Searcher.open(lexical_work.searcher("lexical"))
    (found,) = searcher.search(queries[:1], 5)
    told = searcher.explain(queries[0], found)
    assert told["certain"] == len(found)
    assert [passage["passage"] for passage in told["docids"]] == [name for name, _ in found]
    pieces = {token["text"] for token in told["tokens"]}
    for passage, (_, score) in zip(told["docids"], found, strict=True):
        assert sum(token["score"] for token in passage["tokens"]) == pytest.approx(score, abs=1e-3)
        assert {token["text"] for token in passage["tokens"]} <= pieces


def test_sets_of_a_lexical_encoder_are_its_best_tokens(lexical_work: Workspace, collection: Collection):
    """By gain · weight; a changed collection encodes its new passages alone (test_encoding.py)."""
    made = verb(lexical_work, "sets", weights=lexical_work.model("lexical"), m=8, SETS="own")
    assert (made["m"], made["bytes_per_passage"]) == (8, 24)
    sets = TokenSets.open(lexical_work.sets("own"))
    vocabulary = Vocabulary(collection.vocabulary_path)
    idf = token_idf(collection, vocabulary)
    for text, tokens, impacts in zip(collection.passages(), sets.tokens_PxM, sets.impacts_PxM, strict=True):
        own = set(vocabulary.batch([text.full_text], 32)[0].tolist()) - {0, 1, 2}
        wanted = sorted(own, key=lambda t: -idf[t])[:8]
        np.testing.assert_allclose(idf[tokens], idf[wanted], rtol=1e-4)
        np.testing.assert_allclose(impacts * sets.impact_scale, 1, rtol=0.02)  # before training
    few = sets.tokens_PxM
    assert verb(lexical_work, "sets", weights=lexical_work.model("lexical"), m=5000, SETS="own")["m"] <= 5000
    all_of_them = TokenSets.open(lexical_work.sets("own")).tokens_PxM  # more than there are tokens
    assert all({*own} <= {*more} for own, more in zip(few.tolist(), all_of_them.tolist(), strict=True))


def test_what_is_exported_finds_the_same(lexical_work: Workspace, queries: list[str], tmp_path: Path):
    verb(lexical_work, "export", SEARCHER="lexical", output=tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "moved")
    found = Searcher.open(tmp_path / "moved").search(queries, 5)
    assert found == Searcher.open(lexical_work.searcher("lexical")).search(queries, 5)
    assert found[0]


def test_which_sets_are_searched(lexical_work: Workspace, capsys: pytest.CaptureFixture):
    """The only ones that there are, or those that are named; it is told if the model learned others."""
    verb(lexical_work, "sets", weights="tf_idf", m=4, impacts=False)
    model = lexical_work.model("lexical")
    with pytest.raises(UserError, match=r"make_index.sets: .* are not named: name one of .*tf_idf: --SETS"):
        verb(lexical_work, "index", MODEL_DIR=model)
    learned = {"DataConfig.sets": TokenSets.open(lexical_work.sets("tf_idf")).fingerprint()}
    storage.write_json(model / "settings.json", learned)
    made = verb(lexical_work, "index", MODEL_DIR=model, SETS="tf_idf")
    assert made["passages"] == 100
    assert "not the sets" not in capsys.readouterr().err
    verb(lexical_work, "index", MODEL_DIR=model, SETS="bm25")
    assert f"sets/bm25: not the sets that {model} was trained with" in capsys.readouterr().err
