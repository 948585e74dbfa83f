"""The verb `index`: a checkpoint (or the passages, for BM25) becomes a searcher folder."""

import functools
from collections.abc import Callable
from pathlib import Path

import gin
from jax.sharding import Mesh

from retrieval_jax.checkpoints.model_folder import LoadedModel, load_model, model_recipe
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log, track
from retrieval_jax.core.values import Fraction, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.embeddings.encoding import encode_by_model, query_encoder
from retrieval_jax.mesh import multihost, partitioning
from retrieval_jax.search import dense, scann_index

KINDS = ("generative", "exact", "scann", "bm25")
TOLD = ("passages", "dimensions", "added", "removed", "recall_at_10", "recall_at_100")  # of a manifest
RECALL_QUERIES = 200  # an approximate search is measured with


@gin.configurable
def make_index(
    source: str,
    work_dir: str | None = None,
    model_dir: str | None = None,
    kind: str | None = None,
    name: str | None = None,
    beams: Positive = 40,
    batch_size: Positive = 32,
    recall_target: Fraction | None = None,
    expansion: str | None = None,
    step: Positive | None = None,
) -> dict:
    """Makes searchers/NAME.

    Args:
      source, work_dir: the collection, and where its work lies.
      model_dir: the trained model; None makes a BM25 searcher.
      kind: "generative", "exact", "scann" or "bm25"; None is the model's (scann for a dual encoder).
      name: the searcher's name; None is the kind of docids, or the kind (bm25_EXPANSION with an expansion).
      beams: most docids that a generative search finds.
      batch_size: queries that a generative search decodes at once.
      recall_target: of a search with atomic docids: None is exact, 0.95 (say) an approximate top-k of that
        recall.
      expansion: name of the synthetic queries that BM25 shall read as if they were in the passages.
      step: which of the model's checkpoints (--MODEL_STEP); None is the newest.
    """
    if kind not in (None, *KINDS):
        raise UserError(f"make_index.kind: no kind {kind!r}: choose one of {', '.join(KINDS)}")
    if expansion and model_dir:
        raise UserError("make_index.expansion: only BM25 reads it: set MODEL_DIR=None")
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    if model_dir is None:
        if kind not in (None, "bm25"):
            raise UserError(f"MODEL_DIR: a {kind} searcher needs a model: --MODEL_DIR=work/…")
        return _bm25(work, collection, name, expansion)

    mesh = partitioning.make_mesh().local_mesh  # hosts work on their own
    opened = load_model(model_dir, step, mesh)
    family = opened.model.family
    if family == "query generator":
        raise UserError(f"{model_dir}: holds a query generator: it is for `retrieval-jax generate-queries`")
    kind = kind or ("generative" if family == "generative" else "scann")
    if (family == "generative") != (kind == "generative"):
        raise UserError(f"{model_dir}: holds a {family} model, not one for a {kind} searcher")
    folder = work.searcher(name or opened.description["docids"] or kind)
    recipe = model_recipe(model_dir, opened.step, opened.description)
    # Paths in a manifest are relative to where its folder will lie.
    facts = {"model": paths.relative(model_dir, folder), "step": opened.step}
    if kind != "generative":
        if kind == "scann":
            recipe["scann"] = scann_index.settings(collection.passage_count)
        make = _dense(folder, kind, recipe, model_dir, opened, mesh, work, collection)
        return _build(
            folder,
            kind,
            opened.parameter_count,
            collection,
            recipe,
            lambda tmp: facts | make(tmp),
        )
    docids = work.docids(opened.description["docids"])
    fingerprint = check_docids(opened, collection, docids, model_dir)
    settings = {
        "beams": beams,
        "batch_size": batch_size,
        "recall_target": recall_target,
        "docids_fingerprint": fingerprint,
    }
    facts |= {"docids": paths.relative(docids, folder)} | settings
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
    recipe = _recipe(kind, collection, recipe)
    multihost.on_process_0(lambda: storage.build_once(folder, recipe, lambda tmp: known | make(tmp)))
    manifest = storage.read_manifest(folder, "index")
    return {"searcher": str(folder), **known, **{key: manifest[key] for key in TOLD if key in manifest}}


def _recipe(kind: str, collection: Collection, recipe: dict) -> dict:
    return {"kind": kind, "collection": collection.fingerprint, **recipe}


def _bm25(work: Workspace, collection: Collection, name: str | None, expansion: str | None) -> dict:
    passages, recipe = collection.passages, {}
    if expansion:
        queries = SyntheticQueries(work.synthetic(expansion))
        queries.check(collection)
        passages = functools.partial(queries.expanded, collection)
        recipe = {"expansion": queries.fingerprint}

    def make(tmp: Path) -> dict:
        from retrieval_jax.search.bm25 import BM25Searcher

        BM25Searcher.write(tmp, track(passages(), "BM25", collection.passage_count))
        return {}

    folder = work.searcher(name or (f"bm25_{expansion}" if expansion else "bm25"))
    return _build(folder, "bm25", None, collection, recipe, make)


def _dense(
    folder: Path,
    kind: str,
    recipe: dict,
    model_dir: str,
    opened: LoadedModel,
    mesh: Mesh,
    work: Workspace,
    collection: Collection,
) -> Callable[[Path], dict]:
    """Encodes the collection, unless the searcher is there; gives what writes it."""
    if multihost.broadcast_from_process_0(storage.is_up_to_date(folder, _recipe(kind, collection, recipe))):
        return dict  # is not called
    if opened.description["collection"] not in (None, collection.fingerprint):
        trained_on = opened.description["collection_name"]
        log(f"{model_dir}: trained on another collection ({trained_on}, or an earlier version) than this one")
    embeddings = encode_by_model(model_dir, opened, mesh, work, collection)
    queries = query_encoder(opened, mesh)(_some_queries(collection))
    return lambda tmp: dense.write(tmp, kind, embeddings, folder, queries)


def _some_queries(collection: Collection) -> list[str]:
    """Texts to measure an approximate search with: dev queries, else others, else passages."""
    for split in ("dev", "train", *collection.query_counts):
        if collection.query_counts.get(split):
            return [query.text for query in collection.queries(split)[:RECALL_QUERIES]]
    step = max(collection.passage_count // RECALL_QUERIES, 1)
    rows = range(0, collection.passage_count, step)[:RECALL_QUERIES]
    return [passage.full_text for passage in collection.get(rows)]


def check_collection(opened: LoadedModel, collection: Collection, model_dir: str | Path) -> None:
    """Raises UserError where a model was trained on another collection."""
    if opened.description["collection"] != collection.fingerprint:
        raise UserError(
            f"{model_dir}: trained on another collection ({opened.description['collection_name']}, or an "
            f"earlier version) than {collection.folder}: name that model's collection, or train a new one"
        )


def check_docids(opened: LoadedModel, collection: Collection, docids: Path, model_dir: str | Path) -> str:
    """The fingerprint of the docids. UserError unless they are those that a model learned, or extend them."""
    if not storage.finished(docids):
        check_collection(opened, collection, model_dir)
    table = DocidTable.open(docids)
    if table.collection != collection.fingerprint:
        raise UserError(f"{docids}: of another collection than {collection.folder}: `retrieval-jax docids`")
    if opened.description["docids_fingerprint"] not in (table.fingerprint(), *table.ancestors):
        check_collection(opened, collection, model_dir)
        raise UserError(f"{docids}: not the docids that {model_dir} was trained on: train it again")
    return table.fingerprint()
