"""The lexical baseline: BM25."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.stopwatch import tokenizing
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.search.analysis import DEFAULT_LANGUAGE, VERSION, analyzer, languages, pairs_with
from retrieval_jax.search.bm25_index import INDEX_VERSION, SHARD, Index, TextShard, write_index
from retrieval_jax.search.index_inputs import IndexInputs
from retrieval_jax.search.searcher import RankedList, Searcher, register_searcher

_BLOCK = 512  # rows of which the largest score is found at once, much faster than the rows with a score


@register_searcher
class BM25Searcher(Searcher):
    """BM25 over the terms of title and text; see `analysis` for what the terms are.

    The variant is Lucene's with k1 0.9 and b 0.4 (Kamphuis et al. 2020, "Which BM25 do you mean?", table 1;
    the parameters are Anserini's defaults).

    Args:
      index: the index.
      passage_ids: the passage ids by the index's row.
      language: the language of the analysis, which must be that of the index.
    """

    kind: ClassVar[str] = "bm25"
    family: ClassVar[str] = "lexical"

    def __init__(self, index: Index, passage_ids: Sequence[str], language: str | None = DEFAULT_LANGUAGE):
        self.index, self.passage_ids = index, arrow_ids.array(passage_ids)
        self.find_rows = arrow_ids.RowFinder(self.passage_ids)
        self.analyze = analyzer(language)

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`. Passages without a term of the query are not found."""
        scores_N = np.zeros(len(self.passage_ids), np.float32)
        ranked_lists = []
        for query in queries:
            self._add_up(query, scores_N)
            rows = top_rows(scores_N, k)
            ids = self.passage_ids.take(pa.array(rows)).to_pylist()
            ranked_lists.append(list(zip(ids, scores_N[rows].tolist(), strict=True)))
        return ranked_lists

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`. A passage without a term of the query has 0."""
        scores_N = np.zeros(len(self.passage_ids), np.float32)
        results = []
        for query, wanted in zip(queries, candidates, strict=True):
            self._add_up(query, scores_N)
            rows = np.array(self.find_rows(wanted), int)
            results.append(np.where(rows < 0, np.nan, scores_N[rows]).tolist() if wanted else [])
        return results

    def _add_up(self, query: str, scores_N: np.ndarray) -> None:
        """Overwrites an array (float32) with the scores of all passages. Unknown terms count nothing."""
        with tokenizing:
            terms = self.analyze(query)
        if len(terms) == 1:  # in a longer query, the many pairs would outweigh the other terms
            terms += pairs_with(terms[0], self.index.terms_with(terms[0]))
        scores_N.fill(0)
        for column in map(self.index.column, terms):
            if column is not None:
                np.add.at(scores_N, *self.index.postings(column))

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the analysis, and the version of the files."""
        language = inputs.settings.language
        if language not in (None, *languages()):
            known = ", ".join(languages())
            raise UserError(f"make_index.language: no language {language!r}: choose one of {known}, or None")
        return {"language": language, "analysis": VERSION, "index_version": INDEX_VERSION}

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> None:
        """See `Searcher.write`."""
        write_index(folder, _shards(inputs), inputs.settings.language)
        arrow_ids.write(folder / "ids.arrow", inputs.collection.ids)

    @classmethod
    def open(cls, folder: Path, make_partitioner: object = None) -> "BM25Searcher":
        """See `Searcher.open`. No device is needed, and `make_partitioner` is not called."""
        folder = paths.ensure_local(folder)
        manifest = storage.read_manifest(folder, "index")
        for name, version in (("analysis", VERSION), ("index_version", INDEX_VERSION)):
            if manifest.get(name) != version:
                what = "the analysis" if name == "analysis" else "the index"
                raise UserError(f"{folder}: indexed with another version of {what}: `retrieval-jax index`")
        try:
            return cls(Index.open(folder), arrow_ids.read(folder / "ids.arrow"), manifest["language"])
        except (OSError, EOFError, ValueError) as error:
            hint = "delete the folder, then `retrieval-jax index`"
            raise UserError(f"{folder}: cannot be read ({error}): {hint}") from None


def _shards(inputs: IndexInputs) -> list[TextShard]:
    """Returns functions that processes can be given, each of which reads a range of the passages."""
    expansion = inputs.expansion.folder if inputs.expansion else None
    count = inputs.collection.passage_count
    ranges = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
    return [functools.partial(_texts, inputs.collection.folder, expansion, rows) for rows in ranges]


def _texts(collection_folder: Path, expansion_folder: Path | None, rows: range) -> Iterator[str]:
    collection = Collection(collection_folder)
    if expansion_folder is None:
        passages = collection.passages(rows)
    else:
        passages = SyntheticQueries(expansion_folder).expanded(collection, rows)
    return (passage.full_text for passage in passages)


def top_rows(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Finds the rows of the k largest scores above 0.

    Which of equal scores are found does not depend on k: otherwise another k would give another order, and
    other values of the metrics.

    Args:
      scores_N: float32, the scores.
      k: rows to find.

    Returns:
      int64, at most k rows, best first; equal scores are in the order of the rows.
    """
    if k <= 0:
        return np.zeros(0, np.int64)
    blocks = len(scores_N) // _BLOCK
    rows = np.arange(blocks * _BLOCK, len(scores_N))
    if blocks:  # k blocks have a largest score of at least `least`, so no lower one is among the k largest
        maxima = scores_N[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(1)
        least = _kth_largest(maxima, k) if blocks > k else 0
        some = np.flatnonzero((maxima > 0) & (maxima >= least))
        rows = np.concatenate([(some[:, None] * _BLOCK + np.arange(_BLOCK)).ravel(), rows])
    scores = scores_N[rows]
    rows, scores = rows[scores > 0], scores[scores > 0]
    if len(rows) > k:
        largest = scores >= _kth_largest(scores, k)
        rows, scores = rows[largest], scores[largest]
    return rows[np.argsort(-scores, kind="stable")][:k]


def _kth_largest(values: np.ndarray, k: int) -> np.float32:
    return np.partition(values, len(values) - k)[len(values) - k]
