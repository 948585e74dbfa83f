"""The verb `evaluate`: runs become a table, metrics.json, significance.json and report.html."""

from collections.abc import Callable, Mapping

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.progress import console, log
from retrieval_jax.core.values import NonNegative, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import variations
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.trec import Qrels, Run, drop_identical_ids
from retrieval_jax.evaluation import comparison, report, robustness
from retrieval_jax.evaluation.method_table import COLUMN_NOTE, print_table, table_notes
from retrieval_jax.evaluation.metrics import Metric, RunValues, chosen_metrics, evaluate_run
from retrieval_jax.evaluation.robustness import Effects, MethodRun
from retrieval_jax.evaluation.runs import (
    current_runs,
    report_strays,
    run_paths,
    varied_runs,
    write_metrics,
    write_query_values,
)

_Runs = dict[str, tuple[Run, dict | None]]  # name -> (run, its facts or None)


@gin.configurable
def evaluate(
    source: str,
    work_dir: str | None = None,
    split: str = "test",
    measures: tuple[str, ...] | None = None,
    baseline: str | None = None,
    min_relevant_grade: Positive = 1,
    ignore_identical_ids: bool = True,
    example_queries: NonNegative = 4,
    passages_per_example: NonNegative = 3,
    cut: Mapping[str, str] | None = None,
) -> dict:
    """Scores every run of a split; writes report.html, metrics.json and significance.json.

    The runs are the files runs/NAME.SPLIT.trec: those that `search` wrote, and TREC runs of other tools that
    were put there. A run's order is that of its scores, as in trec_eval: equal scores are in descending order
    of docids, and ranks do not count. A run of an earlier collection or searcher, or of another split, is
    left out, and one line says so; so is a run of another tool that has most of its passages from elsewhere.
    Runs of different K are joined: a metric that looks further than a run goes is shown with a star, and the
    run is not compared in it.

    The values of each query are written to runs/NAME.SPLIT.values.tsv, as `trec_eval -q` prints them; the
    metrics of a run of `search` are also kept in runs/NAME.SPLIT.json, with the recipe of the run, for the
    cards of exports: those with the usual min_relevant_grade and ignore_identical_ids, as names do not say.

    All runs are compared with the baseline by a paired randomisation test over queries; significance.json has
    the differences, their 95% confidence intervals, and the p-values, also those of the t-test.

    Where there are runs of variations of the split (test~typo, which `vary` made), report and robustness.json
    say what each variation does to each run.

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      split: the queries that were searched for; also a variation that `vary` made, as test~typo.
      measures: what to compute, by ir_measures' names: `--gin.evaluate.measures="('nDCG@10', 'RR(rel=2)@10',
        'R@1000', 'AP', 'Judged@10')"`. None for MRR@10, Recall@10, Recall@100, Hits@1, Hits@10, nDCG@10 and
        what is registered beside them. Measures that count, such as NumRet, are shown and not compared.
      baseline: the run that the others are compared with. None for bm25, or the first run by name where there
        is none.
      min_relevant_grade: the least grade that is relevant to the binary metrics (2 on the Deep Learning
        tracks of TREC), but for measures that set their own by `rel=`.
      ignore_identical_ids: whether a query that is a passage (the same id and words, as in ArguAna and Quora)
        is left out of its own results, as BEIR does.
      example_queries: queries shown side by side in the report, chosen by a hash of the id.
      passages_per_example: passages of each method shown for such a query.
      cut: method -> the step at which the clock ended its training, which marks its row; `demo` gives it.

    Returns:
      The files that were written, and the metrics of each run.
    """
    variations.check_single(split, "evaluate.split")
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    metrics = chosen_metrics(measures)
    report_strays(work, collection)
    known = current_runs(work, split, collection)
    queries = variations.split_queries(work, collection, split)
    baseline = comparison.choose_baseline(list(known), baseline)
    without = _too_deep(metrics, known, collection.passage_count)
    qrels = {query.id: query.judgements for query in queries}
    identical = {query.id for query in queries if query.is_passage and ignore_identical_ids}
    runs = {name: drop_identical_ids(run, identical) for name, (run, _) in known.items()}
    values = {name: evaluate_run(qrels, run, min_relevant_grade, metrics) for name, run in runs.items()}
    differences = comparison.differences(values, without, baseline)
    rows = [
        comparison.method_row(
            name,
            found.means,
            known[name][1],
            without[name],
            differences.get(name, {}),
            cut and cut.get(name),
        )
        for name, found in values.items()
    ]
    rows.sort(key=lambda row: (row.family, row.name))
    means = {row.name: row.metrics for row in rows}
    storage.write_json(work.metrics, means)
    tests = comparison.significance_facts(differences, without, baseline, len(qrels))
    storage.write_json(work.significance, {"split": split, **tests})
    usual = min_relevant_grade == 1 and ignore_identical_ids
    _write_values(work, split, known, values, queries=list(qrels), keeps=usual)
    measure = comparison.main_measure(values)

    def measured(name: str, of_split: _Runs) -> MethodRun:
        run, facts = of_split[name]
        kept = drop_identical_ids(run, identical)
        of_queries = evaluate_run(qrels, kept, min_relevant_grade, {measure: metrics[measure]})
        certain = facts["summary"].get("certain") if facts else None
        certain_queries = frozenset(facts["certain"]) if facts and "certain" in facts else None
        plans = robustness.plans_of(facts, of_split)
        return MethodRun(kept, of_queries.per_query[measure], certain, certain_queries, plans)

    comparable = {name: run for name, run in known.items() if measure and measure not in without[name]}
    varied = _varied(work, collection, split, comparable, {measure: metrics[measure]} if measure else {})
    effects = _robustness(work, split, comparable, varied, list(qrels), measured, measure)
    found_by = comparison.found_by(qrels, runs, min_relevant_grade)
    examples = comparison.example_queries(queries, example_queries)
    report.write_report(
        work.report,
        title=collection.name,
        collection=_counts(collection, split, qrels, min_relevant_grade, len(identical)),
        rows=rows,
        curves=comparison.training_curves(work),
        examples=comparison.compare_queries(
            collection, examples, runs, min_relevant_grade, passages_per_example
        ),
        footer=comparison.provenance(),
        comparison=comparison.page_comparison(values, differences, baseline, found_by),
        robustness=(measure, effects) if effects else None,
    )
    print_table(rows, console)
    console.print(f"{COLUMN_NOTE} {table_notes(rows, baseline)}", style="dim", highlight=False)
    files = {"report": work.report, "metrics_file": work.metrics, "significance_file": work.significance}
    files |= {"robustness_file": work.robustness} if effects else {}
    return {name: str(path) for name, path in files.items()} | {"metrics": means}


