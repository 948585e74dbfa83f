"""The lexical baseline: BM25, computed by the library bm25s."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import bm25s
import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths
from retrieval_jax.core.progress import track
from retrieval_jax.data.collection import Passage
from retrieval_jax.data.vocabulary import valid_text
from retrieval_jax.search.searcher import IndexInputs, RankedList, Searcher, register_searcher

logging.getLogger("bm25s").setLevel(logging.ERROR)  # the library sets it to DEBUG when it is imported


@register_searcher
class BM25Searcher(Searcher):
    """BM25 over title and text, without stop words and stemming.

    The variant is Lucene's with k1 0.9 and b 0.4 (Kamphuis et al. 2020, "Which BM25 do you mean?", table 1;
    the parameters are Anserini's defaults).

    Args:
      index: the library's index.
      passage_ids: the passage ids by the index's row.
    """

    kind: ClassVar[str] = "bm25"
    family: ClassVar[str] = "lexical"

    def __init__(self, index: bm25s.BM25, passage_ids: Sequence[str]):
        self.index, self.passage_ids = index, arrow_ids.array(passage_ids)

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`. Passages without a word of the query are not found."""
        if not queries:
            return []
        k = min(k, len(self.passage_ids))
        ranked_lists = []
        for words in tokenize(queries):
            scores_N = self.index.get_scores(words) if words else np.zeros(0, np.float32)
            rows = top_rows(scores_N, k)
            ids = self.passage_ids.take(pa.array(rows)).to_pylist()
            ranked_lists.append(list(zip(ids, scores_N[rows].tolist(), strict=True)))
        return ranked_lists

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`."""
        cls.write_passages(folder, track(inputs.passages(), "BM25", inputs.collection.passage_count))
        return {}

    @staticmethod
    def write_passages(folder: Path, passages: Iterable[Passage]) -> None:
        """Indexes passages; writes the index and their ids into a folder."""
        ids, texts = [], []
        for passage in passages:
            ids.append(passage.id)
            texts.append(passage.full_text)
        index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
        index.index(tokenize(texts), show_progress=False)
        index.save(folder / "bm25")
        arrow_ids.write(folder / "ids.arrow", ids)

    @classmethod
    def open(cls, folder: Path, make_partitioner: object = None) -> "BM25Searcher":
        """See `Searcher.open`. No device is needed, and `make_partitioner` is not called."""
        folder = paths.ensure_local(folder)
        index = bm25s.BM25.load(folder / "bm25")
        return cls(index, arrow_ids.read(folder / "ids.arrow"))


def top_rows(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Finds the rows of the k largest scores above 0.

    The library's own top-k leaves it to chance which of equal scores are found: another k would then give
    another order, and other values of the metrics.

    Args:
      scores_N: float32, the scores.
      k: rows to find.

    Returns:
      int64, at most k rows, best first; equal scores are in the order of the rows.
    """
    rows = np.flatnonzero(scores_N > 0)
    if len(rows) > k:
        least = np.partition(scores_N[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores_N[rows] >= least]
    return rows[np.argsort(-scores_N[rows], kind="stable")][:k]


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """Splits texts into lower-case words of two characters and more."""
    return bm25s.tokenize(list(map(valid_text, texts)), stopwords=None, return_ids=False, show_progress=False)
