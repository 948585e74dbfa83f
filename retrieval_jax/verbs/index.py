"""The verb `index`: a checkpoint (or the passages, for BM25) becomes a searcher folder."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import gin

from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Fraction, Names, NonNegativeFloat, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.search.fusion import NORMALISATIONS
from retrieval_jax.search.indexing import build_searcher, choose_searcher, default_name
from retrieval_jax.search.searcher import IndexInputs, IndexSettings, Searcher
from retrieval_jax.search.stored_vectors import VectorDtype

SUMMARY_KEYS = (
    *("kind", "parameters", "passages", "dimensions", "vector_dtype", "added", "removed"),
    *("recall_at_10", "recall_at_100", "fused_by", "fitted", "sequential_weight"),
)  # of the manifest
FUSION = Names("a fusion", tuple(NORMALISATIONS))
_OF_FUSED = ("parts", "fusion", "weights", "depth")
_OF_PLANNED = ("plan_size", "sequential_weight")
_OF_SETS = ("planned", "lexical")  # kinds that read sets of tokens
_OF_VECTORS = ("vector_dtype", "dimensions")


@gin.configurable("make_index")
@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexConfig:
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
      beams: beams of a generative search, which is the most docids that it finds.
      batch_size: queries that a generative search decodes at once.
      recall_target: for a search with atomic docids: None for the exact top-k, otherwise the recall of an
        approximate one, such as 0.95.
      expansion: name of the synthetic queries that BM25 reads as if they were part of the passages.
      language: the language of BM25's stemmer and stop words, by Snowball's name: "porter" for English with
        Porter's stemmer (as Anserini), "english" for his second one, "german", …; None for neither.
      vector_dtype: what the searchers "scann", "exact" and "softmax_vectors" keep vectors as: "float32",
        "bfloat16" (half the memory) or "int8" (a quarter); the recall that this costs is measured and shown.
        `scann.shard_size` is the most vectors that ScaNN indexes at once.
      dimensions: how many of a dual encoder's first dimensions the searchers "scann" and "exact" keep, of a
        model that was trained for them (DualEncoder.matryoshka); None for all.
      step: which of the model's checkpoints (--MODEL_STEP); None for the newest.
      parts: names of the searchers that a fused searcher is made of, such as ('bm25', 'exact'). NAME~KIND
        asks a searcher with variations of the queries, of the kinds that `vary` knows: ('exact',
        'exact~no_stop_words', 'exact~drop_words').
      fusion: how they are fused: weighted sums of scores that are mapped onto 0 to 1 ("min_max") or
        standardised ("z"), of reciprocal ranks ("reciprocal_rank", with k=60), or "rerank": the first part
        finds passages, which the others score. None for the one of the first three that is best with the
        weights.
      weights: the weight of each part; None to choose those with the best nDCG@10 on the queries of
        `fit_split`, of multiples of 1/20 (of 1/10 or more from four parts on).
      depth: passages of each part's list that count; None to choose 100 or 200 together with the weights
        (20 to 200 to re-rank).
      fit_split: queries to choose with, at most 1,000 and never test's; None for equal weights (of a planned
        searcher, the sequential weight of the training), as where there are none of the default, dev.
      sets: name of the sets of tokens (--SETS; `retrieval-jax sets` makes them) by which a planned or lexical
        search scores passages; None for the only ones that there are.
      plan_size: passages that its plan keeps: those of largest lexical score.
      sequential_weight: what it multiplies docids' own scores by before it adds lexical ones; None to choose
        that with the best nDCG@10 on at most 200 queries of `fit_split`, of the weight that the model was
        trained with (joint_ranking's; 1 of other objectives), that times powers of 2 from 1/16 to 8, and 0.
    """

    source: str
    work_dir: str | None = None
    model_dir: str | None = None
    kind: str | None = None
    name: str | None = None
    beams: Positive = 40
    batch_size: Positive = 32
    recall_target: Fraction | None = None
    expansion: str | None = None
    language: str | None = "porter"
    vector_dtype: VectorDtype = "float32"
    dimensions: Positive | None = None
    step: Positive | None = None
    parts: Sequence[str] = ()
    fusion: Annotated[str, FUSION] | None = None
    weights: Sequence[NonNegativeFloat] | None = None
    depth: Positive | None = None
    fit_split: str | None = "dev"
    sets: str | None = None
    plan_size: Positive = 1000
    sequential_weight: NonNegativeFloat | None = None

    @property
    def settings(self) -> IndexSettings:
        """What searchers may read."""
        names = [field.name for field in dataclasses.fields(IndexSettings)]
        return IndexSettings(**{name: getattr(self, name) for name in names})


def unread(searcher: type[Searcher]) -> dict[str, object]:
    """Returns the settings that only other kinds of searchers read, with their defaults."""
    names = () if searcher.kind == "fused" else _OF_FUSED
    names += () if searcher.kind == "planned" else _OF_PLANNED
    names += () if searcher.kind in ("fused", "planned") else ("fit_split",)
    names += () if searcher.kind in _OF_SETS else ("sets",)
    names += () if searcher.reads_embeddings else _OF_VECTORS
    return {field.name: field.default for field in dataclasses.fields(IndexSettings) if field.name in names}


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
    for setting, default in unread(searcher).items():
        if (value := getattr(config, setting)) and value != default:
            which, kind = "a fused searcher", "fused"
            if setting in _OF_VECTORS:
                which, kind = "a searcher of vectors", "exact"
            elif setting in _OF_PLANNED:
                which, kind = "a planned searcher", "planned"
            elif setting == "sets":
                which, kind = "a planned or lexical searcher", "planned"
            elif setting == "fit_split":
                which = "a fused or planned searcher"
            raise UserError(
                f"make_index.{setting}: only {which} has {setting}, and this is of the kind {searcher.kind}: "
                f"leave it away, or --gin.make_index.kind=\"'{kind}'\""
            )
    mesh = model = None
    if config.model_dir:
        mesh, rules = make_partitioner().local  # each host works on its own
        model = load_model(config.model_dir, config.step, mesh, rules)
    settings = config.settings
    folder = work.searcher(config.name or default_name(searcher, model, settings))
    manifest = build_searcher(
        searcher,
        IndexInputs(
            collection,
            work,
            folder,
            settings,
            config.model_dir,
            model,
            mesh,
            new_partitioner=make_partitioner,
        ),
    )
    return {"searcher": str(folder)} | {key: manifest[key] for key in SUMMARY_KEYS if key in manifest}
