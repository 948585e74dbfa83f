"""Smaller collections, chosen in the way in which the paper chose MSMarco100k and MSMarco1M."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.data.sources.judged import FindRows


def choose(
    count: int, queries: Mapping[str, list[Query]], rows: FindRows, size: int, seed: int
) -> np.ndarray:
    """Chooses the passages of a subset.

    These are first all passages that are relevant to a query of a split other than train, then as many as fit
    of those relevant to train queries, and then of the others, both in a random order.

    Args:
      count: the number of passages.
      queries: split -> its queries.
      rows: finds the rows of passage ids.
      size: the number of passages to choose; all are chosen if there are not more.
      seed: the seed of the random order.

    Returns:
      int64 rows, ascending.

    Raises:
      UserError: the passages that are relevant to dev and test queries are more than `size`.
    """
    chosen = np.zeros(count, bool)
    relevant = {split: rows([p for q in some for p in q.positives]) for split, some in queries.items()}
    for split, some in relevant.items():
        if split != "train":
            chosen[some] = True
    if (needed := int(chosen.sum())) > size:
        raise UserError(
            f"SUBSET: {size:,} passages are too few for the {needed:,} that are relevant to dev and test "
            "queries: choose more, or fewer splits"
        )
    rng = np.random.default_rng(seed)
    for pool in (relevant.get("train", []), range(count)):
        left = np.setdiff1d(pool, np.flatnonzero(chosen)).astype(np.int64)
        chosen[rng.permutation(left)[: size - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def keep(queries: Mapping[str, list[Query]], rows: FindRows) -> dict[str, list[Query]]:
    """Restricts queries to the judgements of passages that `rows` finds.

    Train queries that lose all their positives are left out. `choose` keeps every passage that is relevant to
    the other splits, of which a query may have been judged without a positive.

    Args:
      queries: split -> its queries.
      rows: finds the rows of passage ids; -1 is a passage that was not chosen.

    Returns:
      Split -> its queries, without empty splits.
    """
    kept: dict[str, list[Query]] = {}
    for split, some in queries.items():
        ids = [p for q in some for p in (*q.positives, *q.negatives)]
        known = iter((rows(ids) >= 0).tolist())
        cut = (
            dataclasses.replace(
                query,
                positives={passage: grade for passage, grade in query.positives.items() if next(known)},
                negatives=tuple(passage for passage in query.negatives if next(known)),
            )
            for query in some
        )
        if judged := [query for query in cut if query.positives or split != "train"]:
            kept[split] = judged
    return kept
