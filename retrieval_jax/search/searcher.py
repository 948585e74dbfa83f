"""The `Searcher` interface, the registry of searcher kinds, and opening a searcher's folder.

A searcher is all that evaluation, reports and servers know of a retriever. A kind of searcher is one class.
This adds one, from any package and without a change to another file:

    @register_searcher
    class Mine(Searcher):
        kind = "mine"            # --gin.make_index.kind="'mine'"
        family = "lexical"       # the label in reports

        def search(self, queries, k): ...

        @classmethod
        def write(cls, folder, inputs): ...    # called by `retrieval-jax index`

        @classmethod
        def open(cls, folder, make_partitioner=None): ...

The class must be imported before its kind is used: in Python by `import`, on the command line by a gin file
(`--gin_file`) with the line `import MODULE`.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from retrieval_jax.core import paths, registry, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Passage
from retrieval_jax.data.synthetic import SyntheticQueries

if TYPE_CHECKING:  # a searcher without a model is opened without importing Flax and Orbax
    from jax.sharding import Mesh

    from retrieval_jax.checkpoints.model_folder import LoadedModel
    from retrieval_jax.docids.token_sets import TokenSets
    from retrieval_jax.embeddings.encoding import Embeddings
    from retrieval_jax.mesh.partitioning import Partitioner

RankedList = list[tuple[str, float]]
"""(passage id, score) of each retrieved passage, best first, no passage twice."""


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """The settings of `retrieval-jax index` that a kind of searcher may read.

    Attributes:
      beams: beams of a generative search, which is the most docids that it finds.
      batch_size: queries that a generative search decodes at once.
      recall_target: recall of an approximate top-k over atomic docids; None for the exact top-k.
      expansion: name of the synthetic queries that are appended to the passages; None for none.
      language: the language of a lexical search, by the name of Snowball's stemmer ("porter" is English);
        None for no stemmer and no stop words.
      vector_dtype: what a searcher keeps vectors as: "float32", "bfloat16" or "int8".
      dimensions: how many of the vectors' first dimensions are searched; None for all.
      parts: names of the searchers that a fused searcher is made of.
      fusion: how their results become one list, a key of `fusion.NORMALISATIONS`; None for the best one.
      weights: the weight of each part; None to choose them with queries of `fit_split`.
      depth: passages of each part that count; None to choose it with the weights.
      fit_split: the split of queries to choose with; None for equal weights, or, of a planned searcher, the
        sequential weight of the model's training.
      sets: name of the sets of tokens that passages are scored by; None for the only ones.
      plan_size: passages that the plan of a planned search keeps.
      sequential_weight: of docids' own scores beside the lexical ones; None to choose it with queries of
        `fit_split`.
    """

    beams: int = 40
    batch_size: int = 32
    recall_target: float | None = None
    expansion: str | None = None
    language: str | None = "porter"
    vector_dtype: str = "float32"
    dimensions: int | None = None
    parts: tuple[str, ...] = ()
    fusion: str | None = None
    weights: tuple[float, ...] | None = None
    depth: int | None = None
    fit_split: str | None = "dev"
    sets: str | None = None
    plan_size: int = 1000
    sequential_weight: float | None = None


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

    def passages(self) -> Iterator[Passage]:
        """Yields the passages in the collection's order, expanded by the synthetic queries if any are set."""
        return self.expansion.expanded(self.collection) if self.expansion else self.collection.passages()


