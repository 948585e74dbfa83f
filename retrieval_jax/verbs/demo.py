"""The verb `demo`: the main job, end to end. Each step is skipped where its work is already there."""

import contextlib
import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import gin
import jax

from retrieval_jax.checkpoints.checkpoints import Checkpoints
from retrieval_jax.core import configuration
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Names, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.docids.kinds import KIND, kind_names
from retrieval_jax.search import scann_index
from retrieval_jax.search.searcher import searcher_kinds
from retrieval_jax.training.duration import BESIDE_STEPS, product_speed, training_seconds
from retrieval_jax.verbs.docids import make_docids
from retrieval_jax.verbs.evaluate import evaluate
from retrieval_jax.verbs.importing import import_collection
from retrieval_jax.verbs.index import make_own_index
from retrieval_jax.verbs.pag import HALVES, MERGE, PLANNED, QUERY, PagConfig
from retrieval_jax.verbs.preflight import configured
from retrieval_jax.verbs.search import search
from retrieval_jax.verbs.train import train

DEFAULT_SOURCE = "python_docs"  # of base.gin
DUAL_ENCODER = "dual_encoder"
PLANNED_KINDS = {PLANNED: PLANNED, **HALVES}
"""The rows of the generative retriever that plans ahead -> their kinds of searchers."""
MODEL = Names("a model that demo trains", lambda: (*kind_names(), DUAL_ENCODER))
DENSE = Names("a dense searcher", lambda: searcher_kinds("dual encoder"))
configuration.declare_scopes(MODEL)


@gin.configurable
def demo(
    source: str,
    work_dir: str | None = None,
    split: str = "test",
    generative: Sequence[Annotated[str, KIND]] = ("atomic", "naive"),
    dense: Sequence[Annotated[str, DENSE]] | None = None,
    planned: bool = False,
    steps: Mapping[Annotated[str, MODEL], Positive] | None = None,
    fused: Sequence[str] | None = None,
) -> dict:
    """Imports, trains, indexes, searches and reports.

    Args:
      source: the collection, as `import` takes it.
      work_dir: its work folder; None is `work/NAME`.
      split: the queries to answer.
      generative: docid kinds to train a generative retriever for. Those that cluster vectors take the dual
        encoder's.
      dense: searchers to build over the dual encoder's vectors; () for none. None is ("exact",
        "scann"), without scann where ScaNN is not installed (it exists for Linux only).
      planned: whether to make, of the dual encoder, a generative retriever that plans ahead, as `pag` does
        without rounds of joint training. It answers with its plan, without (unplanned), and by the plan alone
        (lexical). The dual encoder's vector must be the decoder's first state (DualEncoder.pooling); the gin
        scopes of the others are `query` and `merge`, as in runs/pag.gin.
      steps: model -> training steps, for models that differ from STEPS; a given --STEPS is for all. Without
        either they follow from the number of passages (`train.steps`).
      fused: searchers that are fused into one, with weights chosen on dev queries (equal ones if dev is what
        is answered); () for none. None is bm25, the first of `dense`, and the planned one.

    Returns:
      What each training gives, the files and the metrics that `evaluate` gives, and the command that serves
      the searchers (`next`).

    Raises:
      UserError: `planned` is set, and the dual encoder's vector is not the decoder's first state.
    """
    if dense is None:
        dense = ("exact", "scann") if scann_index.is_installed() else ("exact",)
    if "scann" in dense:
        scann_index.check_installed()  # before hours of training
    if fused is None:
        learned = (*dense[:1], *((PLANNED,) if planned else ()))
        fused = ("bm25", *learned) if learned else ()
    work = Workspace.for_source(source, work_dir)
    log(f"1/5 import → {work.collection}")
    import_collection()
    methods = [Method(kind, "generative", kind) for kind in generative]
    methods += [Method(kind, kind, DUAL_ENCODER) for kind in dense]
    methods.append(Method("bm25", "bm25"))
    models = [*([DUAL_ENCODER] if dense or planned else []), *generative]
    log("2/5 docids and training")
    recipes = {name: functools.partial(_recipe, name, steps) for name in models}
    if planned:
        _check_planned(split)
        recipes[f"{PLANNED}_{QUERY}"] = functools.partial(_query_recipe, split)
    _tell_duration(work, recipes)
    trained = {name: _train(work, name, steps) for name in models}
    sources = {method.name: [method.model] for method in methods if method.model}
    if planned:
        made = _train_planned(split)
        trained |= made
        sources |= {name: [DUAL_ENCODER, *made] for name in PLANNED_KINDS}
    log("3/5 index")
    names = [_index(work, method) for method in methods]
    if planned:
        names += _index_planned(split)
    if fused:  # of the others
        fit_split = None if split == "dev" else "dev"
        settings = {"parts": tuple(fused), "fit_split": fit_split}
        names.append(_index(work, Method("fused", "fused", settings=settings)))
    log("4/5 search")
    for name in names:
        search(name=name, split=split)
    log("5/5 evaluate")
    sources["fused"] = [model for name in fused for model in sources.get(name, ())]
    cut = {name: _cut(models, trained) for name, models in sources.items() if name in names}
    cut = {name: told for name, told in cut.items() if told}
    made = evaluate(split=split, cut=cut)
    return {"models": trained} | made | {"next": next_command(source, work_dir)}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the demo's table.

    Attributes:
      name: of the searcher and of its run.
      kind: of the searcher.
      model: the model that it searches with, by the name of its folder; None for none.
      settings: of `make_index`, by name.
    """

    name: str
    kind: str
    model: str | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def _recipe(name: str, steps: Mapping[str, int] | None) -> Iterator[None]:
    """A context in which gin has the recipe of a model, as `retrieval-jax train` would with its run file.

    It is the model's own scope: --gin.naive/train.batch_size=64 is for naive alone.
    """
    file = f"runs/{name}.gin"
    if name != DUAL_ENCODER and not (configuration.gin_folder() / file).exists():
        file = "runs/naive.gin"
    settings = [] if name == DUAL_ENCODER else [f"DOCIDS = {name!r}"]
    settings += [f"STEPS = {steps[name]}"] if steps and name in steps else []
    with configuration.run_file(file, *settings), gin.config_scope(name):
        yield


def _train(work: Workspace, name: str, steps: Mapping[str, int] | None) -> dict:
    """Makes a model's docids, if it writes any, and trains it."""
    with _recipe(name, steps):
        if name != DUAL_ENCODER:
            make_docids()
        return train(model_dir=str(work.model(name)))


