"""BM25 and TF-IDF sets against scores that are computed in float64 from the texts, and their files."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import storage
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids import term_weights
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.search import bm25_index


@pytest.fixture(scope="module")
def counts(collection: Collection) -> list[Counter]:
    vocabulary = Vocabulary(collection.vocabulary_path)
    texts = [passage.full_text for passage in collection.passages()]
    return [Counter(vocabulary.encode(text)) for text in texts]


@pytest.fixture(scope="module")
def idf(counts: list[Counter]) -> dict[int, float]:
    df = Counter(token for count in counts for token in count)
    return {token: math.log(1 + (len(counts) - n + 0.5) / (n + 0.5)) for token, n in df.items()}


def parts(counts: list[Counter], name: str) -> list[dict[int, float]]:
    if name == "tf_idf":
        most = 1 + math.log(max(n for count in counts for n in count.values()))
        return [{token: (1 + math.log(n)) / most for token, n in count.items()} for count in counts]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(lengths)
    return [
        {token: n / (n + 0.9 * (0.6 + 0.4 * length / mean)) for token, n in count.items()}
        for count, length in zip(counts, lengths, strict=True)
    ]


@pytest.mark.parametrize("name", ["bm25", "tf_idf"])
def test_sets_are_the_tokens_of_highest_weight(
    name: str, collection: Collection, counts: list[Counter], idf: dict, tmp_path: Path, monkeypatch
):
    """BM25's in shards of a size that does not divide the passages, by several processes."""
    monkeypatch.setattr(term_weights, "SHARD", 60 if name == "bm25" else 100)
    m = 40

    def make(folder: Path) -> dict:
        return term_weights.write_sets(folder, collection, name, m, with_impacts=True)

    storage.build_once(tmp_path / "sets", {}, make)
    sets = TokenSets.open(tmp_path / "sets")
    assert sets.passage_ids.equals(collection.ids)
    assert max(map(len, counts)) > m > min(map(len, counts))
    for tokens, impacts, part in zip(sets.tokens_PxM, sets.impacts_PxM, parts(counts, name), strict=True):
        pieces = [token for token in part if token > 2]  # not the unknown piece
        wanted = sorted(pieces, key=lambda t: (-idf[t] * part[t], t))[:m]
        weights = [idf[t] * part[t] for t in tokens[tokens > 0]]
        np.testing.assert_allclose(weights, [idf[t] * part[t] for t in wanted], rtol=1e-5)  # but for ties
        half_a_level = sets.impact_scale / 2 + 1e-7
        given = impacts[: len(wanted)] * sets.impact_scale
        np.testing.assert_allclose(given, [part[t] for t in tokens[: len(wanted)]], atol=half_a_level)
        assert not tokens[len(wanted) :].any()


def test_idf_is_that_of_the_passages(collection: Collection, idf: dict, monkeypatch):
    vocabulary = Vocabulary(collection.vocabulary_path)
    got = term_weights.token_idf(collection, vocabulary)
    assert (got.shape, got.dtype) == ((vocabulary.size,), np.float32)
    pieces = [token for token in idf if token > 2]
    np.testing.assert_allclose(got[pieces], [idf[token] for token in pieces], rtol=1e-6)
    monkeypatch.setattr(term_weights, "SAMPLE", 40)  # every third passage
    assert not np.array_equal(term_weights.token_idf(collection, vocabulary), got)


def test_constants_are_those_of_the_searcher_bm25():
    assert (term_weights.K1, term_weights.B) == (bm25_index.K1, bm25_index.B)
