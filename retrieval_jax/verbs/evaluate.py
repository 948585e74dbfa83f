"""The verb `evaluate`: runs become a table, metrics.json and report.html."""

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.progress import console, log
from retrieval_jax.core.values import NonNegative, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.evaluation import comparison, report
from retrieval_jax.evaluation.metrics import compute_metrics, deepest_rank
from retrieval_jax.evaluation.runs import current_runs, write_metrics
from retrieval_jax.evaluation.trec import drop_identical_ids


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

    The metrics of a run of `search` are also kept in runs/NAME.SPLIT.json, with the recipe of the run.

    The runs are the files runs/NAME.SPLIT.trec: those that `search` wrote, and TREC runs of other tools that
    were put there. A run of an earlier collection or searcher is left out, and one line says so.

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      split: the queries that were searched for.
      min_relevant_grade: the least grade that is relevant to the binary metrics (2 on the Deep Learning
        tracks of TREC).
      ignore_identical_ids: whether a query that is a passage (the same id and words, as in ArguAna and Quora)
        is left out of its own results, as BEIR does.
      example_queries: queries shown side by side in the report, chosen by a hash of the id.
      passages_per_example: passages of each method shown for such a query.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    known = current_runs(work, split, collection)
    deepest = min(deepest_rank(), collection.passage_count)
    for name, (_, facts) in known.items():
        if facts and (k := facts["recipe"]["k"]) < deepest:
            log(f"{name}: {k} passages a query: measures that look further take the others for not found")
    queries = collection.queries(split)
    qrels = {query.id: query.relevant for query in queries}
    identical = {query.id for query in queries if query.is_passage and ignore_identical_ids}
    runs = {name: drop_identical_ids(run, identical) for name, (run, _) in known.items()}
    rows = [
        comparison.method_row(name, compute_metrics(qrels, run, min_relevant_grade), known[name][1])
        for name, run in runs.items()
    ]
    rows.sort(key=lambda row: (row.family, row.name))
    metrics = {row.name: row.metrics for row in rows}
    storage.write_json(work.metrics, metrics)
    for name, (_, facts) in known.items():
        if facts:
            write_metrics(work.run(name, split), facts, metrics[name])

    counts = {f"{name} queries": count for name, count in collection.query_counts.items()}
    without = sum(max(grades.values(), default=0) < min_relevant_grade for grades in qrels.values())
    remarks = {
        "relevant from grade": min_relevant_grade if min_relevant_grade > 1 else 0,
        "none relevant": without,
        "left out of their own results": len(identical),
    }
    for remark, number in remarks.items():
        if number:
            counts[remark] = number
            log(f"{split}: {remark}: {number:,}")
    examples = comparison.example_queries(queries, example_queries)
    report.write_report(
        work.report,
        title=collection.name,
        collection={"passages": collection.passage_count, **counts},
        rows=rows,
        curves=comparison.training_curves(work),
        examples=comparison.compare_queries(
            collection, examples, runs, min_relevant_grade, passages_per_example
        ),
        footer=comparison.provenance(),
    )
    report.print_table(rows, console)
    return {"report": str(work.report), "metrics_file": str(work.metrics), "metrics": metrics}
