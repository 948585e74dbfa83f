"""Retrieval metrics, computed by the library ir_measures so that they match everybody else's numbers."""

import ir_measures
from ir_measures import RR, R, Success, nDCG

from retrieval_jax.evaluation.trec import Qrels, Run

METRICS: dict[str, ir_measures.Measure] = {
    "MRR@10": RR,
    "Recall@10": R,
    "Recall@100": R,
    "Hits@1": Success,
    "Hits@10": Success,
    "nDCG@10": nDCG,
}
"""Our name -> the library's measure, without the cutoff, in display order. nDCG's gain is the grade itself
(as in trec_eval, not 2^grade - 1); to the others, which are binary, a passage is relevant from a grade on."""


def compute_metrics(qrels: Qrels, run: Run, min_relevant_grade: int = 1) -> dict[str, float]:
    """Returns each metric of METRICS, in [0, 1], as the mean over all queries of `qrels`.

    A query that is missing from the run, or has an empty list, or has no relevant passage, counts 0; a query
    of the run without an entry in `qrels` is left out. The order of each list is the ranking: its scores are
    not looked at.

    Args:
      qrels, run: the judgements and the results.
      min_relevant_grade: the least grade that is relevant to the binary measures (2 on TREC's Deep Learning
        tracks, as trec_eval's `-l 2`).

    Raises ValueError where `qrels` is empty or a list holds a passage twice.
    """
    if not qrels:
        raise ValueError("no judged query: the mean over no queries is not defined")
    ranking = {qid: _descending(qid, run.get(qid, [])) for qid in qrels}
    measures = {}
    for name, measure in METRICS.items():
        graded = measure if measure is nDCG else measure(rel=min_relevant_grade)
        measures[name] = graded @ int(name.partition("@")[2])
    means = ir_measures.calc_aggregate(measures.values(), qrels, ranking)
    return {name: float(means[measure]) for name, measure in measures.items()}


def _descending(qid: str, results: list[tuple[str, float]]) -> dict[str, float]:
    """Passage id -> score that puts the passages in the list's order, without ties.

    The evaluators sort by score, and trec_eval compares them as float32 with ties broken by id, so scores a
    hair apart would change places. Whole numbers are exact in float32 up to 16 million.
    """
    scores = {pid: float(len(results) - i) for i, (pid, _) in enumerate(results)}
    if len(scores) != len(results):
        raise ValueError(f"query {qid!r}: a passage is ranked twice")
    return scores
