"""Retrieval metrics, computed by the library ir_measures so that they match everybody else's numbers."""

import ir_measures
from ir_measures import RR, R, Success, nDCG

from retrieval_jax.evaluation.trec import Qrels, Run

METRICS: dict[str, ir_measures.Measure] = {
    "MRR@10": RR @ 10,
    "Recall@10": R @ 10,
    "Recall@100": R @ 100,
    "Hits@1": Success @ 1,
    "Hits@10": Success @ 10,
    "nDCG@10": nDCG @ 10,
}
"""Our name -> the library's measure, in display order. A passage is relevant where its grade is at least 1;
nDCG's gain is the grade itself (as in trec_eval, not 2^grade - 1)."""


def score(qrels: Qrels, run: Run) -> dict[str, float]:
    """Returns each metric of METRICS, in [0, 1], as the mean over all queries of `qrels`.

    A query that is missing from the run, or has an empty list, or has no relevant passage, counts 0; a query
    of the run without an entry in `qrels` is left out. The order of each list is the ranking: its scores are
    not looked at. Raises ValueError where `qrels` is empty or a list holds a passage twice.
    """
    if not qrels:
        raise ValueError("no judged query: the mean over no queries is not defined")
    ranking = {qid: _descending(qid, run.get(qid, [])) for qid in qrels}
    means = ir_measures.calc_aggregate(METRICS.values(), qrels, ranking)
    return {name: float(means[measure]) for name, measure in METRICS.items()}


def _descending(qid: str, results: list[tuple[str, float]]) -> dict[str, float]:
    """Passage id -> score that puts the passages in the list's order, without ties.

    The evaluators sort by score, and trec_eval compares them as float32 with ties broken by id, so scores a
    hair apart would change places. Whole numbers are exact in float32 up to 16 million.
    """
    scores = {pid: float(len(results) - i) for i, (pid, _) in enumerate(results)}
    if len(scores) != len(results):
        raise ValueError(f"query {qid!r}: a passage is ranked twice")
    return scores
