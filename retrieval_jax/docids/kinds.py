"""Docid kinds: what a kind defines, and the registry that finds a kind by its name.

A kind is a subclass of `DocidKind` under `@register_docid_kind`. The package's own kinds are in
identifiers.py, semantic.py and residual.py, which `retrieval_jax.docids` imports; a module elsewhere
registers its kinds when it is imported (in a gin file: `import my_package.my_docids`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh

from retrieval_jax.checkpoints.weights import LazyArray
from retrieval_jax.core import arrow_ids, paths, registry, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Names
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.search_strategies import TrieSearch
from retrieval_jax.docids.search_strategy import SearchStrategy
from retrieval_jax.docids.table import DocidShape, DocidTable


@dataclasses.dataclass(frozen=True)
class PreviousTable:
    """The docid table of an earlier state of the collection, whose passages keep their docids."""

    folder: Path
    manifest: dict
    table: DocidTable

    @classmethod
    def open(cls, folder: str | Path, kind: str) -> "PreviousTable":
        """Opens the table in a folder.

        Args:
          folder: the table's folder, also of a bucket.
          kind: name of the docid kind that the table must be of.

        Raises:
          UserError: the folder holds no table, or a table of another kind.
        """
        table = DocidTable.open(folder)
        if table.kind != kind:
            raise UserError(f"EXTENDS: {folder}: holds {table.kind} docids: name a table of {kind} docids")
        return cls(paths.as_path(folder), storage.read_manifest(folder, "docids"), table)


@dataclasses.dataclass(frozen=True)
class DocidRequest:
    """What a kind makes docids from.

    Attributes:
      collection: the collection whose passages get docids.
      previous: the table to extend; None for a new table.
      vectors: the passages' vectors, N×E of any float type, maybe mapped from a file; None where none were
        given. A kind with `needs_vectors` always gets them.
      settings: an instance of the kind's `settings` class, as gin configures it, or as the previous table was
        made with; None for a kind without settings.
      seed: seed of every random choice.
      mesh: the devices to compute on; None for all devices.
    """

    collection: Collection
    previous: PreviousTable | None = None
    vectors: np.ndarray | None = None
    settings: object = None
    seed: int = 0
    mesh: Mesh | None = None

    @functools.cached_property
    def previous_rows(self) -> np.ndarray:
        """int64, N: the row of each passage in the previous table, -1 for a passage that it lacks."""
        if self.previous is None:
            return np.full(self.collection.passage_count, -1)
        return arrow_ids.find_rows(self.previous.table.passage_ids, self.collection.ids)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """int64: the rows of the passages that need a docid, ascending; all rows for a new table."""
        return np.flatnonzero(self.previous_rows < 0)


@dataclasses.dataclass(frozen=True)
class DocidResult:
    """The docids that a kind made.

    Attributes:
      tokens_NxL: non-negative integers, one row for each of `DocidRequest.rows`, padded with 0 on the right;
        then one for each of `extra_docid_passage_M`.
      output_size: number of tokens of the softmax, which is above every token. None: the size of the text
        vocabulary for a kind that writes its pieces, else the largest token + 1, rounded up to 128.
      facts: JSON values to keep in the table's manifest, under names that it has no entry of yet; `extend`
        finds them in `previous.manifest`.
      write: writes what was fitted (a tree of clusters, for example) into the table's folder.
      extra_docid_passage_M: int32, ascending: the passages that the last M docids name, which have several;
        None where each passage has one. Such tables are not extended.
    """

    tokens_NxL: np.ndarray
    output_size: int | None = None
    facts: dict = dataclasses.field(default_factory=dict)
    write: Callable[[Path], object] = lambda folder: None
    extra_docid_passage_M: np.ndarray | None = None


class DocidKind:
    """A kind of docids. A subclass defines `name`, `build` and `shape`, and the rest where it differs.

    Attributes:
      name: the value of DOCIDS that selects the kind; with `pattern`, how a value looks: "rq_LxV".
      pattern: a regular expression for the names of a family of kinds. Its groups are whole numbers, with
        which the class is called. None where `name` is the only name.
      settings: a dataclass that gin configures, an instance of which `DocidRequest.settings` holds, or None.
      needs_vectors: whether the docids depend on the passages' vectors.
      uses_seed: whether the docids depend on `DocidRequest.seed`. If they do, another SEED makes them again.
      search: how a model finds the docids: along a trie, or, where every docid is a single token of its own,
        in one step of the softmax.
    """

    name: str
    pattern: ClassVar[str | None] = None
    settings: ClassVar[type | None] = None
    needs_vectors: ClassVar[bool] = False
    uses_seed: ClassVar[bool] = True
    search: ClassVar[type[SearchStrategy]] = TrieSearch

    def recipe(self, settings: object) -> dict:
        """Returns what the recipe of a new table says of the settings: another one makes it again.

        Args:
          settings: an instance of the class `settings`.
        """
        return {"settings": dataclasses.asdict(settings)}

    def writes_text(self, settings: object) -> bool:
        """Returns whether the tokens are pieces of the collection's text vocabulary, not the docids' own.

        The model then writes them through the softmax over that vocabulary.

        Args:
          settings: as for `recipe`.
        """
        return False

    def build(self, request: DocidRequest) -> DocidResult:
        """Makes the docids of a new table.

        Args:
          request: the collection and what else docids are made from; `request.rows` are all its rows.

        Returns:
          The docids. No token but the padding is 0, and no docid may be a prefix of another; passages may
          share a docid, unless `search` is SoftmaxSearch.

        Raises:
          UserError: the kind has no docids for this collection.
        """
        raise NotImplementedError

    def extend(self, request: DocidRequest) -> DocidResult:
        """Makes docids for the passages that the previous table lacks; the docids in it do not change.

        Args:
          request: as for `build`, with `request.previous`; `request.rows` are the rows of the new passages.

        Returns:
          The docids of the new passages.

        Raises:
          UserError: the kind, or this table, cannot be extended.
        """
        raise UserError(f"EXTENDS: {self.name} docids cannot be extended: leave it out to make a new table")

    def shape(self, passages: int, vocab_size: int) -> DocidShape:
        """Says how large a table of this kind is without making one, rather too large than too small.

        Args:
          passages: number of passages, whose ids are taken to be numbers from 0 on.
          vocab_size: size of the text vocabulary.

        Returns:
          The shape, by which `preflight` plans a training or a search of a collection that is not there.
        """
        raise NotImplementedError

    def centroids(self, folder: Path) -> dict[int, LazyArray]:
        """Gives the vectors that docid tokens stand for, which their embeddings may begin as.

        Args:
          folder: a table of this kind.

        Returns:
          {token: n×E, the vectors of this token and of the n - 1 after it}. Nothing is read yet.

        Raises:
          UserError: tokens of this kind stand for no vectors.
        """
        raise UserError(
            f"InitialCheckpoint.docid_centroids: {self.name} docids have no centroids: choose rq docids, "
            "or leave it out"
        )


_KINDS: dict[str, type[DocidKind]] = {}


def register_docid_kind(kind: type[DocidKind]) -> type[DocidKind]:
    """Adds a docid kind to those that DOCIDS may name; used as a class decorator.

    The class replaces the one that was registered from the same place, as when a notebook's cell runs again.

    Raises:
      TypeError: the class lacks a name or a method.
      ValueError: another class has the same `name`.
    """
    registry.check_complete(kind, DocidKind, ("name", "build", "shape"), "a docid kind")
    registry.register(_KINDS, kind.name, kind, "the docid kind")
    return kind


def kind_names() -> list[str]:
    """Returns the names of all registered kinds, families of kinds (as "rq_LxV") last."""
    return sorted(_KINDS, key=lambda name: _KINDS[name].pattern is not None)


KIND = Names("a kind of docids", kind_names)


def has_centroids(kind: DocidKind) -> bool:
    """Returns whether the tokens of a kind of docids stand for vectors (`DocidKind.centroids`)."""
    return type(kind).centroids is not DocidKind.centroids


def docid_kind(name: str | None) -> DocidKind:
    """Finds a docid kind.

    Args:
      name: its name: "naive", "rq_8x256" and so on.

    Raises:
      UserError: no registered kind has that name; the message lists the kinds.
    """
    for kind in _KINDS.values():
        if match := re.fullmatch(kind.pattern or re.escape(kind.name), name or ""):
            return kind(*map(int, match.groups()))
    raise UserError(
        f"DOCIDS: no kind {name!r}: choose one of {', '.join(kind_names())} "
        "(capital letters stand for numbers, as in rq_8x256)"
    )


def check_dimensions(request: DocidRequest, fitted: np.ndarray) -> None:
    """Raises UserError where the vectors are not as wide as those that the previous table was fitted on."""
    if request.vectors.shape[-1] != fitted.shape[-1]:
        raise UserError(
            f"EMBEDDINGS: vectors of {request.vectors.shape[-1]} dimensions, but {request.previous.folder} "
            f"was made of {fitted.shape[-1]}: use the same model's"
        )


def digits_needed(highest: int, base: int) -> int:
    """Returns how many digits of a base the numbers from 0 to `highest` take: none for 0 alone."""
    count = 0
    while base**count <= highest:
        count += 1
    return count
