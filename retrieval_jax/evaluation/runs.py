"""The runs of a work folder: runs/NAME.SPLIT.trec, and beside each run of `retrieval-jax search` its facts.

A run of another tool is a TREC file without facts:

    runs/NAME.SPLIT.trec    qid Q0 docid rank score tag
    runs/NAME.SPLIT.json    {"recipe": …, "kind": …, "family": …, "parameters": …, "summary": …,
                            "checksum": of the run}, "certain" where the search proves it: the ids of the
                            queries whose first passage is that of an exhaustive search; and "metrics" once
                            `evaluate` has scored it
    runs/NAME.SPLIT.values.tsv
                            metric, query id and value of each query, as `trec_eval -q` prints them, which
                            `evaluate` writes for runs of either sort; a metric's last line, of the query
                            "all", is the mean
"""

import hashlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import trec, variations
from retrieval_jax.data.collection import Collection
from retrieval_jax.evaluation.metrics import RunValues

_VALUES = ".values.tsv"
_UNKNOWN = 0.5  # a run of another tool with a larger share of unknown passages is of another collection


def run_paths(work: Workspace, split: str) -> dict[str, Path]:
    """Returns the files of a split's runs by the searchers' names (which may have dots), in sorted order."""
    end = f".{split}.trec"
    names = {path.name.removesuffix(end): path for path in (work.folder / "runs").glob(f"*{end}")}
    return {
        name: path for name, path in sorted(names.items()) if name != "qrels" and not name.startswith(".")
    }


def write_run_with_facts(path: Path, run: trec.Run, tag: str, facts: Mapping[str, object]) -> None:
    """Writes a run and its facts.

    The run comes last, when the one before is gone: a run without facts, which a kill in between would leave,
    would count as another tool's for good. The values of the queries of the run before go, too.

    Args:
      path: the run's file.
      run: the run.
      tag: the name of the system that made it, for the last column.
      facts: what the module's docstring lists, as JSON.
    """
    content = trec.format_run(path, run, tag)
    for old in (_values_path(path), path):
        old.unlink(missing_ok=True)
    storage.write_json(_facts_path(path), {**facts, "checksum": hashlib.sha256(content).hexdigest()})
    storage.atomic_write(path, content)


def read_facts(path: Path) -> dict | None:
    """Returns the facts of a run; None for a run of another tool, which may have a JSON file of its own.

    A file that took the place of the run that the facts are of is another tool's, too.
    """
    facts = _facts_path(path)
    hint = f"delete {path}, then search again"
    found = storage.read_json(facts, hint, object) if facts.is_file() else None
    ours = isinstance(found, dict) and isinstance(found.get("recipe"), dict)
    return found if ours and found.get("checksum") in (None, storage.checksum(path)) else None


