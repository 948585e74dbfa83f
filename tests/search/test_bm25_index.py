"""BM25's index against the library's own, its formula in float64, and its files in other hands."""

import functools
import math
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.search import bm25_index
from retrieval_jax.search.analysis import analyzer
from retrieval_jax.search.bm25_index import Index, write_index

FILES = {
    "terms.arrow",
    *(f"bm25/{name}.csc.index.npy" for name in ("data", "indices", "indptr")),
}


def texts_of_shards() -> list[list[str]]:
    """Words as uneven as in texts; passages without a term, a long one, shards of few and of no passages."""
    rng = np.random.default_rng(0)
    words = [*(f"w{i}" for i in range(400)), "naïve", "日本語", "o'neil"]
    words = np.array(words)[rng.permutation(len(words))]
    share = 1 / (np.arange(len(words)) + 3)

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length, p=share / share.sum()))

    shards = [[text(length) for length in rng.integers(1, 60, 50)] for _ in range(3)]
    return [shards[0], ["", "the", "!?"], shards[1], [], ["of " * 9, text(100_000), "naïve"], shards[2]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An index of six shards and some twenty ranges of terms, made by several processes; and the texts."""
    folder, shards = tmp_path_factory.mktemp("index"), texts_of_shards()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25_index, "BLOCK", 200)
        write_index(folder, [functools.partial(list, shard) for shard in shards], "porter")
    return folder, [text for shard in shards for text in shard]


def dense(starts: np.ndarray, rows: np.ndarray, scores: np.ndarray, passages: int) -> np.ndarray:
    """The matrix of a library's or our arrays, a row for each column of theirs."""
    matrix = np.zeros((len(starts) - 1, passages), np.float32)
    matrix[np.repeat(np.arange(len(starts) - 1), np.diff(starts)), rows] = scores
    return matrix


def test_scores_are_those_of_the_library(built):
    folder, texts = built
    index = Index.open(folder)
    library = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    library.index([analyzer()(text) for text in texts], show_progress=False)
    library.vocab_dict.pop("", None)  # the library adds it, for queries without a known word
    assert index.terms.to_pylist() == sorted(library.vocab_dict)
    scores = library.scores
    expected = dense(scores["indptr"], scores["indices"], scores["data"], len(texts))
    expected = expected[[library.vocab_dict[term] for term in index.terms.to_pylist()]]
    np.testing.assert_array_equal(dense(index.starts, index.rows, index.scores, len(texts)), expected)
    assert all((np.diff(index.postings(column)[0]) > 0).all() for column in range(len(index.terms)))


def test_scores_are_those_of_the_formula(built):
    """Kamphuis et al. 2020, table 1, in float64."""
    folder, texts = built
    index = Index.open(folder)
    documents = [Counter(analyzer()(text)) for text in texts]
    lengths = [document.total() for document in documents]
    mean = sum(lengths) / len(lengths)
    for column, term in enumerate(index.terms.to_pylist()):
        assert index.column(term) == column
        rows, scores = index.postings(column)
        assert rows.tolist() == [row for row, document in enumerate(documents) if term in document]
        idf = math.log(1 + (len(texts) - len(rows) + 0.5) / (len(rows) + 0.5))
        norms = [0.9 * (1 - 0.4 + 0.4 * lengths[row] / mean) for row in rows]
        counts = [documents[row][term] for row in rows]
        expected = [idf * tf / (tf + norm) for tf, norm in zip(counts, norms, strict=True)]
        np.testing.assert_allclose(scores, expected, rtol=3e-7)


def test_a_term_that_no_passage_has_is_in_no_column(built):
    index = Index.open(built[0])
    assert [index.column(term) for term in ("", "w", "zzz", "語語")] == [None] * 4
    assert [*index.terms_with("日")] == ["日本"]


def test_the_library_reads_the_files_and_nothing_else_is_left(built):
    folder, texts = built
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES
    library = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    library.load_scores(folder / "bm25", num_docs=len(texts), mmap=True)
    library.nonoccurrence_array = None
    index = Index.open(folder)
    columns = [index.column(term) for term in ("w1", "w7", "w1")]
    expected = np.zeros(len(texts), np.float32)
    for column in columns:
        rows, scores = index.postings(column)
        expected[rows] += scores
    np.testing.assert_array_equal(library.get_scores_from_ids(columns), expected)


def test_texts_without_a_term_are_no_index(tmp_path: Path):
    with pytest.raises(UserError, match="no passage has a term in 'porter' but stop words"):
        write_index(tmp_path, [lambda: ["to be or not to be", ""]], "porter")
    assert not (tmp_path / "terms.arrow").exists()
