"""What a report compares: rows of metrics, learning curves, example queries, and provenance."""

import contextlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Query
from retrieval_jax.data.records import Collection
from retrieval_jax.evaluation.panels import TrainingCurve
from retrieval_jax.evaluation.report import MethodRow, PassageSnippet, QueryComparison
from retrieval_jax.evaluation.trec import Run

SNIPPET = 200  # characters of a passage that the report shows
PACKAGES = (
    *("jax", "flax", "optax", "orbax-checkpoint", "seqio"),
    *("tensorflow", "scann", "bm25s", "ir-measures"),
)


def method_row(name: str, metrics: dict[str, float], facts: dict | None) -> MethodRow:
    """Makes the row of a run in the table of results.

    Args:
      name: the method's name.
      metrics: its metrics, by name.
      facts: what `search` noted of the run; None for a run of another tool, of which nothing else is known.
    """
    if facts is None:
        return MethodRow(name, "other", metrics, None, None)
    return MethodRow(name, facts["family"], metrics, facts["summary"]["ms_per_query"], facts["parameters"])


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
