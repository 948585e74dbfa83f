"""Smaller collections, chosen as the paper chose MSMarco100k and MSMarco1M."""

from collections.abc import Mapping

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.data.sources.judged import FindRows


def choose(
    count: int, queries: Mapping[str, list[Query]], rows: FindRows, size: int, seed: int
) -> np.ndarray:
    """int64 rows, ascending: `size` of `count` passages (all, where there are not more).

    First every passage that is relevant to a query of a split other than train, then as many as fit of those
    relevant to train queries, then of the others, both in a random order that `seed` sets. Raises UserError
    where the first alone are more than `size`.
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
    """Queries with the positives and negatives that `rows` knows; without train queries that lose every one.

    `choose` keeps all that is relevant to the others, of which some may have been judged without a positive.
    """
    kept: dict[str, list[Query]] = {}
    for split, some in queries.items():
        ids = [p for q in some for p in (*q.positives, *q.negatives)]
        known = iter((rows(ids) >= 0).tolist())
        cut = (
            Query(
                query.id,
                query.text,
                {passage: grade for passage, grade in query.positives.items() if next(known)},
                tuple(passage for passage in query.negatives if next(known)),
                query.label,
                query.missing,
            )
            for query in some
        )
        if judged := [query for query in cut if query.positives or split != "train"]:
            kept[split] = judged
    return kept