def write_metrics(path: Path, facts: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    """Adds metrics to a run's facts, so that they stay with the split and the recipe of the run."""
    storage.write_json(_facts_path(path), {**facts, "metrics": {**facts.get("metrics", {}), **metrics}})


def write_query_values(path: Path, values: RunValues, queries: Sequence[str]) -> None:
    """Writes the values of a run's metrics for each query; the module's docstring has the form.

    Args:
      path: the run's file.
      values: the run's values.
      queries: the queries' ids, in the order of the values.
    """
    lines = []
    for metric, mean in values.means.items():
        pairs = zip(queries, values.per_query.get(metric, ()), strict=False)  # a function gives a mean only
        lines += [f"{metric}\t{query}\t{float(value)!r}\n" for query, value in pairs]
        lines.append(f"{metric}\tall\t{mean!r}\n")
    storage.atomic_write(_values_path(path), "".join(lines).encode())


def read_query_values(path: Path, metric: str) -> dict[str, float]:
    """Reads the values of one metric for each query, which `write_query_values` wrote: query id -> value.

    Args:
      path: the run's file.
      metric: the metric's name.

    Raises:
      UserError: `evaluate` has not scored the run, or not in this metric.
    """
    values = []
    if (file := _values_path(path)).is_file():
        rows = (line.split("\t") for line in file.read_text().splitlines())
        values = [(query, float(value)) for name, query, value in rows if name == metric]
    if not values:
        raise UserError(f"{file}: no values of {metric}: `retrieval-jax evaluate` writes them")
    return dict(values[:-1])  # without the mean, by its place: a query may be called "all", too


def searcher_metrics(work: Workspace, name: str, collection: Collection) -> dict[str, dict[str, float]]:
    """Returns the metrics of a searcher as it is now: split -> {metric: value}.

    Runs of an earlier collection or searcher, and those that `evaluate` has not scored, are left out.
    """
    found = {}
    for path in sorted((work.folder / "runs").glob(f"{name}.*.trec")):
        facts = read_facts(path) or {}
        split = facts.get("recipe", {}).get("split")
        if "metrics" not in facts or path != work.run(name, split):
            continue
        if outdated(facts["recipe"], work, name, collection, split) is None:
            found[split] = facts["metrics"]
    return found


def varied_runs(
    work: Workspace, split: str, collection: Collection
) -> dict[str, dict[str, tuple[trec.Run, dict | None]]]:
    """Reads the runs of a split's variations: kind -> what `current_runs` gives, where there are any.

    A variation that cannot be read, such as one of an earlier collection, is left out, and a line says so.
    """
    found = {}
    for name in variations.of_split(work, split):
        try:
            runs = _current(work, name, collection)
        except UserError as error:
            log(f"{name}: left out: {error}")
            continue
        if runs:
            found[name.partition(variations.MARK)[2]] = runs
    return found


def current_runs(
    work: Workspace, split: str, collection: Collection
) -> dict[str, tuple[trec.Run, dict | None]]:
    """Reads the runs of a split that are up to date, and reports the others, which are left out.

    The values of the queries of those that are left out are removed.

    Args:
      work: the work folder.
      split: the split.
      collection: the collection as it is now.

    Returns:
      Name -> (run, its facts or None), in sorted order.

    Raises:
      UserError: no run is left, or one cannot be read.
    """
    if not run_paths(work, split):
        raise UserError(
            f"{work.folder}/runs: no run of split {split!r}: make one with `retrieval-jax search`"
        )
    runs = _current(work, split, collection)
    if not runs:
        raise UserError(
            f"{work.folder}/runs: every run of split {split!r} is of an earlier collection or searcher: "
            "`retrieval-jax search` makes them again"
        )
    return runs


def _current(work: Workspace, split: str, collection: Collection) -> dict[str, tuple[trec.Run, dict | None]]:
    """Reads the runs of a split that are up to date, as `current_runs` does; {} if there are none."""
    paths = run_paths(work, split)
    if not paths:
        return {}
    queries = {query.id for query in variations.split_queries(work, collection, split)}
    runs = {}
    for name, path in paths.items():
        facts = read_facts(path)
        if facts:
            reason = outdated(facts["recipe"], work, name, collection, split)
            remedy = "`retrieval-jax search` makes it again"
            run = {} if reason else trec.read_run(path)
        else:
            run = trec.read_run(path)
            reason = _foreign(path, run, split, collection, queries)
            remedy = "delete it, or give it the place and the name of its collection and split"
        if reason:
            log(f"{path}: left out, {reason}: {remedy}")
            _values_path(path).unlink(missing_ok=True)
        else:
            runs[name] = run, facts
    return runs


def report_strays(work: Workspace, collection: Collection) -> None:
    """Reports the files in runs/ whose names are of no split: nobody would miss them otherwise."""
    splits = tuple(f".{split}.trec" for split in (*collection.query_counts, *variations.names(work)))
    for path in sorted((work.folder / "runs").glob("*")):
        of_run = path.suffix == ".tsv" and path.with_suffix(".trec").exists()  # as earlier versions wrote it
        if not of_run and not path.name.endswith((".json", _VALUES, *splits)):
            log(f"{path}: left out: the name of a run is NAME.SPLIT.trec, with a split of the collection")


def _foreign(path: Path, run: trec.Run, split: str, collection: Collection, queries: Set[str]) -> str | None:
    """Returns why a run of another tool is left out, or None; reports what it and the collection lack.

    Where ids are numbers, some are those of other passages by chance. So their share decides, not whether any
    is known. A few unknown passages are no reason: an import may have left these out (`ON_ERROR=skip`).
    """
    found = len(run.keys() & queries)
    if not found:
        return f"none of its queries is of split {split!r}"
    ids = list(dict.fromkeys(passage for ranked in run.values() for passage, _ in ranked))
    unknown = int((collection.find_rows(ids) < 0).sum())
    lacking = f"{unknown:,} of its {len(ids):,} passages ({unknown / len(ids):.1%}) are not in the collection"
    if unknown > _UNKNOWN * len(ids):
        return lacking
    if unknown:
        log(f"{path}: {lacking}: they keep their ranks")
    if found < len(queries):
        log(f"{path}: no results for {len(queries) - found} of {len(queries)} queries, which count 0")
    return None


def outdated(recipe: dict, work: Workspace, name: str, collection: Collection, split: str) -> str | None:
    """Returns why a run does not count; None if its split, collection and searcher are those of now.

    Args:
      recipe: the run's, from its facts.
      work: the work folder.
      name: the searcher's name; its folder may be missing.
      collection: the collection as it is now.
      split: the split that the run's file is named after.
    """
    if recipe.get("collection") != collection.fingerprint:
        return f"it is of another collection (or an earlier one) than {collection.folder}"
    if recipe.get("split") != split:
        return f"it is of split {recipe.get('split')!r}"
    if recipe.get("queries") != collection.recipe(variations.base(split)).get("queries"):
        return f"the queries of {split}, or their judgements, were others"
    if recipe.get("variation") != variations.fingerprint(work, split):
        return f"the queries of {split} were made again since"
    searcher = work.searcher(name)
    if (
        storage.finished(searcher)
        and storage.read_manifest(searcher, "index")["recipe"] != recipe["searcher"]
    ):
        return f"{searcher} was built again since"
    return None


def _facts_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _values_path(path: Path) -> Path:
    return path.with_suffix(_VALUES)
