"""Exact, ScaNN and BM25 searchers against brute force; all through the one protocol."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.data.collection import Passage
from retrieval_jax.search.bm25 import BM25Searcher, _words
from retrieval_jax.search.dense import ExactSearcher, ScannSearcher


class Vectors:
    """An encoder of texts that are numbers: the text "3" is row 3 of a matrix."""

    def __init__(self, matrix: np.ndarray):
        self.matrix = matrix

    def __call__(self, texts: list[str]) -> np.ndarray:
        return self.matrix[[int(text) for text in texts]]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", [ExactSearcher, ScannSearcher])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_dense_searchers_equal_brute_force(kind, k: int, vectors: np.ndarray, tmp_path: Path):
    ids = [f"p{i}" for i in range(len(vectors))]
    kind.write_index(tmp_path, vectors)
    if kind is ExactSearcher:
        searcher = kind(Vectors(vectors), vectors, ids)
    else:
        from retrieval_jax.search.dense import scann_ops

        searcher = kind(Vectors(vectors), scann_ops().load_searcher(str(tmp_path / "scann")), ids)
    found = searcher.search(["3", "77", "3"], k)
    assert found[0] == found[2]
    for query, ranking in zip((3, 77), found[:2], strict=True):
        scores = vectors.astype(np.float64) @ vectors[query]
        order = np.argsort(-scores)[:k]
        assert [pid for pid, _ in ranking] == [f"p{i}" for i in order]
        assert [score for _, score in ranking] == pytest.approx(scores[order].tolist(), abs=1e-5)


def bm25(query: list[str], document: list[str], documents: list[list[str]]) -> float:
    """Lucene's BM25, k1 .9 and b .4, from its definition (Kamphuis et al. 2020, table 1)."""
    N, mean = len(documents), sum(map(len, documents)) / len(documents)
    counts, score = Counter(document), 0.0
    for word in query:
        df = sum(word in d for d in documents)
        idf = math.log(1 + (N - df + 0.5) / (df + 0.5))
        score += idf * counts[word] / (counts[word] + 0.9 * (1 - 0.4 + 0.4 * len(document) / mean))
    return score


def test_bm25_equals_its_formula(tmp_path: Path):
    texts = [
        "a red apple falls",
        "green apple trees grow, apple by apple",
        "the falls of the river",
        "nothing",
    ]
    passages = [Passage(f"p{i}", "", text) for i, text in enumerate(texts)]
    BM25Searcher.write(tmp_path, iter(passages))
    searcher = BM25Searcher.open(tmp_path)
    documents = _words(texts)
    for query in ("apple falls", "river", "apple apple trees", "unseen words", ""):
        (ranking,) = searcher.search([query], 10)
        scores = {f"p{i}": bm25(_words([query])[0], d, documents) for i, d in enumerate(documents)}
        expected = sorted((s for s in scores.values() if s > 0), reverse=True)
        assert [s for _, s in ranking] == pytest.approx(expected, rel=1e-4)
        assert {p for p, _ in ranking} == {p for p, s in scores.items() if s > 0}
    assert len(searcher.search(["apple", "river"], 1)) == 2
