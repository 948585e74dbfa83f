"""Retrieval metrics, computed by the library ir_measures, so that they match the numbers of other work.

A registered metric appears in metrics.json, in the tables and in the report, without a change to another
file. The following adds one that ir_measures knows (https://ir-measur.es lists them) and one of one's own:

    register_metric("AP@100")
    register_metric("Answered", lambda qrels, run, grade: sum(bool(run.get(q)) for q in qrels) / len(qrels))

The module that does so must be imported first: in Python by `import`, on the command line by a gin file
(`--gin_file`) with the line `import MODULE`.
"""

import dataclasses
import traceback
from collections.abc import Callable, Mapping, Sequence, Set

import ir_measures
import numpy as np

from retrieval_jax.core import registry
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.trec import Qrels, RankedList, Run

MetricFunction = Callable[[Qrels, Run, int], float]
"""(qrels, run, the least relevant grade) -> the mean over the queries of `qrels`."""
Metric = ir_measures.Measure | MetricFunction
METRICS: dict[str, Metric] = {}
"""The registered metrics by name, in the order in which they are shown."""


def register_metric(name: str, metric: str | MetricFunction | None = None) -> None:
    """Adds a metric. The module's docstring shows how.

    The same measure, or a function of the same place (as when a notebook's cell runs again), replaces the one
    before.

    Args:
      name: the name to show.
      metric: its name in ir_measures, or a function. Larger values must be better, and bars in the report
        run from 0 to 1. None if `name` is its name in ir_measures.

    Raises:
      ValueError: another metric has that name, or ir_measures has no such measure.
    """
    if not callable(metric):
        try:
            metric = ir_measures.parse_measure(metric or name)
        except (NameError, ValueError, SyntaxError) as error:
            raise ValueError(f"ir_measures has no measure {metric or name!r} ({error})") from None
    registry.register(METRICS, name, metric, "the metric")


register_metric("MRR@10", "RR@10")  # Voorhees (1999), "The TREC-8 question answering track report"
register_metric("Recall@10", "R@10")
register_metric("Recall@100", "R@100")
register_metric("Hits@1", "Success@1")
register_metric("Hits@10", "Success@10")
# Järvelin and Kekäläinen (2002), "Cumulated gain-based evaluation of IR techniques". The gain is the grade
# itself, as in trec_eval, not 2^grade - 1.
register_metric("nDCG@10")


@dataclasses.dataclass(frozen=True)
class RunValues:
    """The values of a run's metrics.

    Attributes:
      means: name -> the mean over all queries of the qrels; the sum for those in `sums`.
      per_query: name -> float64 Q, the value of each query, in the order of the qrels. A registered function
        gives a mean only, and is not among them.
      sums: the names of the measures that count, such as NumRet, whose value is the sum over the queries.
    """

    means: dict[str, float]
    per_query: dict[str, np.ndarray]
    sums: Set[str] = frozenset()


def chosen_metrics(names: Sequence[str] | None = None) -> dict[str, Metric]:
    """Returns metrics by name: registered ones, or measures of ir_measures such as "RR(rel=2)@10".

    Args:
      names: the names; None or none for all that are registered.

    Raises:
      UserError: a name is of neither.
    """
    if not names:
        return dict(METRICS)
    metrics = {}
    for name in names:
        try:
            metrics[name] = METRICS.get(name) or ir_measures.parse_measure(name)
            if name not in METRICS:
                metrics[name].validate_params()
                deepest = cutoff(metrics[name])
                if deepest is not None and (isinstance(deepest, bool) or deepest < 1):
                    raise ValueError(f"its cutoff is {deepest}")
        except Exception as error:  # it evaluates the name's syntax tree, and fails in many ways
            raise UserError(
                f"evaluate.measures: {name!r} is no measure ({error}): write it as https://ir-measur.es "
                f"does, as in 'nDCG@10' or 'RR(rel=2)@10', or take one of {', '.join(METRICS)}"
            ) from None
    return metrics


def check_averages(name: str, setting: str) -> None:
    """Raises UserError if a measure is not the mean of a value for each query.

    Args:
      name: its name; see `chosen_metrics`.
      setting: the setting that names it.
    """
    metric = chosen_metrics((name,))[name]
    is_measure = isinstance(metric, ir_measures.measures.Measure)
    if not is_measure or isinstance(metric.aggregator(), ir_measures.SumAgg):
        raise UserError(f"{setting}: {name} is no mean of the queries' values: take one that is, as nDCG@10")


