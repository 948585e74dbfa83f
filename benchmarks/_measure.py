"""The nDCG@10 of the test queries that searchers of a work folder have answered."""

from collections.abc import Iterable

import numpy as np

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.data.trec import drop_identical_ids, read_run
from retrieval_jax.evaluation.metrics import chosen_metrics, evaluate_run


def ndcg_of_queries(work: Workspace, searchers: Iterable[str]) -> dict[str, np.ndarray]:
    """Searcher -> the nDCG@10 of each test query, in the collection's order."""
    queries = Collection(work.collection).queries("test")
    qrels = {query.id: query.relevant for query in queries}
    identical = {query.id for query in queries if query.is_passage}
    metrics = chosen_metrics(["nDCG@10"])
    runs = {name: drop_identical_ids(read_run(work.run(name, "test")), identical) for name in searchers}
    return {
        name: evaluate_run(qrels, run, metrics=metrics).per_query["nDCG@10"] for name, run in runs.items()
    }
