"""Passage ids as Arrow string arrays: in memory, in a file, looked up. Millions take little room and time."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_jax.core import paths, storage


def array(ids: Iterable[str] | pa.Array) -> pa.LargeStringArray:
    """Texts as one Arrow array (large: the texts together may exceed 2 GB)."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if isinstance(ids, pa.Array):
        return ids.cast(pa.large_string())
    return pa.array(ids if isinstance(ids, list | tuple) else list(ids), pa.large_string())


def write(path: Path, ids: Iterable[str] | pa.Array) -> None:
    """Writes ids to an Arrow IPC file: one column `id`, one record batch."""
    batch = pa.record_batch([array(ids)], ["id"])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def read(path: Path) -> pa.LargeStringArray:
    """Ids that `write` wrote, mapped into memory. Raises OSError or ValueError where they cannot be read."""
    with pa.memory_map(str(paths.ensure_local(path))) as file:
        return pa.ipc.open_file(file).get_batch(0).column("id")


def find_rows(ids: pa.Array, wanted: Iterable[str] | pa.Array) -> np.ndarray:
    """int64, for each of `wanted` its place in `ids` (which are distinct), or -1 where it is not there."""
    wanted = array(wanted).dictionary_encode()
    # Looking the many up among the few wanted takes less memory than the other way round.
    found = pc.fill_null(pc.index_in(ids, value_set=wanted.dictionary), -1).to_numpy()
    row = np.full(len(wanted.dictionary), -1)
    there = np.flatnonzero(found >= 0)
    row[found[there]] = there
    return row[wanted.indices.to_numpy()]


def first_rows(ids: pa.Array) -> np.ndarray:
    """int64: for each row the first row that has the same id."""
    codes = ids.dictionary_encode().indices.to_numpy()  # numbered as they first appear
    highest = np.maximum.accumulate(codes)
    return np.flatnonzero(np.diff(highest, prepend=-1))[codes]


def batches(ids: pa.Array, size: int = 1 << 16) -> Iterator[list[str]]:
    """The ids as Python texts, some at a time."""
    for first in range(0, len(ids), size):
        yield ids[first : first + size].to_pylist()


def digest(ids: pa.Array) -> str:
    """A fingerprint of ids (without line ends) and their order."""
    return storage.digest("\n".join(some) for some in batches(ids))
