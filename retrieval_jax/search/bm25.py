"""The lexical baseline: BM25, computed by the library bm25s."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import bm25s
import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import track
from retrieval_jax.data.collection import Passage
from retrieval_jax.search.analysis import DEFAULT_LANGUAGE, VERSION, analyzer, languages, pairs_with
from retrieval_jax.search.searcher import IndexInputs, RankedList, Searcher, register_searcher

logging.getLogger("bm25s").setLevel(logging.ERROR)  # the library sets it to DEBUG when it is imported


@register_searcher
class BM25Searcher(Searcher):
    """BM25 over the terms of title and text; see `analysis` for what the terms are.

    The variant is Lucene's with k1 0.9 and b 0.4 (Kamphuis et al. 2020, "Which BM25 do you mean?", table 1;
    the parameters are Anserini's defaults).

    Args:
      index: the library's index.
      passage_ids: the passage ids by the index's row.
      language: the language of the analysis, which must be that of the index.
    """

    kind: ClassVar[str] = "bm25"
    family: ClassVar[str] = "lexical"

    def __init__(
        self, index: bm25s.BM25, passage_ids: Sequence[str], language: str | None = DEFAULT_LANGUAGE
    ):
        self.index, self.passage_ids = index, arrow_ids.array(passage_ids)
        self.find_rows = arrow_ids.RowFinder(self.passage_ids)
        self.analyze = analyzer(language)

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`. Passages without a term of the query are not found."""
        if not queries:
            return []
        k = min(k, len(self.passage_ids))
        ranked_lists = []
        for query in queries:
            scores_N = self._scores(query)
            rows = top_rows(scores_N, k)
            ids = self.passage_ids.take(pa.array(rows)).to_pylist()
            ranked_lists.append(list(zip(ids, scores_N[rows].tolist(), strict=True)))
        return ranked_lists

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`. A passage without a term of the query has 0."""
        results = []
        for query, wanted in zip(queries, candidates, strict=True):
            rows, scores_N = np.array(self.find_rows(wanted), int), self._scores(query)
            results.append(np.where(rows < 0, np.nan, scores_N[rows]).tolist() if wanted else [])
        return results

    def _scores(self, query: str) -> np.ndarray:
        """Returns each passage's score, float32."""
        terms = self.analyze(query)
        if len(terms) == 1:  # in a longer query, the many pairs would outweigh the other terms
            terms += pairs_with(terms[0], self.index.vocab_dict)
        return self.index.get_scores(terms) if terms else np.zeros(len(self.passage_ids), np.float32)

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the analysis."""
        language = inputs.settings.language
        if language not in (None, *languages()):
            known = ", ".join(languages())
            raise UserError(f"make_index.language: no language {language!r}: choose one of {known}, or None")
        return {"language": language, "analysis": VERSION}

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`."""
        passages = track(inputs.passages(), "BM25", inputs.collection.passage_count)
        cls.write_passages(folder, passages, inputs.settings.language)
        return {}

    @staticmethod
    def write_passages(
        folder: Path, passages: Iterable[Passage], language: str | None = DEFAULT_LANGUAGE
    ) -> None:
        """Indexes passages in a language; writes the index and their ids into a folder."""
        ids, terms, analyze = [], [], analyzer(language)
        for passage in passages:
            ids.append(passage.id)
            terms.append(analyze(passage.full_text))
        if not any(terms):
            raise UserError(_without_terms(language))
        index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
        index.index(terms, show_progress=False)
        index.save(folder / "bm25")
        arrow_ids.write(folder / "ids.arrow", ids)

    @classmethod
    def open(cls, folder: Path, make_partitioner: object = None) -> "BM25Searcher":
        """See `Searcher.open`. No device is needed, and `make_partitioner` is not called."""
        folder = paths.ensure_local(folder)
        manifest = storage.read_manifest(folder, "index")
        if manifest.get("analysis") != VERSION:
            raise UserError(f"{folder}: indexed with another version of the analysis: `retrieval-jax index`")
        index = bm25s.BM25.load(folder / "bm25")
        return cls(index, arrow_ids.read(folder / "ids.arrow"), manifest["language"])


def _without_terms(language: str | None) -> str:
    if language is None:
        return "make_index: no passage has a term: the texts hold no letter or digit: import others"
    return (
        f"make_index.language: no passage has a term in {language!r} but stop words: "
        "index them as they are: --gin.make_index.language=None"
    )


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
