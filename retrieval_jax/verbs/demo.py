"""The verb `demo`: the main job, end to end. Each step is skipped where its work is already there."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated

import gin

from retrieval_jax.core import configuration
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Names, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.docids.kinds import KIND, kind_names
from retrieval_jax.search import scann_index
from retrieval_jax.search.searcher import searcher_class, searcher_kinds
from retrieval_jax.verbs.docids import make_docids
from retrieval_jax.verbs.evaluate import evaluate
from retrieval_jax.verbs.importing import import_collection
from retrieval_jax.verbs.index import make_index, unread
from retrieval_jax.verbs.search import search
from retrieval_jax.verbs.train import train

DEFAULT_SOURCE = "python_docs"  # of base.gin
DUAL_ENCODER = "dual_encoder"
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
      dense: searchers to build over the dual encoder's vectors; () trains no dual encoder. None is ("exact",
        "scann"), without scann where ScaNN is not installed (it exists for Linux only).
      steps: model -> training steps, for models that differ from STEPS; a given --STEPS is for all.
      fused: searchers that are fused into one, with weights chosen on dev queries (equal ones if dev is what
        is answered); () for none. None is bm25 and the first of `dense`.
    """
    if dense is None:
        dense = ("exact", "scann") if scann_index.is_installed() else ("exact",)
    if "scann" in dense:
        scann_index.check_installed()  # before hours of training
    if fused is None:
        fused = ("bm25", *dense[:1]) if dense else ()
    work = Workspace.for_source(source, work_dir)
    log(f"1/5 import → {work.collection}")
    import_collection()
    methods = [(kind, "generative", work.model(kind)) for kind in generative]
    methods += [(kind, kind, work.model(DUAL_ENCODER)) for kind in dense]
    models = [*([DUAL_ENCODER] if dense else []), *generative]
    log("2/5 docids and training")
    trained = {}
    for name in models:
        # As `retrieval-jax train` would with these.
        file = "runs/naive.gin" if name in generative else f"runs/{name}.gin"
        settings = [f"DOCIDS = {name!r}"] if name in generative else []
        settings += [f"STEPS = {steps[name]}"] if steps and name in steps else []
        # In the model's own scope: --gin.naive/train.batch_size=64 is for naive alone.
        with configuration.run_file(file, *settings), gin.config_scope(name):
            if name in generative:
                make_docids()
            trained[name] = train(model_dir=str(work.model(name)))
    log("3/5 index")
    for name, kind, model in methods:
        make_index(kind=kind, name=name, model_dir=str(model), **unread(searcher_class(kind)))
    make_index(model_dir=None, **unread(searcher_class("bm25")))
    if fused:
        fit_split = None if split == "dev" else "dev"
        make_index(
            kind="fused",
            name="fused",
            model_dir=None,
            parts=tuple(fused),
            fit_split=fit_split,
            **unread(searcher_class("fused")),
        )
    log("4/5 search")
    for name in (*(name for name, _, _ in methods), "bm25", *(["fused"] if fused else [])):
        search(name=name, split=split)
    log("5/5 evaluate")
    return {"models": trained} | evaluate(split=split) | {"next": next_command(source, work_dir)}


def next_command(source: str, work_dir: str | None) -> str:
    """Returns the command that opens a page to search with, for what `demo` has made."""
    given = [] if source == DEFAULT_SOURCE else [source]
    given += [] if work_dir is None else [f"--WORK_DIR={work_dir}"]
    return f"{shlex.join(['retrieval-jax', 'serve', *given])}   # then open http://127.0.0.1:8000/"