def _cut(models: Sequence[str], trained: Mapping[str, dict]) -> str:
    """Says which of a row's models the clock stopped, and where."""
    cut = {model: trained[model]["cut"] for model in models if "cut" in trained[model]}
    if len(models) == 1:
        return "".join(cut.values())
    return ", ".join(f"{model} at {step}" for model, step in cut.items())


@contextlib.contextmanager
def _pag(split: str) -> Iterator[PagConfig]:
    """A context in which gin has the recipe of `pag`, without rounds, of the dual encoder that is there."""
    with _recipe(DUAL_ENCODER, None):
        layers = gin.get_bindings("T5Config").get("num_encoder_layers")
    settings = [f"{scope}/T5Config.num_encoder_layers = {layers}" for scope in (QUERY, MERGE)]
    with configuration.run_file("runs/pag.gin", *settings):
        yield PagConfig(name=PLANNED, dense_encoder=DUAL_ENCODER, rounds=0, split=split)


@contextlib.contextmanager
def _query_recipe(split: str) -> Iterator[None]:
    """A context in which gin has the settings of the queries' weights."""
    with _pag(split) as pag, pag.lexical_recipe(QUERY):
        yield


def _check_planned(split: str) -> None:
    """Raises UserError if the decoder that is to write docids would not be trained, or docids are missing."""
    with _recipe(DUAL_ENCODER, None):
        pooling = gin.get_bindings("DualEncoder").get("pooling")
    if pooling != "decoder":
        raise UserError(
            f"demo.planned: a generative retriever begins as the dual encoder's decoder, and its pooling is "
            f"{pooling or 'mean'}: --gin.{DUAL_ENCODER}/DualEncoder.pooling=\"'decoder'\", or "
            "--gin.demo.planned=False"
        )
    with _pag(split) as pag:
        pag.check()


def _train_planned(split: str) -> dict[str, dict]:
    """Makes a generative retriever that plans ahead; gives what its trainings give, by the models' names."""
    with _pag(split) as pag:
        made = [stage() for _, stage in pag.lexical_stages()]
        pag.make_docids()
        made += [stage() for _, stage in pag.sequential_stages()]
    return {Path(one["model"]).name: one for one in made if "model" in one}


def _index(work: Workspace, method: Method) -> str:
    """Makes the searcher of a row; gives its name."""
    model = method.model and str(work.model(method.model))
    make_own_index(method.kind, name=method.name, model_dir=model, **method.settings)
    return method.name


def _index_planned(split: str) -> list[str]:
    """Makes the searcher that plans, and those of what it adds up; gives their names."""
    with _pag(split) as pag:
        for name, kind in PLANNED_KINDS.items():
            pag.index(pag.round(0), name, kind)
    return [*PLANNED_KINDS]


def _tell_duration(
    work: Workspace, recipes: Mapping[str, Callable[[], contextlib.AbstractContextManager]]
) -> None:
    """Says how long the trainings that are not finished will take on this machine.

    Args:
      work: where the models are.
      recipes: name of a model -> the context in which gin has the settings of its training.
    """
    left = {}
    for name, recipe in recipes.items():
        with recipe(), configuration.unrecorded():
            plan = configured(search=False, passages=None, vocab_size=None)
        if (more := plan.steps - _steps_done(work.model(name))) > 0:
            left[name] = plan, more
    if not left:
        return
    speed, told, total = product_speed(), [], 0.0
    for name, (plan, more) in left.items():
        minutes = training_seconds(plan.model, plan.shapes, more, speed, jax.device_count()) / 60
        told.append(f"{name} {minutes:.1f} ({more:,} steps)")
        total += minutes
    sort = "an estimate" if jax.default_backend() == "cpu" else "a guess on this device"
    log(
        f"the trainings take about {total:.0f} minutes here: {', '.join(told)}; {sort} by the FLOPs "
        f"of a step, the {speed / 1e9:,.0f} GFLOP/s that a product of matrices has just reached, and "
        f"{BESIDE_STEPS} seconds each for compiling and evaluating"
    )


def _steps_done(folder: Path) -> int:
    """Gives the step of a model's newest checkpoint; 0 without one."""
    there = (folder / "checkpoints").is_dir()  # a manager would make it
    return (Checkpoints(folder, read_only=True).latest() or 0) if there else 0


def next_command(source: str, work_dir: str | None) -> str:
    """Returns the command that opens a page to search with, for what `demo` has made."""
    given = [] if source == DEFAULT_SOURCE else [source]
    given += [] if work_dir is None else [f"--WORK_DIR={work_dir}"]
    return f"{shlex.join(['retrieval-jax', 'serve', *given])}   # then open http://127.0.0.1:8000/"
