"""The lexical baseline: BM25, through bm25s."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import bm25s
import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths
from retrieval_jax.data.collection import Passage
from retrieval_jax.data.vocabulary import valid_text
from retrieval_jax.search.searcher import RankedList

logging.getLogger("bm25s").setLevel(logging.ERROR)  # it sets itself to DEBUG when imported


class BM25Searcher:
    """BM25 (Lucene's variant, k1 0.9, b 0.4) over title and text; no stop words, no stemming."""

    kind = "bm25"

    def __init__(self, index: bm25s.BM25, passage_ids: Sequence[str]):
        self.index, self.passage_ids = index, arrow_ids.array(passage_ids)

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See Searcher. Passages without a word of the query are left out."""
        if not queries:
            return []
        k = min(k, len(self.passage_ids))
        rankings = []
        for words in _words(queries):
            scores_N = self.index.get_scores(words) if words else np.zeros(0, np.float32)
            rows = best_rows(scores_N, k)
            ids = self.passage_ids.take(pa.array(rows)).to_pylist()
            rankings.append(list(zip(ids, scores_N[rows].tolist(), strict=True)))
        return rankings

    @staticmethod
    def write(folder: Path, passages: Iterable[Passage]) -> None:
        """Indexes passages into a folder."""
        ids, texts = [], []
        for passage in passages:
            ids.append(passage.id)
            texts.append(passage.full_text)
        index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
        index.index(_words(texts), show_progress=False)
        index.save(folder / "bm25")
        arrow_ids.write(folder / "ids.arrow", ids)

    @classmethod
    def open(cls, folder: Path, make_mesh: object = None) -> "BM25Searcher":
        """Opens a folder that `index` made. It needs no device; `make_mesh` is not called."""
        folder = paths.ensure_local(folder)
        index = bm25s.BM25.load(folder / "bm25")
        return cls(index, arrow_ids.read(folder / "ids.arrow"))


def best_rows(scores_N: np.ndarray, k: int) -> np.ndarray:
    """int64, the rows of the k largest scores above 0, best first; equal scores are in the rows' order.

    The library's own top-k leaves it to chance which of equal scores are found: another K then gives another
    order, and other measures.
    """
    rows = np.flatnonzero(scores_N > 0)
    if len(rows) > k:
        least = np.partition(scores_N[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores_N[rows] >= least]
    return rows[np.argsort(-scores_N[rows], kind="stable")][:k]


def _words(texts: Sequence[str]) -> list[list[str]]:
    return bm25s.tokenize(list(map(valid_text, texts)), stopwords=None, return_ids=False, show_progress=False)
