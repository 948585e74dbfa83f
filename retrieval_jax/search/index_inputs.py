"""What a searcher is built from: the settings, the collection, a model, and what was made of these before."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Fraction, Names, NonNegativeFloat, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Passage
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.search.fusion import NORMALISATIONS
from retrieval_jax.search.stored_vectors import VectorDtype

if TYPE_CHECKING:  # a searcher without a model is built without importing Flax and Orbax
    from jax.sharding import Mesh

    from retrieval_jax.checkpoints.model_folder import LoadedModel
    from retrieval_jax.docids.table import DocidTable
    from retrieval_jax.docids.token_sets import TokenSets
    from retrieval_jax.embeddings.encoding import Embeddings
    from retrieval_jax.mesh.partitioning import Partitioner


FUSION = Names("a fusion", tuple(NORMALISATIONS))


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """The settings of `retrieval-jax index` that kinds of searchers read.

    Args:
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
      plan_size: passages that the plan of a planned search keeps: those of largest lexical score.
      sequential_weight: what a planned search multiplies docids' own scores by before it adds lexical ones;
        None to choose that with the best nDCG@10 on at most 200 queries of `fit_split`, of the weight that
        the model was trained with (joint_ranking's; 1 of other objectives), that times powers of 2 from 1/16
        to 8, and 0.
    """

    beams: Positive = 40
    batch_size: Positive = 32
    recall_target: Fraction | None = None
    expansion: str | None = None
    language: str | None = "porter"
    vector_dtype: VectorDtype = "float32"
    dimensions: Positive | None = None
    parts: Sequence[str] = ()
    fusion: Annotated[str, FUSION] | None = None
    weights: Sequence[NonNegativeFloat] | None = None
    depth: Positive | None = None
    fit_split: str | None = "dev"
    sets: str | None = None
    plan_size: Positive = 1000
    sequential_weight: NonNegativeFloat | None = None


@dataclasses.dataclass(frozen=True)
class IndexInputs:
    """Everything that a searcher can be built from.

    Attributes:
      collection: the collection to be searched.
      work: the collection's work folder, where its docids, embeddings and synthetic queries lie.
      folder: the folder that the searcher will have. While it is built, it may hold an earlier searcher.
      settings: what the user chose.
      model_dir: the trained model's folder; None for kinds that need no model.
      model: that model, opened on `mesh`; None for kinds that need no model.
      mesh: devices of this process; None for kinds that need no model.
      embeddings: the passages' vectors, for kinds with `reads_embeddings`; otherwise None.
      prepared: what the searcher's `prepare` has made.
      new_partitioner: `make_partitioner` of `Searcher.open`, for searchers that are made of others.
    """

    collection: Collection
    work: Workspace
    folder: Path
    settings: IndexSettings = IndexSettings()
    model_dir: str | Path | None = None
    model: "LoadedModel | None" = None
    mesh: "Mesh | None" = None
    embeddings: "Embeddings | None" = None
    prepared: object = None
    new_partitioner: "Callable[[], Partitioner] | None" = None

    @functools.cached_property
    def expansion(self) -> SyntheticQueries | None:
        """The synthetic queries that `settings.expansion` names.

        Raises:
          UserError: they are missing, or were generated for another collection.
        """
        if self.settings.expansion is None:
            return None
        queries = SyntheticQueries(self.work.synthetic(self.settings.expansion))
        queries.check(self.collection)
        return queries

    @functools.cached_property
    def token_sets(self) -> "TokenSets":
        """The sets of tokens that `settings.sets` names, opened; it is told if the model learned others.

        Raises:
          UserError: they are missing, or of another collection or vocabulary.
        """
        from retrieval_jax.docids import token_sets

        folder = token_sets.chosen(self.work, self.settings.sets)
        sets = token_sets.open_for(folder, self.collection.fingerprint, self.model.vocabulary.checksum)
        settings = paths.as_path(self.model_dir) / "settings.json"
        learned = json.loads(settings.read_text()).get(token_sets.LEARNED) if settings.is_file() else None
        if learned not in (None, sets.fingerprint()):
            log(f"{folder}: not the sets that {self.model_dir} was trained with: its weights are for those")
        return sets

    @property
    def docids_folder(self) -> Path:
        """The folder of the docids that the model writes."""
        return self.work.docids(self.model.description["docids"])

    @functools.cached_property
    def docids(self) -> "DocidTable":
        """The docids that the model writes, opened.

        Raises:
          UserError: they are neither the docids that the model was trained on nor an extension of them, or
            they are of another collection.
        """
        from retrieval_jax.docids.table import DocidTable

        folder = self.docids_folder
        if not storage.finished(folder):
            self._check_collection()
        table = DocidTable.open(folder)
        if table.collection != self.collection.fingerprint:
            raise UserError(
                f"{folder}: of another collection than {self.collection.folder}: `retrieval-jax docids`"
            )
        if self.model.description["docids_fingerprint"] not in (table.fingerprint(), *table.ancestors):
            self._check_collection()
            raise UserError(f"{folder}: not the docids that {self.model_dir} was trained on: train it again")
        return table

    def _check_collection(self) -> None:
        """Raises UserError if the model was trained on another collection, whose docids it writes."""
        description, folder = self.model.description, self.collection.folder
        if description["collection"] != self.collection.fingerprint:
            raise UserError(
                f"{self.model_dir}: trained on another collection ({description['collection_name']}, or an "
                f"earlier version) than {folder}: name that model's collection, or train a new one"
            )

    def passages(self) -> Iterator[Passage]:
        """Yields the passages in the collection's order, expanded by the synthetic queries if any are set."""
        return self.expansion.expanded(self.collection) if self.expansion else self.collection.passages()
