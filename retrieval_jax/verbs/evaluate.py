"""The verb `evaluate`: runs become a table, metrics.json and report.html."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import gin

from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import console, log
from retrieval_jax.core.values import NonNegative, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Query
from retrieval_jax.data.records import Collection
from retrieval_jax.evaluation import report
from retrieval_jax.evaluation.metrics import METRICS, compute_metrics
from retrieval_jax.evaluation.trec import Run, drop_identical_ids, read_run

FAMILIES = {"generative": "generative", "exact": "dual encoder", "scann": "dual encoder", "bm25": "lexical"}
DEEPEST = max(int(name.partition("@")[2]) for name in METRICS)  # rank that a measure looks at


@gin.configurable
def evaluate(
    source: str,
    work_dir: str | None = None,
    split: str = "test",
    min_relevant_grade: Positive = 1,
    ignore_identical_ids: bool = True,
    example_queries: NonNegative = 4,
    passages_per_example: NonNegative = 3,
) -> dict:
    """Scores every run of a split; writes metrics.json and report.html into the work folder.

    These are the files runs/NAME.SPLIT.trec: what `search` wrote, and TREC runs of other tools that were put
    there. A run of an earlier collection or searcher is left out, with a line that says so.

    Args:
      source, work_dir: the collection, and where its work lies.
      split: the queries that were answered.
      min_relevant_grade: the least grade that is relevant to the binary measures (2 on the Deep Learning
        tracks of TREC).
      ignore_identical_ids: a query that is a passage (the same id and words, as in ArguAna and Quora) is left
        out of its own results, as BEIR does.
      example_queries: queries shown side by side in the report, chosen by a hash of the id.
      passages_per_example: passages of each method shown for such a query.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    paths = run_paths(work, split)
    if not paths:
        raise UserError(
            f"{work.folder}/runs: no run of split {split!r}: make one with `retrieval-jax search`"
        )
    facts = {name: run_facts(path) for name, path in paths.items()}
    for name, known in facts.items():
        if known and (reason := stale(known["recipe"], work.searcher(name), collection)):
            log(f"{paths.pop(name)}: left out, {reason}: `retrieval-jax search` makes it again")
    if not paths:
        raise UserError(
            f"{work.folder}/runs: every run of split {split!r} is of an earlier collection or searcher: "
            "`retrieval-jax search` makes them again"
        )
    for name in paths:
        k = ((facts[name] or {}).get("recipe") or {}).get("k", DEEPEST)
        if k < min(DEEPEST, collection.passage_count):
            log(f"{name}: {k} passages a query: measures that look further take the others for not found")
    queries = collection.queries(split)
    qrels = {query.id: query.relevant for query in queries}
    themselves = {query.id for query in queries if query.is_passage and ignore_identical_ids}
    runs = {name: drop_identical_ids(read_run(path), themselves) for name, path in paths.items()}
    rows = [
        method_row(name, compute_metrics(qrels, run, min_relevant_grade), facts[name])
        for name, run in runs.items()
    ]
    rows.sort(key=lambda row: (row.family, row.name))
    metrics = {row.name: row.metrics for row in rows}
    storage.write_json(work.metrics, metrics)

    curves = [
        report.TrainingCurve(path.parent.name, read_curve(path))
        for path in sorted((work.folder / "models").glob("*/learning_curve.jsonl"))
    ]
    counts = {f"{name} queries": count for name, count in collection.query_counts.items()}
    for number, what in (
        (min_relevant_grade if min_relevant_grade > 1 else 0, "relevant from grade"),
        (
            sum(max(grades.values(), default=0) < min_relevant_grade for grades in qrels.values()),
            "none relevant",
        ),
        (len(themselves), "left out of their own results"),
    ):
        if number:
            counts[what] = number
            log(f"{split}: {what}: {number:,}")
    report.write_report(
        work.report,
        title=collection.name,
        collection={"passages": collection.passage_count, **counts},
        rows=rows,
        curves=[curve for curve in curves if curve.points],
        examples=side_by_side(
            collection, queries, runs, min_relevant_grade, example_queries, passages_per_example
        ),
        footer=footer(),
    )
    report.print_table(rows, console)
    return {"report": str(work.report), "metrics_file": str(work.metrics), "metrics": metrics}


def run_paths(work: Workspace, split: str) -> dict[str, Path]:
    """The files of a split's runs by the searchers' names, which may have dots."""
    end = f".{split}.trec"
    found = {path.name.removesuffix(end): path for path in (work.folder / "runs").glob(f"*{end}")}
    return {name: path for name, path in sorted(found.items()) if name != "qrels"}


def run_facts(path: Path) -> dict | None:
    """What `search` noted beside a run; None for a run of another tool."""
    noted = path.with_suffix(".json")
    return storage.read_json(noted, f"delete {path}, then search again") if noted.is_file() else None


def stale(recipe: dict, searcher: Path, collection: Collection) -> str | None:
    """Why a run no longer counts; None where it was made of this collection and of the searcher as it is."""
    if recipe.get("collection") != collection.fingerprint:
        return f"it is of another collection (or an earlier one) than {collection.folder}"
    if (
        storage.finished(searcher)
        and storage.read_manifest(searcher, "index")["recipe"] != recipe["searcher"]
    ):
        return f"{searcher} was made anew since"
    return None


def method_row(name: str, metrics: dict[str, float], facts: dict | None) -> report.MethodRow:
    """The row of a run in the table; of another tool's run only the metrics are known."""
    if facts is None:
        return report.MethodRow(name, "other", metrics, None, None)
    summary, family = facts["summary"], FAMILIES[facts["kind"]]
    return report.MethodRow(name, family, metrics, summary["ms_per_query"], facts["parameters"])


def side_by_side(
    collection: Collection,
    queries: Sequence[Query],
    runs: dict[str, Run],
    min_relevant_grade: int,
    examples: int,
    shown: int,
) -> list[report.QueryComparison]:
    """A few queries with the first passages of every method."""
    queries = sorted(queries, key=lambda q: storage.hash_fraction(q.id))[:examples]
    ids = {pid for query in queries for pid in query.positives}
    ids |= {pid for q in queries for run in runs.values() for pid, _ in run.get(q.id, [])[:shown]}
    rows = collection.find_rows(sorted(ids))
    passages = {p.id: p for p in collection.get(rows[rows >= 0].tolist())}

    def show(pid: str, relevant: bool) -> report.PassageSnippet:
        if pid not in passages:  # another tool's run may be of more passages
            return report.PassageSnippet(pid, "", "not in this collection", relevant)
        return report.PassageSnippet(pid, passages[pid].title, passages[pid].text[:200], relevant)

    return [
        report.QueryComparison(
            query.text,
            [show(pid, True) for pid, grade in query.positives.items() if grade >= min_relevant_grade],
            {
                name: [
                    show(pid, query.positives.get(pid, 0) >= min_relevant_grade)
                    for pid, _ in run.get(query.id, [])[:shown]
                ]
                for name, run in runs.items()
            },
        )
        for query in queries
    ]


def footer() -> dict[str, str]:
    """What made the report: command, machine, versions."""
    import jax

    names = (
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "seqio",
        "tensorflow",
        "scann",
        "bm25s",
        "ir-measures",
    )
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}; {len(jax.devices())} × {devices}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{n} {metadata.version(n)}" for n in names)]
        ),
    }
