"""What a report compares: metrics and their differences, what each run finds, learning curves, examples."""

import collections
import contextlib
import os
import platform
import sys
import types
from collections.abc import Mapping, Sequence, Set
from importlib import metadata
from pathlib import Path

from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.trec import Qrels, Run
from retrieval_jax.evaluation.method_table import MethodRow
from retrieval_jax.evaluation.metrics import Metric, RunValues, cutoff
from retrieval_jax.evaluation.panels import TrainingCurve
from retrieval_jax.evaluation.report import Comparison, PassageSnippet, QueryComparison
from retrieval_jax.evaluation.significance import PERMUTATIONS, Difference, compare

SNIPPET = 200  # characters of a passage that the report shows
FOUND_DEPTH = 10  # results of each query of which the report says which other methods have them
PACKAGES = (
    *("jax", "flax", "optax", "orbax-checkpoint", "seqio"),
    *("tensorflow", "scann", "bm25s", "ir-measures"),
)


def method_row(
    name: str,
    metrics: dict[str, float],
    facts: dict | None,
    too_deep: Set[str] = frozenset(),
    differences: Mapping[str, Difference] = types.MappingProxyType({}),
    cut: str | None = None,
) -> MethodRow:
    """Makes the row of a run in the table of results.

    Args:
      name: the method's name.
      metrics: its metrics, by name.
      facts: what `search` noted of the run; None for a run of another tool, of which nothing else is known.
      too_deep: the metrics that look further than the run goes.
      differences: its differences to the baseline, by metric.
      cut: where the clock ended the training; None where it did not.
    """
    facts = facts or {"family": "other", "parameters": None, "summary": {}}
    return MethodRow(
        name,
        facts["family"],
        metrics,
        facts["summary"].get("single_query_ms"),
        facts["parameters"],
        facts["summary"].get("queries_per_second"),
        too_deep=too_deep,
        differences=differences,
        cut=cut,
    )


def depth(run: Run, facts: dict | None) -> int:
    """Returns how many passages a run was to have for each query.

    Args:
      run: the run.
      facts: what `search` noted of it. Of a run of another tool the longest list tells its depth, and of a
        retriever with beams or of a fused one, whose lists may be shorter than what was asked for.
    """
    longest = max(map(len, run.values()), default=0)
    if facts is None:
        return longest
    asked = facts["recipe"]["k"]
    return min(asked, longest) if facts["family"] in ("generative", "planned", "fused") else asked


def too_deep(
    metrics: Mapping[str, Metric], depths: Mapping[str, int], passages: int
) -> dict[str, frozenset[str]]:
    """Finds the metrics that look further than a run goes: its value would be higher if the run went on.

    A metric without a cut-off looks at all of a run, so that only runs as deep as the deepest are comparable.

    Args:
      metrics: the metrics by name.
      depths: the depth of each run, by name.
      passages: the number of passages in the collection, below which no run goes.

    Returns:
      Name of a run -> names of the metrics.
    """
    deepest = max(depths.values(), default=0)

    def needed(metric: Metric) -> int:
        rank = cutoff(metric)
        return min(deepest if rank is None else rank, passages)

    return {
        name: frozenset(key for key, metric in metrics.items() if needed(metric) > found)
        for name, found in depths.items()
    }


def choose_baseline(names: Sequence[str], baseline: str | None, setting: str = "evaluate.baseline") -> str:
    """Returns the run that the others are compared with.

    Args:
      names: the names of all runs, at least one.
      baseline: the user's choice; None for bm25, or the first run by name where there is none.
      setting: the name of the setting, for the message.

    Raises:
      UserError: there is no run of that name.
    """
    if baseline is None:
        return "bm25" if "bm25" in names else min(names)
    if baseline not in names:
        raise UserError(f"{setting}: no run {baseline!r}: there are {', '.join(names)}")
    return baseline


def main_measure(values: Mapping[str, RunValues]) -> str | None:
    """Returns the measure of comparisons of one: nDCG@10, or the first that is a mean of queries' values.

    Args:
      values: name of a run -> its values.
    """
    some = next(iter(values.values()))
    names = [name for name in some.per_query if name not in some.sums]
    return "nDCG@10" if "nDCG@10" in names else next(iter(names), None)


def differences(
    values: Mapping[str, RunValues], without: Mapping[str, Set[str]], baseline: str
) -> dict[str, dict[str, Difference]]:
    """Compares all runs with the baseline, in each metric that is the mean of a value for each query.

    Args:
      values: name of a run -> its values.
      without: name of a run -> the metrics in which it is not compared.
      baseline: the name of the run to compare with.

    Returns:
      Name of a run (of all but the baseline) -> metric -> the difference. The p-values of a metric are
      corrected over the runs that are compared in it.
    """
    found: dict[str, dict[str, Difference]] = {name: {} for name in values if name != baseline}
    left_out = without[baseline] | values[baseline].sums
    metrics = [metric for metric in values[baseline].per_query if metric not in left_out]
    with bar("comparing", len(metrics)) as advance:
        for metric in metrics:
            systems = {name: values[name].per_query[metric] for name in found if metric not in without[name]}
            for name, difference in compare(values[baseline].per_query[metric], systems).items():
                found[name][metric] = difference
            advance(1)
    return found


