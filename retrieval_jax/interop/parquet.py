"""Passages with their vectors as Parquet, from which vector stores such as PostgreSQL's pgvector are filled.

    passages-00000-of-00012.parquet …    id, title, text: string; vector: list of float32, all of one length

A row for each passage, in the collection's order.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_jax.core.progress import bar
from retrieval_jax.data.collection import Collection, Passage
from retrieval_jax.embeddings.encoding import Embeddings

GROUP_BYTES = 1 << 25  # of the vectors of a row group, which is in memory at once
TEXT_BYTES = 1 << 25  # of the texts of a row group, about: the one that goes beyond is the last
_READ = 64  # passages that are read at once
GROUPS = 32  # of a file: about 1 GB of vectors


def write(folder: Path, embeddings: Embeddings, collection: Collection) -> dict:
    """Writes the files.

    Args:
      folder: where to write.
      embeddings: the vectors, in the collection's order.
      collection: the passages.

    Returns:
      {"passages": their number, "dimensions": of a vector}.
    """
    vectors_NxE = embeddings.vectors_NxE
    count, dimensions = vectors_NxE.shape
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("id", "title", "text")),
            ("vector", pa.list_(pa.float32(), dimensions)),
        ]
    )
    group = max(GROUP_BYTES // (4 * dimensions), 1)
    starts = range(0, count, group * GROUPS)
    with bar("write Parquet", count) as advance:
        for number, start in enumerate(starts):
            path = folder / f"passages-{number:05}-of-{len(starts):05}.parquet"
            # Vectors neither repeat nor shrink.
            compression = {"id": "zstd", "title": "zstd", "text": "zstd", "vector.list.element": "none"}
            with pq.ParquetWriter(path, schema, compression=compression, use_dictionary=["title"]) as writer:
                first = start
                for passages in _groups(collection, range(start, min(start + group * GROUPS, count)), group):
                    vectors_RxE = vectors_NxE[first : first + len(passages)]
                    writer.write_table(_table(schema, passages, vectors_RxE))
                    first += len(passages)
                    advance(len(passages))
    return {"passages": count, "dimensions": dimensions}


def _groups(collection: Collection, rows: range, most: int) -> Iterator[list[Passage]]:
    """Yields the passages of each row group: at most so many, and about TEXT_BYTES of texts."""
    passages, size = [], 0
    for first in range(rows.start, rows.stop, _READ):
        for passage in collection.get(range(first, min(first + _READ, rows.stop))):
            passages.append(passage)
            size += len(passage.full_text.encode())
            if len(passages) == most or size >= TEXT_BYTES:
                yield passages
                passages, size = [], 0
    if passages:
        yield passages


def _table(schema: pa.Schema, passages: Sequence[Passage], vectors_RxE: np.ndarray) -> pa.Table:
    """Makes the table of some passages."""
    numbers = pa.array(np.asarray(vectors_RxE, np.float32).ravel())
    columns = [pa.array([getattr(passage, name) for passage in passages]) for name in ("id", "title", "text")]
    vectors = pa.FixedSizeListArray.from_arrays(numbers, vectors_RxE.shape[1])
    return pa.Table.from_arrays([*columns, vectors], schema=schema)