class Searcher:
    """Base class of all searchers: finds the passages that answer a query.

    Attributes:
      kind: the name by which users choose this kind of searcher.
      family: the label of its methods in tables and reports, such as "lexical".
      model_family: the family of the model that it searches with (the model class's `family`); None if it
        needs no model.
      other_model_families: more families whose models it searches with, where it is asked for.
      reads_embeddings: whether `write` needs the passages' vectors, which its `make_embeddings` makes; see
        `dense.DenseSearcher`.
      is_shared: whether the processes of a `jax.distributed` job hold a part of it each, so that all must
        search for the same queries together.
    """

    kind: ClassVar[str]
    family: ClassVar[str]
    model_family: ClassVar[str | None] = None
    other_model_families: ClassVar[tuple[str, ...]] = ()
    reads_embeddings: ClassVar[bool] = False
    is_shared: bool = False

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """Finds the best k passages of each query.

        Equal scores are in the order of the passages in the collection, for any `k`, batch and number of
        devices. Different docids that a generative model finds equally probable are in the order of its
        beams; atomic docids are in the order of their tokens, which is the order of the passages unless the
        docids were extended. Half a surrogate pair in a query (which is not UTF-8) is read as U+FFFD.

        Args:
          queries: any number of queries, also none.
          k: the number of passages to find.

        Returns:
          A ranked list per query, shorter than k where fewer passages are found.
        """
        raise NotImplementedError

    def search_certified(self, queries: Sequence[str], k: int) -> tuple[list[RankedList], list[bool | None]]:
        """Searches as `search` does, and tells what is known of the first passages.

        Returns:
          (the ranked lists; for each query whether its first passage is proven to be the one that scoring
          every docid would rank first, None where nothing is known of it).
        """
        return self.search(queries, k), [None] * len(queries)

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores passages that another searcher found, as `search` would. A kind of searcher may lack this.

        Args:
          queries: any number of queries, also none.
          candidates: passage ids for each query.

        Returns:
          The scores of each query's candidates, in their order; NaN for a passage that it does not know.
        """
        raise NotImplementedError

    def compile_for(self, queries: Sequence[str]) -> None:
        """Compiles what depends on the lengths of queries that will be searched for at once.

        A searcher that pads all queries to one length need not override this.
        """

    def explain(self, query: str, ranked_list: RankedList) -> dict | None:
        """Explains how `search` found the passages of a query. A kind of searcher may lack this.

        Args:
          query: the query.
          ranked_list: what the search found, or the beginning of it.

        Returns:
          The explanation, as JSON; None if there is none.
        """
        return None

    def truncates(self, query: str) -> bool:
        """Returns whether a query is longer than its model reads: then only its beginning is searched for."""
        return False

    def use_batch_sizes(self, sizes: Sequence[int]) -> None:
        """Pads batches to the smallest of several sizes from now on: a server calls it, and then `search`.

        After `search` of a batch of each size, no other of up to the largest size waits for the compiler. A
        searcher that compiles nothing pays for the queries alone, and need not override this.

        Args:
          sizes: the numbers of queries, ascending.
        """

    @classmethod
    def is_installed(cls) -> bool:
        """Returns whether the packages that it needs are there. If they are not, it is no model's default."""
        return True

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """Returns what the searcher depends on besides its kind, collection, expansion and model.

        The entries must be JSON. They are written to the manifest, also as a part of the recipe: with
        another recipe, `retrieval-jax index` builds the searcher again.
        """
        return {}

    @classmethod
    def prepare(cls, inputs: IndexInputs, recipe: dict) -> contextlib.AbstractContextManager:
        """Does the work that the processes of a run share out. By default there is none.

        Args:
          inputs: what to build the searcher from.
          recipe: what the searcher depends on.

        Returns:
          A context manager, which every process enters. What it yields is `inputs.prepared` of `write`, which
          process 0 calls in the context.
        """
        return contextlib.nullcontext()

    @classmethod
    def tidy(cls, inputs: IndexInputs, recipe: dict) -> None:
        """Removes what a kill at the end of `prepare` left; process 0 calls it of a finished searcher."""

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict | None:
        """Builds the searcher: writes the files that `open` reads.

        Args:
          folder: an empty folder, which is renamed to `inputs.folder` when it is finished.
          inputs: what to build the searcher from.

        Returns:
          Facts for the searcher's manifest, as JSON; None for no facts.
        """
        raise NotImplementedError

    @staticmethod
    def open(folder: str | Path, make_partitioner: "Callable[[], Partitioner] | None" = None) -> "Searcher":
        """Opens a searcher that `retrieval-jax index` or `export` made, whatever its kind.

        This needs neither gin nor the collection, and imports TensorFlow for no kind. A subclass overrides
        it with a class method that opens a folder of its own kind.

        Args:
          folder: the searcher's folder.
          make_partitioner: makes the mesh that the searcher runs on, if it runs on one, with the rules by
            which parameters are divided over it; None for all devices and T5X's rules.

        Raises:
          UserError: files are missing or were changed after they were written, or the searcher's kind is
            not registered.
        """
        return _open(paths.as_path(folder), make_partitioner)


_Class = TypeVar("_Class", bound=type[Searcher])
_MODULES = {
    "generative": "retrieval_jax.search.generative",
    "scann": "retrieval_jax.search.dense",
    "exact": "retrieval_jax.search.dense",
    "bm25": "retrieval_jax.search.bm25",
    "fused": "retrieval_jax.search.fused",
    "softmax_vectors": "retrieval_jax.search.softmax_vectors",
    "planned": "retrieval_jax.search.planned",
    "lexical": "retrieval_jax.search.lexical",
}
"""Kind -> the package's own module that registers it. It is imported when that kind is asked for."""
_CLASSES: dict[str, type[Searcher]] = {}


