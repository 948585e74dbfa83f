"""The verb `sweep`: several methods on several collections, and one table of them."""

import functools
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import gin
import numpy as np

from retrieval_jax.core import configuration, paths, storage
from retrieval_jax.core.errors import Preempted, UserError
from retrieval_jax.core.progress import console, log
from retrieval_jax.core.workspace import Workspace, checked, default_name
from retrieval_jax.data import variations
from retrieval_jax.data.collection import Collection
from retrieval_jax.evaluation import comparison, runs
from retrieval_jax.evaluation.metrics import METRICS, check_averages
from retrieval_jax.evaluation.sweep_table import CollectionValues, SweepTable
from retrieval_jax.search.indexing import choose_searcher
from retrieval_jax.search.searcher import searcher_class, searcher_kinds
from retrieval_jax.verbs.docids import make_docids
from retrieval_jax.verbs.evaluate import evaluate
from retrieval_jax.verbs.importing import import_collection
from retrieval_jax.verbs.index import IndexConfig, make_own_index
from retrieval_jax.verbs.search import search
from retrieval_jax.verbs.train import TrainConfig, train

FUSED = "fused"


@gin.configurable
def sweep(
    collections: Sequence[str] = (),
    methods: Sequence[str] = ("bm25",),
    work_dir: str | None = None,
    split: str = "test",
    measure: str = "nDCG@10",
    baseline: str | None = None,
) -> dict:
    """Measures methods on several collections; writes sweep.json, sweep.md and sweep.html.

    Each collection is imported, indexed, searched and evaluated as by these verbs, in a work folder of its
    own, where its report is. What is there already is not made again: after a kill, the same command goes on.
    If something fails, its row says so in a line, the others go on, and the exit status is 2 at the end.

    The mean is that of the collections that have all methods, each of which counts the same.

    Args:
      collections: folders, or ir_datasets:ID (ir_datasets:nano-beir/scifact, ir_datasets:beir/scifact/test),
        which may also be given as arguments.
      methods: each one is a kind of searcher without a model ("bm25"); the gin file of a training, which is
        done on each collection ("runs/dual_encoder.gin"); or the folder of a dual encoder that was trained
        or converted before. Their names are those of the kind, the file and the folder.
      work_dir: the folder in which the table and the work folder of each collection lie; None for work/.
      split: the queries to answer; of a collection that has others only, those.
      measure: what the table shows, a measure of `evaluate`.
      baseline: the method that the others are compared with; None for bm25, or the first one by name.

    Returns:
      The files of the table; `values`, those of the methods on each collection; and their `mean`.

    Raises:
      UserError: no collections or methods are given, two have one name, a method is nothing known, or a
        collection failed.
    """
    if not collections:
        raise UserError("sweep.collections: none: retrieval-jax sweep path/to/one path/to/another")
    variations.check_single(split, "sweep.split")
    places = _places(collections, work_dir)
    named = _named_methods(methods)
    check_averages(measure, "sweep.measure")
    baseline = comparison.choose_baseline(list(named), baseline, "sweep.baseline")
    folder = paths.as_path(work_dir or "work")
    table = SweepTable(measure, list(named), baseline, missing=len(places))
    reports = {work.name: quote(f"{work.name}/report.html") for work in places.values()}
    for nth, (source, work) in enumerate(places.items(), start=1):
        log(f"{nth}/{len(places)} {source} → {work}")
        table.add(_measure(source, str(work), named, split, measure))
        storage.write_json(folder / "sweep.json", table.facts())
        storage.atomic_write(folder / "sweep.md", table.markdown().encode())
        links = {one.name: reports[one.name] for one in table.collections if one.values}
        table.write_page(folder / "sweep.html", links, comparison.provenance())
    table.print(console)
    if failed := [one.name for one in table.collections if one.errors]:
        raise UserError(
            f"{folder / 'sweep.json'}: {len(failed)} of {len(places)} collections failed "
            f"({', '.join(failed)}): mend what their rows say, then the same command goes on"
        )
    return {
        "table": str(folder / "sweep.json"),
        "report": str(folder / "sweep.html"),
        "values": {row.name: dict(row.means) for row in table.rows},
        "mean": dict(table.mean.means) if table.mean else {},
    }


