"""The docid table: for each passage of a collection the sequence of tokens that names it.

docids/KIND/tokens.npy       uint8, uint16 or int32, passages × length, row = the passage's row, padded with 0
docids/KIND/ids.arrow        passage ids by row (Arrow IPC file)
docids/KIND/extra_docids.npy int32, only where passages have several docids: see `extra_docid_passage_M`
docids/KIND/manifest.json    version, kind, search, size of the output softmax, collection, ancestors
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.decoding.order import order

VERSION = 3
"""Version of the format on disk. Tables of another version are not opened."""
EXTRA_DOCIDS = "extra_docids.npy"


class DocidShape(NamedTuple):
    """What a model and a search need to know of docids that are not made yet.

    Attributes:
      length: tokens of the longest docid.
      output_size: size of the softmax that writes the tokens.
      tokens_per_position: number of different tokens at one position, at most.
      has_docid_vocab: whether the tokens are the docids' own, not pieces of the text vocabulary.
      extra_docids: number of docids of passages besides their first ones.
      docids_per_passage: number of docids of one passage, at most.
    """

    length: int
    output_size: int
    tokens_per_position: int
    has_docid_vocab: bool = True
    extra_docids: int = 0
    docids_per_passage: int = 1


@dataclasses.dataclass(frozen=True)
class DocidTable:
    """The docids of a collection: row <-> passage id <-> docid.

    A passage has the docid in its own row. Where passages have several docids (as in MINDER, Li et al. 2023),
    the other ones are in more rows after those of the passages: `passages_of` and `docids_of` tell whose.

    Attributes:
      kind: name of the docid kind: "atomic", "naive", "semantic", "rq_8x256" and so on.
      tokens_NxL: non-negative integers (uint8, uint16 or int32 on disk), row by row as the collection's
        passages, padded with 0; see `check`. Passages may share a docid.
      passage_ids: the ids of the passages; N of them, unless there are `extra_docid_passage_M`.
      output_size: size of the softmax that writes the tokens; every token is below it.
      collection: fingerprint of the collection.
      ancestors: fingerprints of the tables that this one extends, the newest first.
      vocabulary: checksum of the text vocabulary whose pieces the tokens are; None if the tokens are the
        docids' own.
      search: name of the strategy that finds the docids, "trie" or "softmax"; see search_strategies.py.
      extra_docid_passage_M: int32, ascending: the passages whose docids are in the last M rows of
        `tokens_NxL`, after their first ones; None where each passage has one docid.
    """

    kind: str
    tokens_NxL: np.ndarray
    passage_ids: pa.LargeStringArray
    output_size: int
    collection: str
    ancestors: tuple[str, ...] = ()
    vocabulary: str | None = None
    search: str = "trie"
    extra_docid_passage_M: np.ndarray | None = None

    def passages_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of the passages that docids name.

        Args:
          rows: int, rows of docids, of any shape; negative ones stay as they are.
        """
        if not self.has_several:
            return rows
        passages, is_more = np.array(rows), rows >= len(self.passage_ids)
        passages[is_more] = self.extra_docid_passage_M[rows[is_more] - len(self.passage_ids)]
        return passages

    @property
    def has_several(self) -> bool:
        """Whether a passage may have several docids."""
        return self.extra_docid_passage_M is not None

    def docids_of(self, row: int) -> np.ndarray:
        """Returns the rows of a passage's docids (int64), the first of which is its own row.

        Args:
          row: the passage's.
        """
        if not self.has_several:
            return np.array([row])
        begin, end = np.searchsorted(self.extra_docid_passage_M, [row, row + 1]) + len(self.passage_ids)
        return np.array([row, *range(begin, end)])

    @property
    def length(self) -> int:
        """Number of tokens of the longest docid."""
        return self.tokens_NxL.shape[1]

    @property
    def has_docid_vocab(self) -> bool:
        """Whether the tokens are the docids' own, not pieces of the text vocabulary."""
        return self.vocabulary is None

    def fingerprint(self) -> str:
        """Returns a digest of kind, docids and passage ids, which the dtype of the tokens does not change."""
        return self._fingerprint

    @functools.cached_property  # it is asked for several times, and of millions of docids it takes seconds
    def _fingerprint(self) -> str:
        def parts() -> Iterator[str | bytes]:
            yield from (self.kind, str(self.length))
            for rows in blocks(len(self.tokens_NxL)):
                yield self.tokens_NxL[rows].astype("<i4").tobytes()
            yield arrow_ids.digest(self.passage_ids)
            if self.has_several:
                yield self.extra_docid_passage_M.astype("<i4").tobytes()

        return storage.digest(parts())

    def without(self, passage_ids: Iterable[str]) -> "DocidTable":
        """Returns the table without these passages. Ids that it lacks are ignored."""
        kept = np.ones(len(self.passage_ids), bool)
        rows = arrow_ids.find_rows(self.passage_ids, passage_ids)
        kept[rows[rows >= 0]] = False
        ids, more = self.passage_ids.filter(pa.array(kept)), self.extra_docid_passage_M
        if more is None:
            return self._descendant(self.tokens_NxL[kept], ids)
        stays_M = kept[more]
        more = (np.cumsum(kept, dtype=np.int32) - 1)[more[stays_M]]
        return self._descendant(self.tokens_NxL[np.concatenate([kept, stays_M])], ids, more)

    def with_passages(self, passage_ids: Iterable[str], tokens_PxT: np.ndarray) -> "DocidTable":
        """Returns the table with more passages at its end.

        Args:
          passage_ids: ids of P passages.
          tokens_PxT: a docid of each, padded with 0. If T exceeds the table's length, the table gets longer.

        Raises:
          UserError: a passage is in the table already or twice among the new ones, or `check` finds a fault.
        """
        new = arrow_ids.array(passage_ids)
        if pc.count_distinct(new).as_py() < len(new):
            counts = pc.value_counts(new)
            twice = counts.field("values")[int(pc.index(pc.greater(counts.field("counts"), 1), True).as_py())]
            raise UserError(f"docids/{self.kind}: passage {twice.as_py()!r} is given twice: give it once")
        there = np.flatnonzero(arrow_ids.find_rows(self.passage_ids, new) >= 0)
        if len(there):
            raise UserError(
                f"docids/{self.kind}: has passage {new[int(there[0])].as_py()!r} already: take it away first"
            )
        length, own = max(self.length, tokens_PxT.shape[1]), len(self.passage_ids)
        parts = [self.tokens_NxL[:own], tokens_PxT, self.tokens_NxL[own:]]
        parts = [np.pad(tokens, ((0, 0), (0, length - tokens.shape[1]))) for tokens in parts]
        ids = pa.concat_arrays([self.passage_ids, new])
        table = self._descendant(np.concatenate(parts), ids, self.extra_docid_passage_M)
        table.check()
        return table

    def _descendant(
        self,
        tokens_NxL: np.ndarray,
        passage_ids: pa.LargeStringArray,
        extra_docid_passage_M: np.ndarray | None = None,
    ) -> "DocidTable":
        return dataclasses.replace(
            self,
            tokens_NxL=tokens_NxL,
            passage_ids=passage_ids,
            ancestors=(self.fingerprint(), *self.ancestors),
            extra_docid_passage_M=extra_docid_passage_M,
        )

    def prefixes(self, length: int) -> "DocidTable":
        """Returns the table with docids cut to their first tokens.

        Passages whose docids share that prefix share a docid there. No docid of it is a prefix of another
        where none was before. A model's search of it is the search of the whole docids, stopped there.

        Args:
          length: the number of tokens. Shorter docids stay as they are.
        """
        return dataclasses.replace(self, tokens_NxL=self.tokens_NxL[:, :length])

    def check(self) -> None:
        """Checks that every docid has tokens, all from 1 to output_size - 1, and zeros only after them.

        This is quick, and `open` does it. That no docid is a prefix of another, which takes sorting, is
        checked by `write`.

        Raises:
          UserError: a docid is wrong; the message names it and its passage.
        """
        more, limit = self.extra_docid_passage_M, self.output_size - 1
        if more is not None and not (np.diff(more, prepend=0, append=len(self.passage_ids) - 1) >= 0).all():
            raise UserError(f"docids/{self.kind}: extra_docid_passage_M: give rows of passages, ascending")
        for rows in blocks(len(self.tokens_NxL)):
            tokens = self.tokens_NxL[rows]
            used = tokens != 0
            faults = {
                "no token: number tokens from 1, 0 is padding": ~used.any(1),
                "a 0 before its end: number tokens from 1, 0 is padding": (used[:, 1:] > used[:, :-1]).any(1),
                f"a token outside 1 to {limit}: set a larger output_size": (
                    (tokens < 0) | (tokens > limit)
                ).any(1),
            }
            for what, bad in faults.items():
                if bad.any():
                    row = rows.start + int(bad.argmax())
                    docid, passage = self.tokens_NxL[row].tolist(), self._passage_id(row)
                    raise UserError(f"docids/{self.kind}: {docid}, docid of passage {passage!r}, has {what}")

    def _passage_id(self, row: int) -> str:
        """Returns the id of the passage that the docid in a row names."""
        return self.passage_ids[int(self.passages_of(np.array(row)))].as_py()

    @functools.cached_property  # `write` and the report of the quality both need it
    def ordered(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows in lexicographic order of the docids, tokens shared with the docid before); see `order`."""
        return order(self.tokens_NxL)

    def count_distinct(self) -> int:
        """Returns the number of different docids."""
        return int((self.ordered[1] < self.length).sum())

    def prefix_counts(self, row: int) -> list[int]:
        """Counts the passages whose docids share the first token of a row's docid, the first two, and so on.

        A passage of which several docids begin so counts once.

        Args:
          row: a row of the table.

        Returns:
          As many numbers as the docid has tokens; none is larger than the one before it.
        """
        rows_N, docid = self.ordered[0], self.tokens_NxL[row].tolist()
        low, high, counts = 0, len(rows_N), []
        for column in range(np.count_nonzero(docid)):
            # Docids with a prefix are neighbours in lexicographic order, among those with a shorter one.
            tokens_N = self.tokens_NxL[:, column]
            low = bisect.bisect_left(rows_N, docid[column], low, high, key=tokens_N.__getitem__)
            high = bisect.bisect_right(rows_N, docid[column], low, high, key=tokens_N.__getitem__)
            counts.append(self._count_passages(rows_N[low:high]))
        return counts

    def _count_passages(self, rows_D: np.ndarray) -> int:
        """Counts the different passages that docids name."""
        if not self.has_several:
            return len(rows_D)
        named_P = np.zeros(len(self.passage_ids), bool)
        named_P[self.passages_of(rows_D)] = True
        return int(named_P.sum())

    def write(self, folder: Path) -> dict:
        """Writes the table into a folder.

        Returns:
          What the folder's manifest shall say.

        Raises:
          UserError: `check` finds a fault, or a docid is a prefix of another.
        """
        self.check()
        self._check_prefixes()
        dtype = _smallest_dtype(self.output_size)
        np.save(folder / "tokens.npy", self.tokens_NxL.astype(dtype, copy=False))
        arrow_ids.write(folder / "ids.arrow", self.passage_ids)
        if self.has_several:
            np.save(folder / EXTRA_DOCIDS, self.extra_docid_passage_M.astype(np.int32, copy=False))
        return {
            "version": VERSION,
            "kind": self.kind,
            "passages": len(self.passage_ids),
            "length": self.length,
            "distinct": self.count_distinct(),
            "output_size": self.output_size,
            "collection": self.collection,
            "fingerprint": self.fingerprint(),
            "ancestors": list(self.ancestors),
            "vocabulary": self.vocabulary,
            "search": self.search,
            **({"docids": len(self.tokens_NxL)} if self.has_several else {}),
        }

    def _check_prefixes(self) -> None:
        """Raises UserError where one docid is a prefix of another."""
        rows_N, shared_N = self.ordered
        new = np.flatnonzero(shared_N < self.length)[1:]  # docids that differ from the one before them
        # A docid that is a prefix of any docid is a prefix of the next one in order: it has ended where that
        # one differs from it.
        ended = self.tokens_NxL[rows_N[new - 1], shared_N[new]] == 0
        if ended.any():
            at = new[ended.argmax()]
            short, long = self.tokens_NxL[rows_N[at - 1 : at + 1]]
            a, b = map(self._passage_id, rows_N[at - 1 : at + 1].tolist())
            raise UserError(
                f"docids/{self.kind}: {short[short > 0].tolist()}, docid of passage {a!r}, is a "
                f"prefix of {long[long > 0].tolist()}, docid of passage {b!r}: "
                "end all with a token used for that alone"
            )

    @classmethod
    def open(cls, folder: str | Path) -> "DocidTable":
        """Opens a finished table; its tokens are mapped into memory, not read.

        Args:
          folder: the table's folder, also of a bucket.

        Raises:
          UserError: the table is of another version, its files do not fit its manifest, or `check` finds a
            fault.
        """
        folder = paths.as_path(folder)
        manifest = storage.read_manifest(folder, "docids")
        hint = "make it again: delete the folder, then `retrieval-jax docids`"
        if manifest.get("version") != VERSION:
            raise UserError(f"{folder}: a docid table made by another version of this program: {hint}")
        try:
            tokens = np.load(paths.ensure_local(folder / "tokens.npy"), mmap_mode="r")
            ids = arrow_ids.read(folder / "ids.arrow")
            more = (
                np.load(paths.ensure_local(folder / EXTRA_DOCIDS), mmap_mode="r")
                if "docids" in manifest
                else None
            )
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{folder}: a docid table that cannot be read ({error}): {hint}") from None
        table = cls(
            manifest["kind"],
            tokens,
            ids,
            manifest["output_size"],
            manifest["collection"],
            tuple(manifest["ancestors"]),
            manifest["vocabulary"],
            manifest["search"],
            more,
        )
        if (
            len(tokens) != len(ids) + (0 if more is None else len(more))
            or table.fingerprint() != manifest["fingerprint"]
        ):
            raise UserError(f"{folder}: its files were changed after they were made: {hint}")
        table.check()
        return table


def blocks(count: int, size: int = 1 << 18) -> Iterator[slice]:
    """Yields slices that together cover `count` rows, `size` rows each."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _smallest_dtype(output_size: int) -> type:
    """Returns the smallest dtype of those that a table may have which holds tokens below `output_size`."""
    return next(t for t in (np.uint8, np.uint16, np.int32) if output_size - 1 <= np.iinfo(t).max)
