"""Passage ids as Arrow string arrays, in memory and in a file: millions take little memory and time."""

import bisect
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_jax.core import paths, storage


def array(ids: Iterable[str] | pa.Array) -> pa.LargeStringArray:
    """Converts strings to one Arrow array (with 64-bit offsets, since together they may exceed 2 GB).

    Args:
      ids: strings, or an Arrow array or chunked array of strings.

    Returns:
      The array, which shares its memory with `ids` where that is an array already.
    """
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if isinstance(ids, pa.Array):
        return ids.cast(pa.large_string())
    return pa.array(ids if isinstance(ids, list | tuple) else list(ids), pa.large_string())


def write(path: Path, ids: Iterable[str] | pa.Array) -> None:
    """Writes ids to an Arrow IPC file with one column `id` and one record batch.

    Args:
      path: the file, on a local disk.
      ids: the ids.
    """
    batch = pa.record_batch([array(ids)], ["id"])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def read(path: Path) -> pa.LargeStringArray:
    """Maps the ids of a file that `write` wrote into memory.

    Args:
      path: the file. A remote one is first copied to this machine.

    Returns:
      The ids.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such file.
    """
    with pa.memory_map(str(paths.ensure_local(path))) as file:
        return pa.ipc.open_file(file).get_batch(0).column("id")


def find_rows(ids: pa.Array, wanted: Iterable[str] | pa.Array) -> np.ndarray:
    """Finds the row of each wanted id.

    Args:
      ids: distinct ids, by row.
      wanted: the ids to find; they may repeat.

    Returns:
      int64, one for each of `wanted`: its index in `ids`, or -1 if it is not there.
    """
    wanted = array(wanted).dictionary_encode()
    # Looking the many up among the few wanted takes less memory than the other way round.
    found = pc.fill_null(pc.index_in(ids, value_set=wanted.dictionary), -1).to_numpy()
    row = np.full(len(wanted.dictionary), -1)
    there = np.flatnonzero(found >= 0)
    row[found[there]] = there
    return row[wanted.indices.to_numpy()]


class RowFinder:
    """Finds rows of a few ids, again and again: `find_rows` reads all ids each time, this is a binary search.

    Args:
      ids: distinct ids, by row. They are sorted when the first one is looked up.
    """

    def __init__(self, ids: pa.Array):
        self.ids = ids

    @functools.cached_property
    def _order_N(self) -> np.ndarray:
        return pc.sort_indices(self.ids).to_numpy()  # by UTF-8, which sorts as Python's strings do

    def __call__(self, wanted: Iterable[str]) -> list[int]:
        """Returns the row of each wanted id, or -1 if it is not there."""
        return [self._row(passage_id) for passage_id in wanted]

    def _row(self, wanted: str) -> int:
        place = bisect.bisect_left(self._order_N, wanted, key=lambda row: self.ids[int(row)].as_py())
        if place == len(self._order_N):
            return -1
        row = int(self._order_N[place])
        return row if self.ids[row].as_py() == wanted else -1


def first_rows(ids: pa.Array) -> np.ndarray:
    """Returns for each row the first row that has the same id, as int64."""
    codes = ids.dictionary_encode().indices.to_numpy()  # numbered as they first appear
    highest = np.maximum.accumulate(codes)
    return np.flatnonzero(np.diff(highest, prepend=-1))[codes]


def batches(ids: pa.Array, size: int = 1 << 16) -> Iterator[list[str]]:
    """Yields the ids as lists of at most `size` Python strings."""
    for first in range(0, len(ids), size):
        yield ids[first : first + size].to_pylist()


def digest(ids: pa.Array) -> str:
    """Returns a fingerprint of the ids and their order. No id may contain a line break."""
    return storage.digest("\n".join(some) for some in batches(ids))