def significance_facts(
    found: Mapping[str, Mapping[str, Difference]],
    without: Mapping[str, Set[str]],
    baseline: str,
    queries: int,
) -> dict:
    """Returns what significance.json says: what `differences` found, with null for an undefined number.

    Args:
      found: what `differences` returned.
      without: name of a run -> the metrics in which it is not compared.
      baseline: the name of the run that the others are compared with.
      queries: the number of queries.
    """
    return {
        "baseline": baseline,
        "queries": queries,
        "test": f"paired randomisation test ({PERMUTATIONS:,} permutations, or all), Holm-Bonferroni",
        "interval": "95%, Student's t",
        "differences": {
            name: {metric: difference.facts() for metric, difference in of_run.items()}
            for name, of_run in found.items()
        },
        "not_comparable": {name: sorted(metrics) for name, metrics in without.items() if metrics},
    }


def page_comparison(
    values: Mapping[str, RunValues],
    found: Mapping[str, Mapping[str, Difference]],
    baseline: str,
    found_together: Mapping[frozenset[str], int],
) -> Comparison:
    """Chooses what the page shows of the differences by query: those in `main_measure`, if there are some.

    Args:
      values: name of a run -> its values.
      found: what `differences` returned.
      baseline: the name of the run that the others are compared with.
      found_together: what `found_by` returned.
    """
    compared = dict.fromkeys(metric for of_run in found.values() for metric in of_run)
    metric = main if (main := main_measure(values)) in compared else next(iter(compared), "")
    by_query = {name: values[name].per_query[metric] for name in found if metric in found[name]}
    if by_query:
        base_Q = values[baseline].per_query[metric]
        by_query = {name: values_Q - base_Q for name, values_Q in by_query.items()}
    return Comparison(baseline, metric, by_query, found_together, FOUND_DEPTH)


def found_by(
    qrels: Qrels, runs: Mapping[str, Run], min_relevant_grade: int, depth: int = FOUND_DEPTH
) -> dict[frozenset[str], int]:
    """Counts the relevant passages by which methods have them among their first results.

    Args:
      qrels: the relevance judgements.
      runs: method -> its run.
      min_relevant_grade: the least grade of a relevant passage.
      depth: how many results of each query count.

    Returns:
      A counter: frozenset of methods -> the number of relevant passages (counted for each query) that are
      among the first results of just these. The empty set is of passages that none has.
    """
    counts: collections.Counter[frozenset[str]] = collections.Counter()
    for query, grades in qrels.items():
        tops = {name: {pid for pid, _ in run.get(query, [])[:depth]} for name, run in runs.items()}
        for pid, grade in grades.items():
            if grade >= min_relevant_grade:
                counts[frozenset(name for name, top in tops.items() if pid in top)] += 1
    return counts


def training_curves(work: Workspace) -> list[TrainingCurve]:
    """Reads the learning curves of a work folder's models, without the empty ones."""
    paths = sorted((work.folder / "models").glob("*/learning_curve.jsonl"))
    curves = [TrainingCurve(path.parent.name, read_curve(path)) for path in paths]
    return [curve for curve in curves if curve.points]


def compare_queries(
    collection: Collection,
    queries: Sequence[Query],
    runs: Mapping[str, Run],
    min_relevant_grade: int,
    passages_per_query: int,
) -> list[QueryComparison]:
    """Puts the best passages of all methods side by side, for each of a few queries.

    Args:
      collection: the collection.
      queries: the queries to show.
      runs: method -> its run.
      min_relevant_grade: the least grade of a relevant passage.
      passages_per_query: passages to show of each method.
    """

    def top(run: Run, query: Query) -> list[str]:
        return [pid for pid, _ in run.get(query.id, [])[:passages_per_query]]

    ids = {pid for query in queries for pid in query.positives}
    ids |= {pid for query in queries for run in runs.values() for pid in top(run, query)}
    rows = collection.find_rows(sorted(ids))
    passages = {p.id: p for p in collection.get(rows[rows >= 0].tolist())}

    def snippet(pid: str, query: Query) -> PassageSnippet:
        relevant = query.positives.get(pid, 0) >= min_relevant_grade
        if pid not in passages:  # the run of another tool may be of more passages
            return PassageSnippet(pid, "", "not in this collection", relevant)
        return PassageSnippet(pid, passages[pid].title, passages[pid].text[:SNIPPET], relevant)

    return [
        QueryComparison(
            query.text,
            [snippet(pid, query) for pid, grade in query.positives.items() if grade >= min_relevant_grade],
            {name: [snippet(pid, query) for pid in top(run, query)] for name, run in runs.items()},
        )
        for query in queries
    ]


def example_queries(queries: Sequence[Query], count: int) -> list[Query]:
    """Chooses queries to show by a hash of their ids, so that they are the same in every report."""
    return sorted(queries, key=lambda query: storage.hash_fraction(query.id))[:count]


def provenance() -> dict[str, str]:
    """Returns what made the report: "command", "machine" and "versions"."""
    import jax

    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # ScaNN, for one, exists for Linux only
            versions.append(f"{name} {metadata.version(name)}")
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}; {len(jax.devices())} × {devices}",
        "versions": ", ".join(versions),
    }
