"""A metric of the queries that searchers of a work folder have answered."""

from collections.abc import Iterable

import numpy as np

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.trec import drop_identical_ids, read_run
from retrieval_jax.evaluation.metrics import chosen_metrics, evaluate_run


def values_of_queries(
    work: Workspace, searchers: Iterable[str], metric: str = "nDCG@10", split: str = "test"
) -> dict[str, np.ndarray]:
    """Searcher -> the metric of each query of a split, or of its variation, in the collection's order."""
    queries = Collection(work.collection).queries(split.partition("~")[0])
    qrels = {query.id: query.relevant for query in queries}
    identical = {query.id for query in queries if query.is_passage}
    metrics = chosen_metrics([metric])
    runs = {name: drop_identical_ids(read_run(work.run(name, split)), identical) for name in searchers}
    return {name: evaluate_run(qrels, run, metrics=metrics).per_query[metric] for name, run in runs.items()}
