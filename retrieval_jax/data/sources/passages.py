"""The passages of a source, in parts that workers read twice: once to check them, and once to write them.

Checking finds every bad line and every id. Only then is it known which passages are kept: the first of
several with one id, or those of a subset. Writing reads the parts again, so that no text stays in memory.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.data import copies, parallel
from retrieval_jax.data.collection import Passage
from retrieval_jax.data.sources import lines
from retrieval_jax.data.sources.lines import ErrorLog, LineError, LineRange, ParseError

_UNSEEN = re.compile(f"[\x00-\x1f\x7f-\x9f{lines.MARK}]")


@dataclasses.dataclass(frozen=True)
class Part:
    """A range of lines and how they are parsed. Calling it yields the passages that are kept.

    Attributes:
      lines: (line number, bytes) of each line.
      parse: a function from a line's text to its passages; it raises ParseError for a bad line.
      header: the first line if it is a header (see `tsv.Table`); otherwise "".
      kept: the indices, among the part's good passages, of those that are kept; None for all.
    """

    lines: LineRange
    parse: Callable[[str], Sequence[Passage]]
    header: str = ""
    kept: np.ndarray | None = None

    def __call__(self) -> Iterator[Passage]:
        """Yields the passages that are kept."""
        good = (passage for _, passage in self.good(ErrorLog()))
        if self.kept is None:
            return good
        kept = np.zeros(self.kept[-1] + 1 if len(self.kept) else 0, bool)
        kept[self.kept] = True
        return (passage for keep, passage in zip(kept.tolist(), good, strict=False) if keep)

    def good(self, errors: ErrorLog) -> Iterator[tuple[int, Passage]]:
        """Yields (line number, passage) of all good passages.

        Args:
          errors: receives the bad lines.
        """
        path = self.lines.path
        for line, text in lines.decode_lines(self.lines, path, errors, self.header):
            try:
                found = self.parse(text)
                for passage in found:
                    _check_passage(passage)
            except ParseError as bad:
                errors.add(bad.at(path, line))
            else:
                for passage in found:
                    yield line, passage


def _check_passage(passage: Passage) -> None:
    check_id(passage.id)
    if not (passage.text.strip() or passage.title.strip()):
        what = f"passage {passage.id[:80]!r} has neither title nor text"
        raise ParseError("empty passage", what, "write one, or remove it")


def check_id(key: str) -> None:
    """Raises ParseError for an id that cannot be a column of a TREC run file, which white space separates."""
    if key.split() != [key]:
        raise ParseError(
            "bad id", f"the id {key[:80]!r} is empty or has whitespace", "write it without spaces"
        )
    if _UNSEEN.search(key):
        what = f"the id {key[:80]!r} has a control character or a byte order mark"
        raise ParseError("bad id", what, "write it without")


@dataclasses.dataclass(frozen=True)
class _Checked:
    """What a worker found in a part.

    Attributes:
      ids: the ids of its good passages.
      lines: int64, their line numbers.
      texts: uint32, a checksum of title and text of each.
      digests: uint64 N×2, by which passages with the same text are found; see `copies`.
      errors: its bad lines.
    """

    ids: pa.LargeStringArray
    lines: np.ndarray
    texts: np.ndarray
    digests: np.ndarray
    errors: ErrorLog


def _check(part: Part) -> _Checked:
    ids, numbers, texts, digests, errors = [], [], [], bytearray(), ErrorLog()
    for line, passage in part.good(errors):
        ids.append(passage.id)
        numbers.append(line)
        texts.append(zlib.crc32(f"{passage.title}\t{passage.text}".encode()))
        digests += copies.digest(passage.full_text)
    return _Checked(
        arrow_ids.array(ids),
        np.array(numbers, np.int64),
        np.array(texts, np.uint32),
        np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2),
        errors,
    )


@dataclasses.dataclass(frozen=True)
class Passages:
    """The checked passages of a source.

    Attributes:
      ids: the ids of the N passages that are kept, by row.
      texts: uint32, N checksums of title and text.
      digests: uint64 N×2, by which passages with the same text are found; see `copies`.
      parts: the parts of the source, in its order.
      kept: bool, for each good passage of the source whether it is one of the N.
      starts: int64, the index of the first good passage of each part among all, and at the end their number.
    """

    ids: pa.LargeStringArray
    texts: np.ndarray
    digests: np.ndarray
    parts: Sequence[Part]
    kept: np.ndarray
    starts: np.ndarray

    def fingerprint(self) -> str:
        """Returns a digest of the N passages and their order, however they were chosen."""
        return storage.digest([arrow_ids.digest(self.ids), self.texts.tobytes()])

    def subset(self, rows: np.ndarray) -> "Passages":
        """Returns the passages at some rows, in the same order."""
        chosen = np.zeros(len(self.ids), bool)
        chosen[rows] = True
        kept = self.kept.copy()
        kept[kept] = chosen
        ids = self.ids.filter(pa.array(chosen))
        return dataclasses.replace(
            self, ids=ids, texts=self.texts[chosen], digests=self.digests[chosen], kept=kept
        )

    def shards(self) -> list[Part]:
        """Returns the source parts restricted to the passages that are kept, without parts that have none."""
        shards = []
        for part, start, end in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            kept = self.kept[start:end]
            if kept.any():
                shards.append(dataclasses.replace(part, kept=None if kept.all() else np.flatnonzero(kept)))
        return shards


def check(parts: Sequence[Part], errors: ErrorLog, repeats: bool = False) -> Passages:
    """Reads all parts for their ids and their bad lines.

    Args:
      parts: the parts of the source, in its order.
      errors: receives the bad lines, which are then left out. A second passage with an id is one, too.
      repeats: whether a passage may stand in several lines, with the same text each time.

    Returns:
      The passages.

    Raises:
      UserError: a line is bad and `errors` does not skip.
    """
    checked = parallel.map_jobs(_check, parts, "checking passages")
    for found in checked:
        errors.merge(found.errors)
    starts = np.cumsum([0, *(len(found.ids) for found in checked)])
    ids = arrow_ids.array(pa.chunked_array([found.ids for found in checked], pa.large_string()))
    texts = np.concatenate([np.zeros(0, np.uint32), *(found.texts for found in checked)])
    digests = np.concatenate([np.zeros((0, 2), np.uint64), *(found.digests for found in checked)])
    first = arrow_ids.first_rows(ids)
    kept = first == np.arange(len(ids))
    bad = np.flatnonzero(~kept)
    if repeats:
        bad = bad[texts[bad] != texts[first[bad]]]

    def place(row: int) -> tuple[Path, int]:
        index = int(np.searchsorted(starts, row, side="right")) - 1
        return parts[index].lines.path, int(checked[index].lines[row - starts[index]])

    kind = "another text" if repeats else "duplicate id"
    for row in bad[: lines.SHOWN].tolist():
        earlier, key = ":".join(map(str, place(first[row]))), ids[row].as_py()[:80]
        used = (
            f"passage {key!r} has another text" if repeats else f"the id {key!r} was used on an earlier line"
        )
        errors.add(LineError(*place(row), kind, f"{used} ({earlier})", "make every id unique"))
    if len(bad) > lines.SHOWN:
        errors.counts[kind] += len(bad) - lines.SHOWN
    errors.raise_first()
    return Passages(ids.filter(pa.array(kept)), texts[kept], digests[kept], parts, kept, starts)
