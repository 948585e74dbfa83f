"""The runs of a work folder: runs/NAME.SPLIT.trec, and beside each run of `retrieval-jax search` its facts.

A run of another tool is a TREC file without facts:

    runs/NAME.SPLIT.trec    qid Q0 docid rank score tag
    runs/NAME.SPLIT.json    {"recipe": …, "kind": …, "family": …, "parameters": …, "summary": …}, and
                            "metrics" once `evaluate` has scored the run
"""

from collections.abc import Mapping
from pathlib import Path

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.evaluation import trec


def run_paths(work: Workspace, split: str) -> dict[str, Path]:
    """Returns the files of a split's runs by the searchers' names (which may have dots), in sorted order."""
    end = f".{split}.trec"
    names = {path.name.removesuffix(end): path for path in (work.folder / "runs").glob(f"*{end}")}
    return {name: path for name, path in sorted(names.items()) if name != "qrels"}


def write_run_with_facts(path: Path, run: trec.Run, tag: str, facts: Mapping[str, object]) -> None:
    """Writes a run and its facts. After a kill between the two, the run has no facts of another run.

    Args:
      path: the run's file.
      run: the run.
      tag: the name of the system that made it, for the last column.
      facts: what the module's docstring lists, as JSON.
    """
    _facts_path(path).unlink(missing_ok=True)
    trec.write_run(path, run, tag)
    storage.write_json(_facts_path(path), facts)


def read_facts(path: Path) -> dict | None:
    """Returns the facts of a run; None for a run of another tool."""
    facts = _facts_path(path)
    return storage.read_json(facts, f"delete {path}, then search again") if facts.is_file() else None


def write_metrics(path: Path, facts: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    """Writes a run's metrics into its facts, so that they stay with the split and the recipe of the run."""
    storage.write_json(_facts_path(path), {**facts, "metrics": metrics})


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
        if outdated(facts["recipe"], work.searcher(name), collection) is None:
            found[split] = facts["metrics"]
    return found


def current_runs(
    work: Workspace, split: str, collection: Collection
) -> dict[str, tuple[trec.Run, dict | None]]:
    """Reads the runs of a split that are up to date, and reports the others, which are left out.

    Returns:
      Name -> (run, its facts or None), in sorted order.

    Raises:
      UserError: no run is left, or one cannot be read.
    """
    paths = run_paths(work, split)
    if not paths:
        raise UserError(
            f"{work.folder}/runs: no run of split {split!r}: make one with `retrieval-jax search`"
        )
    runs = {}
    for name, path in paths.items():
        facts = read_facts(path)
        if facts and (reason := outdated(facts["recipe"], work.searcher(name), collection)):
            log(f"{path}: left out, {reason}: `retrieval-jax search` makes it again")
        else:
            runs[name] = trec.read_run(path), facts
    if not runs:
        raise UserError(
            f"{work.folder}/runs: every run of split {split!r} is of an earlier collection or searcher: "
            "`retrieval-jax search` makes them again"
        )
    return runs


def outdated(recipe: dict, searcher: Path, collection: Collection) -> str | None:
    """Returns why a run no longer counts; None if its collection and searcher are still the same.

    Args:
      recipe: the run's, from its facts.
      searcher: the searcher's folder, which may be missing.
      collection: the collection as it is now.
    """
    if recipe.get("collection") != collection.fingerprint:
        return f"it is of another collection (or an earlier one) than {collection.folder}"
    if (
        storage.finished(searcher)
        and storage.read_manifest(searcher, "index")["recipe"] != recipe["searcher"]
    ):
        return f"{searcher} was built again since"
    return None


def _facts_path(path: Path) -> Path:
    return path.with_suffix(".json")
