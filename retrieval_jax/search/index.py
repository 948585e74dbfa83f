"""The verb `index`: a checkpoint (or the passages, for BM25) becomes a searcher folder."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import gin

from retrieval_jax import storage
from retrieval_jax.data.records import Collection
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError
from retrieval_jax.progress import bar, track
from retrieval_jax.training.checkpoints import OpenModel, open_model
from retrieval_jax.work import Work

KINDS = ("generative", "exact", "scann", "bm25")


@gin.configurable
def make_index(
    source: str,
    work_dir: str | None = None,
    model_dir: str | None = None,
    kind: str | None = None,
    name: str | None = None,
    beams: int = 40,
    batch_size: int = 32,
    recall: float | None = None,
    expansion: str | None = None,
) -> dict:
    """Makes searchers/NAME.

    Args:
      source, work_dir: the collection, and where its work lies.
      model_dir: the trained model; None makes a BM25 searcher.
      kind: "generative", "exact", "scann" or "bm25"; None is the model's (scann for a dual encoder).
      name: the searcher's name; None is the kind of docids, or the kind (bm25_EXPANSION with an expansion).
      beams: most docids that a generative search finds.
      batch_size: queries that a generative search decodes at once.
      recall: of a search with atomic docids: None is exact, 0.95 (say) an approximate top-k of that recall.
      expansion: name of the synthetic queries that BM25 shall read as if they were in the passages.
    """
    if kind not in (None, *KINDS):
        raise UserError(f"make_index.kind: no kind {kind!r}: choose one of {', '.join(KINDS)}")
    if expansion and model_dir:
        raise UserError("make_index.expansion: only BM25 reads it: set MODEL_DIR=None")
    work = Work.of(source, work_dir)
    collection = Collection(work.collection)
    if model_dir is None:
        if kind not in (None, "bm25"):
            raise UserError(f"MODEL_DIR: a {kind} searcher needs a model: --gin.MODEL_DIR=\"'work/…'\"")
        return _bm25(work, collection, name, expansion)

    opened = open_model(model_dir)
    family = opened.model.family
    if family == "query generator":
        raise UserError(f"{model_dir}: holds a query generator: it is for `retrieval-jax generate-queries`")
    kind = kind or ("generative" if family == "generative" else "scann")
    if (family == "generative") != (kind == "generative"):
        raise UserError(f"{model_dir}: holds a {family} model, not one for a {kind} searcher")
    folder = work.searcher(name or opened.description["docids"] or kind)
    recipe = {"model": str(Path(model_dir).resolve()), "step": opened.step}
    # Paths in a manifest are relative to where its folder will lie.
    facts = {"model": os.path.relpath(model_dir, folder), "step": opened.step}
    if kind != "generative":
        check_collection(opened, collection, model_dir)
        return _build(
            folder, kind, opened.parameter_count, collection, recipe, _dense(kind, opened, collection, facts)
        )
    docids = work.docids(opened.description["docids"])
    fingerprint = check_docids(opened, collection, docids, model_dir)
    settings = {"beams": beams, "batch_size": batch_size, "recall": recall, "docids_fingerprint": fingerprint}
    facts |= {"docids": os.path.relpath(docids, folder)} | settings
    recipe |= settings
    return _build(folder, kind, opened.parameter_count, collection, recipe, lambda _: facts)


def _build(
    folder: Path,
    kind: str,
    parameters: int | None,
    collection: Collection,
    recipe: dict,
    make: Callable[[Path], dict],
) -> dict:
    known = {"kind": kind, "parameters": parameters}
    recipe = {"kind": kind, "collection": collection.fingerprint, **recipe}
    storage.build(folder, recipe, lambda aside: known | make(aside))
    return {"searcher": str(folder), **known}


def _bm25(work: Work, collection: Collection, name: str | None, expansion: str | None) -> dict:
    passages, recipe = collection.passages, {}
    if expansion:
        queries = SyntheticQueries(work.synthetic(expansion))
        queries.check(collection)
        passages = functools.partial(queries.expanded, collection)
        recipe = {"expansion": queries.fingerprint}

    def make(aside: Path) -> dict:
        from retrieval_jax.search.bm25 import BM25Searcher

        BM25Searcher.write(aside, track(passages(), "BM25", collection.passage_count))
        return {}

    folder = work.searcher(name or (f"bm25_{expansion}" if expansion else "bm25"))
    return _build(folder, "bm25", None, collection, recipe, make)


def _dense(kind: str, opened: OpenModel, collection: Collection, facts: dict) -> Callable[[Path], dict]:
    def make(aside: Path) -> dict:
        from retrieval_jax.search import dense

        encoder = dense.TextEncoder(
            opened.model.encode_passages,
            opened.params,
            opened.vocabulary,
            opened.description["passage_length"],
        )
        ids, texts = zip(*((p.id, p.full_text) for p in collection.passages()), strict=True)
        with bar("encoding passages", len(texts)) as advance:
            vectors = encoder(texts, advance)
        dense.write(aside, kind, vectors, ids)
        return facts

    return make


def check_collection(opened: OpenModel, collection: Collection, model_dir: str | Path) -> None:
    """Raises UserError where a model was trained on another collection."""
    if opened.description["collection"] != collection.fingerprint:
        raise UserError(
            f"{model_dir}: trained on another collection ({opened.description['collection_name']}, or an "
            f"earlier version) than {collection.folder}: name that model's collection, or train a new one"
        )


def check_docids(opened: OpenModel, collection: Collection, docids: Path, model_dir: str | Path) -> str:
    """The fingerprint of the docids. UserError unless they are those that a model learned, or extend them."""
    if not (docids / storage.MANIFEST).is_file():
        check_collection(opened, collection, model_dir)
    table = DocidTable.open(docids)
    if table.collection != collection.fingerprint:
        raise UserError(f"{docids}: of another collection than {collection.folder}: `retrieval-jax docids`")
    if opened.description["docids_fingerprint"] not in (table.fingerprint(), *table.ancestors):
        check_collection(opened, collection, model_dir)
        raise UserError(f"{docids}: not the docids that {model_dir} was trained on: train it again")
    return table.fingerprint()
