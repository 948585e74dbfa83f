"""The verb `evaluate`: runs become a table, metrics.json and report.html."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import gin

from retrieval_jax import storage
from retrieval_jax.data.records import Collection
from retrieval_jax.errors import UserError
from retrieval_jax.evaluation import report
from retrieval_jax.evaluation.metrics import score
from retrieval_jax.evaluation.trec import read_qrels, read_run
from retrieval_jax.progress import console
from retrieval_jax.work import Work

FAMILIES = {"generative": "generative", "exact": "dual encoder", "scann": "dual encoder", "bm25": "lexical"}


@gin.configurable
def evaluate(
    source: str, work_dir: str | None = None, split: str = "test", examples: int = 4, shown: int = 3
) -> dict:
    """Scores every run of a split; writes metrics.json and report.html into the work folder.

    Args:
      source, work_dir: the collection, and where its work lies.
      split: the queries that were answered.
      examples: queries shown side by side in the report, chosen by a hash of the id.
      shown: passages of each method shown for such a query.
    """
    work = Work.of(source, work_dir)
    collection = Collection(work.collection)
    paths = run_paths(work, split)
    if not paths:
        raise UserError(
            f"{work.folder}/runs: no run of split {split!r}: make one with `retrieval-jax search`"
        )
    qrels = read_qrels(work.qrels(split))
    runs = {name: read_run(path) for name, path in paths.items()}
    rows = []
    for name, path in paths.items():
        facts = storage.read_json(path.with_suffix(".json"), f"delete {path}, then search again")
        rows.append(
            report.MethodRow(
                name,
                FAMILIES[facts["kind"]],
                score(qrels, runs[name]),
                facts["took"]["ms_per_query"],
                facts["parameters"],
            )
        )
    rows.sort(key=lambda row: (row.family, row.name))
    metrics = {row.name: row.metrics for row in rows}
    storage.write_json(work.metrics, metrics)

    curves = [
        report.Curve(path.parent.name, report.read_curve(path))
        for path in sorted((work.folder / "models").glob("*/learning_curve.jsonl"))
    ]
    counts = {f"{name} queries": count for name, count in collection.query_counts.items()}
    report.write_report(
        work.report,
        title=collection.name,
        collection={"passages": collection.passage_count, **counts},
        rows=rows,
        curves=[curve for curve in curves if curve.points],
        examples=side_by_side(collection, split, qrels, runs, examples, shown),
        footer=footer(),
    )
    report.print_table(rows, console)
    return {"report": str(work.report), "metrics_file": str(work.metrics), "metrics": metrics}


def run_paths(work: Work, split: str) -> dict[str, Path]:
    """The files of a split's runs by the searchers' names, which may have dots."""
    end = f".{split}.trec"
    found = {path.name.removesuffix(end): path for path in (work.folder / "runs").glob(f"*{end}")}
    return {name: path for name, path in sorted(found.items()) if name != "qrels"}


def side_by_side(
    collection: Collection, split: str, qrels: dict, runs: dict, examples: int, shown: int
) -> list[report.SideBySide]:
    """A few queries with the first passages of every method."""
    queries = sorted(collection.queries(split), key=lambda q: storage.hash_fraction(q.id))[:examples]
    ids = {pid for query in queries for pid in query.positives}
    ids |= {pid for q in queries for run in runs.values() for pid, _ in run.get(q.id, [])[:shown]}
    passages = {p.id: p for p in collection.some(collection.rows(sorted(ids)).tolist())}

    def show(pid: str, relevant: bool) -> report.Shown:
        return report.Shown(pid, passages[pid].title, passages[pid].text[:200], relevant)

    return [
        report.SideBySide(
            query.text,
            [show(pid, True) for pid in query.positives],
            {
                name: [show(pid, pid in qrels[query.id]) for pid, _ in run.get(query.id, [])[:shown]]
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