def _places(collections: Sequence[str], work_dir: str | None) -> dict[str, Path]:
    """Returns source -> its work folder. Raises UserError if two would have the same one."""
    places: dict[str, Path] = {}
    for source in dict.fromkeys(collections):
        place = paths.as_path(work_dir or "work") / default_name(source)
        if place in places.values():
            raise UserError(f"sweep.collections: {source}: another one lies in {place}, too: rename one")
        places[source] = place
    return places


def _named_methods(methods: Sequence[str]) -> dict[str, str]:
    """Returns name -> method. Raises UserError if there are none, two of a name, or one that is nothing."""
    named: dict[str, str] = {}
    known = _without_model()
    for method in methods:
        name = paths.as_path(method).name.removesuffix(".gin")
        if method not in known and not method.endswith(".gin") and not paths.as_path(method).is_dir():
            raise UserError(
                f"sweep.methods: {method!r}: neither {' nor '.join(known)}, nor a gin file (NAME.gin), "
                "nor a model's folder: name one"
            )
        if checked(name) in named:
            raise UserError(f"sweep.methods: two are called {name}: rename a file or a folder")
        named[name] = method
    if not named:
        raise UserError("sweep.methods: none: name one, as 'bm25'")
    for method in named.values():
        if method.endswith(".gin"):
            with configuration.run_file(method):
                pass  # raises where it cannot be read
    return named


def _without_model() -> list[str]:
    """Returns the kinds of searchers that need no model."""
    return [kind for kind in searcher_kinds() if kind != FUSED and searcher_class(kind).model_family is None]


def _measure(source: str, work: str, methods: dict[str, str], split: str, measure: str) -> CollectionValues:
    """Measures the methods on a collection. What fails is a line of `errors`."""
    place, errors, made = Workspace(paths.as_path(work)), [], []

    def attempt(what: str, step: Callable[[], object]) -> bool:
        try:
            step()
            return True
        except Preempted:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            if not isinstance(error, UserError):
                traceback.print_exc()
                line = f"{type(error).__name__}: {line}"
            errors.append(f"{what}: {line}")
            log(f"{place.folder.name}: failed: {errors[-1]}")
        return False

    def result(**values: object) -> CollectionValues:
        return CollectionValues(place.folder.name, source, errors=tuple(errors), **values)

    def prepare() -> None:
        nonlocal split
        import_collection(source=source, work_dir=work)
        split = _split_of(Collection(place.collection), split)

    if not attempt("import", prepare):
        return result()
    for name, method in methods.items():
        if attempt(name, functools.partial(_run, source, work, name, method, split)):
            made.append(name)
    values: dict[str, np.ndarray] = {}
    without: list[str] = []

    def score() -> None:
        measures = tuple(configuration.argument(evaluate, "measures") or METRICS)
        measures += (measure,) * (measure not in measures)
        evaluate(source=source, work_dir=work, split=split, measures=measures)
        tests = storage.read_json(place.significance, "`retrieval-jax evaluate`")
        for name in made:
            of_queries = runs.read_query_values(place.run(name, split), measure)
            values[name] = np.array(list(of_queries.values()))
            if measure in tests["not_comparable"].get(name, ()):
                without.append(name)

    if made:
        attempt("evaluate", score)
    return result(split=split, values=values, not_comparable=frozenset(without))


def _split_of(collection: Collection, split: str) -> str:
    """Returns the split to answer: the only one (or its variation) of a collection that has no such split."""
    base, mark, kind = split.partition(variations.MARK)
    there = [name for name, count in collection.query_counts.items() if count]
    return f"{there[0]}{mark}{kind}" if base not in there and len(there) == 1 else split


def _run(source: str, work: str, name: str, method: str, split: str) -> None:
    """Makes the run of a method: trains its model if it is to be trained, indexes and searches."""
    place, given = {"source": source, "work_dir": work}, None
    with configuration.run_file(method if method.endswith(".gin") else None):
        if method.endswith(".gin"):
            given = str(Workspace(paths.as_path(work)).model(name))
            if configuration.argument(TrainConfig, "docids"):
                make_docids(**place)
            train(**place, model_dir=given)
        elif method not in _without_model():
            given = method
        kind = configuration.argument(IndexConfig, "kind") if given else method
        make_own_index(choose_searcher(kind, given).kind, **place, name=name, model_dir=given)
        search(**place, name=name, split=split)