def compute_metrics(qrels: Qrels, run: Run, min_relevant_grade: int = 1) -> dict[str, float]:
    """Computes every registered metric as the mean over all queries of `qrels`; see `evaluate_run`."""
    return evaluate_run(qrels, run, min_relevant_grade).means


def evaluate_run(
    qrels: Qrels, run: Run, min_relevant_grade: int = 1, metrics: Mapping[str, Metric] | None = None
) -> RunValues:
    """Computes metrics of a run, for each query of `qrels` and as means over all of them.

    A query counts 0 if the run lacks it or has an empty list for it, or if it has no relevant passage.
    Queries of the run that are not in `qrels` are left out. The order of each list is the ranking; its scores
    are not compared.

    Args:
      qrels: the relevance judgements.
      run: the ranked lists.
      min_relevant_grade: the least grade of a passage that is relevant to the binary metrics (2 on TREC's
        Deep Learning tracks, as trec_eval's `-l 2`). A metric that sets its own (`P(rel=2)@5`) keeps it.
      metrics: what `chosen_metrics` gives; None for all registered metrics.

    Returns:
      The values, in [0, 1] for the metrics that are registered here.

    Raises:
      ValueError: `qrels` is empty, or a list has a passage twice.
      UserError: ir_measures lacks the program that a measure needs, or a registered function fails or returns
        no number.
    """
    if not qrels:
        raise ValueError("no judged query: the mean over no queries is not defined")
    metrics = METRICS if metrics is None else metrics
    # By numbers, as the programs behind some measures take no other ids of queries.
    number = {qid: str(i) for i, qid in enumerate(qrels)}
    judged = {number[qid]: grades for qid, grades in qrels.items()}
    scores = {number[qid]: _descending(qid, run[qid]) for qid in qrels if run.get(qid)}
    measures = {
        name: _with_grade(metric, min_relevant_grade)
        for name, metric in metrics.items()
        if isinstance(metric, ir_measures.measures.Measure)
    }
    try:
        result = ir_measures.calc(set(measures.values()), judged, scores)
    except Exception as error:  # a measure that needs Perl, or a package that is not installed
        reason = " ".join(str(error).split())
        raise UserError(f"evaluate.measures: ir_measures fails ({reason}): leave such measures out") from None
    values = {measure: np.zeros(len(qrels)) for measure in measures.values()}
    for value in result.per_query:
        values[value.measure][int(value.query_id)] = value.value
    return RunValues(
        {
            name: float(result.aggregated[measures[name]])
            if name in measures
            else _of_function(name, metric, qrels, run, min_relevant_grade)
            for name, metric in metrics.items()
        },
        {name: values[measure] for name, measure in measures.items()},
        {name for name, measure in measures.items() if isinstance(measure.aggregator(), ir_measures.SumAgg)},
    )


def _of_function(name: str, metric: MetricFunction, qrels: Qrels, run: Run, grade: int) -> float:
    """Returns a function's metric. Raises UserError, with the metric's name, if it fails or is no number."""
    try:
        value = metric(qrels, run, grade)
    except UserError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"metric {name}: {type(error).__name__}: {error} ({last.filename}:{last.lineno}): "
            "mend the function that register_metric was given"
        ) from error
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"metric {name}: {value!r} is not a number: return the queries' mean") from None


def cutoff(metric: Metric) -> int | None:
    """Returns the rank down to which a metric looks; None for all of a run, 0 for a registered function."""
    return metric.params.get("cutoff") if isinstance(metric, ir_measures.measures.Measure) else 0


def _with_grade(measure: ir_measures.Measure, grade: int) -> ir_measures.Measure:
    """Sets the least relevant grade of a binary measure, unless the measure has its own.

    Measures whose `rel` has no default (NumRet, RBP) mean something else without it.
    """
    rel = measure.SUPPORTED_PARAMS.get("rel")
    binary = rel is not None and rel.default == 1 and "rel" not in measure.params
    return measure(rel=grade) if binary else measure


def _descending(qid: str, ranked_list: RankedList) -> dict[str, float]:
    """Returns passage id -> a score that puts the passages into the list's order, without ties.

    Evaluators sort by score, and trec_eval compares scores as float32 with ties broken by id, so that scores
    a hair apart would change places. Whole numbers are exact in float32 up to 16 million.
    """
    scores = {pid: float(len(ranked_list) - i) for i, (pid, _) in enumerate(ranked_list)}
    if len(scores) != len(ranked_list):
        raise ValueError(f"query {qid!r}: a passage is ranked twice")
    return scores
