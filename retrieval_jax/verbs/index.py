"""The verb `index`: a checkpoint (or the passages, for BM25) becomes a searcher folder."""

import dataclasses

import gin

from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegative
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.search.index_inputs import IndexInputs, IndexSettings
from retrieval_jax.search.indexing import build_searcher, choose_searcher, default_name
from retrieval_jax.search.searcher import Searcher, searcher_class

SUMMARY_KEYS = (
    *("kind", "parameters", "passages", "dimensions", "vector_dtype", "added", "removed"),
    *("recall_at_10", "recall_at_100", "fused_by", "fitted", "sequential_weight"),
)  # of the manifest
_READERS = {
    **dict.fromkeys(("parts", "fusion", "weights", "depth"), ("a fused searcher", "fused")),
    "fit_split": ("a fused or planned searcher", "fused"),
    **dict.fromkeys(("plan_size", "sequential_weight"), ("a planned searcher", "planned")),
    "sets": ("a planned or lexical searcher", "planned"),
    **dict.fromkeys(("vector_dtype", "dimensions"), ("a searcher of vectors", "exact")),
}
"""A setting that only some kinds of searchers read -> (what those are called, the kind to name for it)."""


@gin.configurable("make_index")
@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexConfig(IndexSettings):
    """Builds a searcher in searchers/NAME.

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      model_dir: the trained model; None for a searcher that has no model, such as BM25.
      kind: the kind of searcher: "generative", "planned" (with a lexical head, which guides the search and
        counts), "lexical" (the weights of a lexical encoder, or of a generative model's lexical head, alone),
        "softmax_vectors" (atomic docids by ScaNN), "scann", "exact", "bm25", "fused", or one that a gin
        file's `import MODULE` registers. None for the default: bm25 without a model, lexical for a lexical
        encoder, scann for a dual encoder (exact where ScaNN is not installed: it exists for Linux only).
      name: the searcher's name; None for the kind of docids, or the kind (KIND_EXPANSION with an expansion).
      step: which of the model's checkpoints (--MODEL_STEP); None for the newest.
    """

    source: str
    work_dir: str | None = None
    model_dir: str | None = None
    kind: str | None = None
    name: str | None = None
    step: NonNegative | None = None


def unread(searcher: type[Searcher]) -> dict[str, object]:
    """Returns the settings that only other kinds of searchers read, with their defaults."""
    names = _READERS.keys() - searcher.reads_settings
    return {field.name: field.default for field in dataclasses.fields(IndexSettings) if field.name in names}


def check_settings(config: IndexConfig, searcher: type[Searcher]) -> None:
    """Raises UserError if a value is given to a setting that only other kinds of searchers read."""
    for setting, default in unread(searcher).items():
        if (value := getattr(config, setting)) and value != default:
            which, kind = _READERS[setting]
            raise UserError(
                f"make_index.{setting}: only {which} has {setting}, and this is of the kind {searcher.kind}: "
                f"leave it away, or --gin.make_index.kind=\"'{kind}'\""
            )


def make_index(**values: object) -> dict:
    """Builds a searcher.

    Args:
      **values: of IndexConfig's attributes; those that are left out are gin's.

    Returns:
      The searcher's folder, and facts of its manifest.

    Raises:
      UserError: the values do not go together.
    """
    config = IndexConfig(**values)
    if config.expansion and config.model_dir:
        raise UserError("make_index.expansion: only BM25 reads it: set MODEL_DIR=None")
    work = Workspace.for_source(config.source, config.work_dir)
    collection = Collection(work.collection)
    searcher = choose_searcher(config.kind, config.model_dir)
    check_settings(config, searcher)
    mesh = model = None
    if config.model_dir:
        mesh, rules = make_partitioner().local  # each host works on its own
        model = load_model(config.model_dir, config.step, mesh, rules)
    folder = work.searcher(config.name or default_name(searcher, model, config))
    inputs = IndexInputs(
        *(collection, work, folder, config, config.model_dir, model, mesh), new_partitioner=make_partitioner
    )
    manifest = build_searcher(searcher, inputs)
    return {"searcher": str(folder)} | {key: manifest[key] for key in SUMMARY_KEYS if key in manifest}


def make_own_index(kind: str, **settings: object) -> dict:
    """Builds a searcher, whatever gin sets that only other kinds read, which `make_index` would refuse.

    Args:
      kind: the kind of searcher.
      **settings: of IndexConfig's attributes; those that are left out and that this kind reads are gin's.

    Returns:
      See `make_index`.

    Raises:
      UserError: there is no such kind, or the values do not go together.
    """
    return make_index(kind=kind, **(unread(searcher_class(kind)) | settings))