def _varied(
    work: Workspace, collection: Collection, split: str, known: _Runs, metric: dict[str, Metric]
) -> dict[str, _Runs]:
    """Reads the runs of variations that go as deep as those of the queries: kind -> name -> run."""

    def is_as_deep(name: str, kind: str, run: tuple[Run, dict | None]) -> bool:
        label, (_, facts), (_, clean) = f"{name}.{split}{variations.MARK}{kind}", run, known[name]
        if not facts or not clean:
            return not _too_deep(metric, {label: run}, collection.passage_count)[label]
        k, wanted = facts["recipe"]["k"], clean["recipe"]["k"]
        if k != wanted:
            log(f"{label}: left out, a run of K={k}, and that of {split} is of K={wanted}: search with that")
        return k == wanted

    return {
        kind: {name: run for name, run in runs.items() if name in known and is_as_deep(name, kind, run)}
        for kind, runs in varied_runs(work, split, collection).items()
    }


def _robustness(
    work: Workspace,
    split: str,
    known: _Runs,
    of_variations: dict[str, _Runs],
    queries: list[str],
    measured: Callable[[str, _Runs], MethodRun],
    measure: str | None,
) -> Effects:
    """Compares the runs with those of variations of the queries; writes robustness.json if there are any."""
    varied = {
        kind: {name: measured(name, of_kind) for name in of_kind} for kind, of_kind in of_variations.items()
    }
    names = {name for of_kind in varied.values() for name in of_kind}
    clean = {name: measured(name, known) for name in known if name in names}
    found = robustness.effects(queries, clean, varied)
    if found:
        storage.write_json(work.robustness, robustness.facts(found, measure, split, len(queries)))
    else:
        work.robustness.unlink(missing_ok=True)
    return found


def _too_deep(metrics: dict[str, Metric], known: _Runs, passages: int) -> dict[str, frozenset[str]]:
    """Finds the metrics that look further than each run goes (see `comparison.too_deep`), and tells them."""
    depths = {name: comparison.depth(*found) for name, found in known.items()}
    without = comparison.too_deep(metrics, depths, passages)
    for name, missing in without.items():
        told = f"{depths[name]} passages a query" if known[name][1] else f"lists of {depths[name]} at most"
        if missing:
            log(
                f"{name}: {told}: measures that look further take the others for not found, and are not "
                f"compared: {', '.join(sorted(missing))}"
            )
    return without


def _write_values(
    work: Workspace,
    split: str,
    known: _Runs,
    values: dict[str, RunValues],
    queries: list[str],
    keeps: bool,
) -> None:
    """Writes, beside each run, its metrics for each query.

    Where `search` made the run and `keeps` says so, their means go into its facts.
    """
    paths = run_paths(work, split)  # of other tools, whose names may be any
    for name, (_, facts) in known.items():
        path = paths[name]
        write_query_values(path, values[name], queries)
        if facts and keeps:
            write_metrics(path, facts, values[name].means)


def _counts(
    collection: Collection, split: str, qrels: Qrels, min_relevant_grade: int, identical: int
) -> dict[str, int]:
    """Returns the facts under the report's heading, and tells those that may surprise on the console."""
    counts = {f"{name} queries": count for name, count in collection.query_counts.items()}
    remarks = {
        "relevant from grade": min_relevant_grade if min_relevant_grade > 1 else 0,
        "none relevant": sum(
            max(grades.values(), default=0) < min_relevant_grade for grades in qrels.values()
        ),
        "left out of their own results": identical,
    }
    for remark, number in remarks.items():
        if number:
            counts[remark] = number
            log(f"{split}: {remark}: {number:,}")
    return {"passages": collection.passage_count, **counts}
