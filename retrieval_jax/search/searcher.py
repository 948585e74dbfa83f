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
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from retrieval_jax.core import paths, registry, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.trec import RankedList
from retrieval_jax.search.index_inputs import IndexInputs
from retrieval_jax.search.manifest import check_sources

if TYPE_CHECKING:  # a searcher without a model is opened without importing Flax and Orbax
    from retrieval_jax.mesh.partitioning import Partitioner


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
      reads_settings: names of the `IndexSettings` that only some kinds of searchers read, and this kind does.
        `retrieval-jax index` refuses the others of those, rather than ignore them.
      is_shared: whether the processes of a `jax.distributed` job hold a part of it each, so that all must
        search for the same queries together.
    """

    kind: ClassVar[str]
    family: ClassVar[str]
    model_family: ClassVar[str | None] = None
    other_model_families: ClassVar[tuple[str, ...]] = ()
    reads_embeddings: ClassVar[bool] = False
    reads_settings: ClassVar[tuple[str, ...]] = ()
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


def can_score(searcher: type[Searcher]) -> bool:
    """Returns whether a kind of searcher scores passages that another one found (`Searcher.score`)."""
    return searcher.score is not Searcher.score


def check_scores(searcher: type[Searcher], name: str, setting: str) -> None:
    """Raises UserError if a searcher cannot score passages; see `can_score`.

    Args:
      searcher: its class.
      name: its name.
      setting: the setting that names it.
    """
    if not can_score(searcher):
        raise UserError(
            f"{setting}: {name} ({searcher.kind}) cannot score the passages that another searcher found: "
            "take a generative, planned, exact, lexical, bm25 or fused one"
        )


def class_and_manifest(folder: Path) -> tuple[type[Searcher], dict]:
    """Returns the class of a searcher's folder, whatever its kind, and the folder's manifest.

    Raises:
      UserError: the folder is not finished, or the searcher's kind is not registered.
    """
    manifest = storage.read_manifest(folder, "index")
    try:
        return searcher_class(manifest["kind"]), manifest
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _open(folder: Path, make_partitioner: "Callable[[], Partitioner] | None") -> Searcher:
    searcher, manifest = class_and_manifest(folder)
    if "files" in manifest:  # it was exported, and may have come from elsewhere
        folder = paths.ensure_local(folder)
        storage.check_files(folder, manifest)
    check_sources(folder, manifest)
    return searcher.open(folder, make_partitioner)