def register_searcher(searcher: _Class) -> _Class:
    """Adds a kind of searcher: a class decorator. The module's docstring shows how.

    The class replaces the one that was registered from the same place, as when a notebook's cell runs again.

    Raises:
      TypeError: the class lacks a name, a label or a method.
      ValueError: another class has the same `kind`.
    """
    required = ("kind", "family", "search", "write", "open")
    registry.check_complete(searcher, Searcher, required, "a searcher")
    registry.register(_CLASSES, searcher.kind, searcher, "the searcher")
    return searcher


def searcher_kinds(model_family: str | None = None) -> list[str]:
    """Returns the names of all kinds: the package's own, then those that others registered.

    Args:
      model_family: only kinds that search with models of this family; None for all kinds. Telling them apart
        imports their modules.
    """
    kinds = [*dict.fromkeys([*_MODULES, *_CLASSES])]
    return [k for k in kinds if model_family is None or searcher_class(k).model_family == model_family]


def searcher_class(kind: str) -> type[Searcher]:
    """Returns the class of a kind of searcher, and imports the module of no other kind.

    Raises:
      UserError: no such kind is registered.
    """
    if kind not in _CLASSES and kind in _MODULES:
        importlib.import_module(_MODULES[kind])
    if kind not in _CLASSES:
        raise UserError(
            f"no kind of searcher {kind!r}: choose one of {', '.join(searcher_kinds())}, or import the "
            "module that registers it (a gin file can: `import MODULE`)"
        )
    return _CLASSES[kind]


def check_scores(searcher: type[Searcher], name: str, setting: str) -> None:
    """Raises UserError if a searcher cannot score the passages that another one found (`Searcher.score`).

    Args:
      searcher: its class.
      name: its name.
      setting: the setting that names it.
    """
    if searcher.score is Searcher.score:
        raise UserError(
            f"{setting}: {name} ({searcher.kind}) cannot score the passages that another searcher found: "
            "take an exact, scann, generative, planned, lexical, fused or bm25 one"
        )


def searcher_manifest(folder: Path, collection: Collection) -> dict:
    """Returns the manifest that `retrieval-jax index` wrote.

    Raises:
      UserError: the searcher is of another collection, or its model or a part of it was replaced since.
    """
    manifest = storage.read_manifest(folder, "index")
    if manifest["recipe"]["collection"] != collection.fingerprint:
        raise UserError(
            f"{folder}: made of another collection than {collection.folder}: `retrieval-jax index`"
        )
    check_sources(folder, manifest)
    return manifest


def check_sources(folder: Path, manifest: dict) -> None:
    """Raises UserError if what a searcher answers with is not what it was built with.

    That is its model (see `check_model`), and of a fused searcher its parts: its weights were chosen for
    those. What an exported folder holds is checked together with that folder's other files.
    """
    if "files" in manifest:
        return
    check_model(folder, manifest)
    for part in manifest.get("parts", ()):
        place = paths.join(folder, part["folder"])
        now = storage.read_manifest(place, "index")
        if now["recipe"] != part["recipe"]:
            raise UserError(
                f"{paths.absolute(place)}: not the searcher that {folder} was made of: make {folder.name} "
                "again, `retrieval-jax index`"
            )
        check_sources(place, now)


def check_model(folder: Path, manifest: dict) -> None:
    """Raises UserError if a searcher's model is not the one that the searcher was built with.

    A model can be trained again to the same step, so that only its content tells them apart. Nothing is
    raised here if the model or its checkpoint is missing: opening the searcher reports that.
    """
    if "model" not in manifest:
        return
    from retrieval_jax.checkpoints.model_folder import DESCRIPTION, model_checksum, read_description

    model = paths.join(folder, manifest["model"])
    if not (model / DESCRIPTION).is_file():
        return
    now = model_checksum(model, manifest["step"], read_description(model))
    if now is not None and now != manifest["recipe"].get("checksum"):
        raise UserError(
            f"{paths.absolute(model)}: not the model (of step {manifest['step']}) that {folder} was made of: "
            "`retrieval-jax index`"
        )


def _open(folder: Path, make_partitioner: "Callable[[], Partitioner] | None") -> Searcher:
    manifest = storage.read_manifest(folder, "index")
    try:
        searcher = searcher_class(manifest["kind"])
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if "files" in manifest:  # it was exported, and may have come from elsewhere
        folder = paths.ensure_local(folder)
        storage.check_files(folder, manifest)
    check_sources(folder, manifest)
    return searcher.open(folder, make_partitioner)
