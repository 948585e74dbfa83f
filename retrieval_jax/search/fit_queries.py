"""The queries that a searcher's weights are chosen with: never those that figures are reported on."""

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.search.index_inputs import IndexSettings

QUERIES = 1000  # at most
REPORTED = "test"  # the split that figures are reported on


def check_fit_split(split: str | None) -> None:
    """Raises UserError if weights would be chosen with the queries that figures are reported on."""
    if split == REPORTED:
        raise UserError(
            f"make_index.fit_split: {REPORTED!r} is what figures are reported on: choose weights with "
            "another split, or with none (None)"
        )


def fit_recipe(collection: Collection, split: str | None) -> dict:
    """Returns the part of a searcher's recipe for its fit queries: "queries", their fingerprint by split."""
    fingerprint = collection.query_fingerprints.get(split)
    return {"queries": {split: fingerprint}} if fingerprint else {}


def fit_queries(collection: Collection, split: str | None, kind: str, otherwise: str) -> list[Query]:
    """Returns the queries to choose weights with: at most QUERIES, chosen by a hash of their ids.

    Queries without relevant passages are left out.

    Args:
      collection: the collection.
      split: the split of the queries; None for none.
      kind: of the searcher, for what is reported.
      otherwise: what is so if there are no queries, for what is reported.

    Raises:
      UserError: there is no such split, and it is not the default one.
    """
    if split is None:
        return []
    counts = collection.query_counts
    if not counts.get(split) and split != IndexSettings.fit_split:
        known = ", ".join(name for name, count in counts.items() if count and name != REPORTED)
        raise UserError(
            f"make_index.fit_split: no queries of split {split!r}: choose one of {known or 'none'}, or "
            f"None ({otherwise})"
        )
    queries = [query for query in collection.queries(split) if query.relevant] if counts.get(split) else []
    if not queries:
        log(f"{kind}: no queries of split {split!r} to choose weights with: {otherwise}")
    elif REPORTED not in counts:
        log(
            f"{kind}: weights are chosen with queries of {split!r}, and there is no {REPORTED!r}: figures of "
            f"{split!r} are not of unseen queries (with make_index.fit_split=None {otherwise})"
        )
    return sorted(queries, key=lambda query: storage.hash_fraction(query.id))[:QUERIES]
