"""Scoring passages that are given by their docids, for `Searcher.score` and `Searcher.explain`."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.docids.search_strategy import SearchStrategy
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever

CANDIDATES = 32  # rows of a query that are scored at once


def docids_of(table: DocidTable, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Finds the docids of passages.

    Args:
      table: the docids.
      rows: of the passages in the table; -1 for one that it lacks.

    Returns:
      (rows of the docid table, D of them, -1 for a passage that it lacks; the index of the passage that
      each is of).
    """
    if not table.has_several:
        return np.array(rows, int), np.arange(len(rows))
    docids = [table.docids_of(row) if row >= 0 else np.array([row]) for row in rows]
    owner_D = np.repeat(np.arange(len(rows)), [*map(len, docids)])
    return np.concatenate([*docids, np.zeros(0, int)]), owner_D


def scoring_functions(model: GenerativeRetriever, mesh: Mesh | None) -> tuple[Callable, Callable]:
    """Makes the two jitted functions that score docids that are given.

    Args:
      model: the retriever.
      mesh: the devices that parameters lie on; None for one device.

    Returns:
      ((strategy, params, batch) -> what is computed once for the queries, see `SearchStrategy.encode`;
      (strategy, params, batch, encoded, tokens_BxKxL) -> float32 B×K×L, see `SearchStrategy.token_scores`).
    """

    def encode(strategy: type[SearchStrategy], params, batch):
        return strategy.encode(model, params, batch)

    def token_scores(strategy: type[SearchStrategy], params, batch, encoded, tokens_BxKxL):
        return strategy.token_scores(model, params, batch, encoded, tokens_BxKxL)

    whole = NamedSharding(mesh, PartitionSpec()) if mesh else None
    token_scores = jax.jit(token_scores, static_argnums=0, out_shardings=whole)
    return jax.jit(encode, static_argnums=0), token_scores


def score_in_blocks(
    rows: Sequence[Sequence[int]], batch_size: int, score: Callable[[np.ndarray], jax.Array]
) -> list[np.ndarray]:
    """Scores rows for each query of a batch, CANDIDATES at once: one program fits any number of rows.

    Args:
      rows: of each query, rows of a table; -1 for none.
      batch_size: queries of the batch with its padding, B.
      score: int32 B×CANDIDATES, rows of the table -> float32 B×CANDIDATES or B×CANDIDATES×L.

    Returns:
      For each query float32, its rows (× L); NaN where there is none.
    """
    most = max(round_up(max(map(len, rows)), CANDIDATES), CANDIDATES)
    row_BxC = np.full((batch_size, most), -1, np.int32)
    for row_C, own in zip(row_BxC, rows, strict=False):
        row_C[: len(own)] = own
    blocks = np.split(np.maximum(row_BxC, 0), most // CANDIDATES, axis=1)
    scores = np.concatenate([np.asarray(score(row_BxK)) for row_BxK in blocks], axis=1)
    scores[row_BxC < 0] = np.nan
    return [of_query[: len(own)] for of_query, own in zip(scores, rows, strict=False)]
