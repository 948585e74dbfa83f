"""Passages with their vectors as Parquet, from which vector stores such as PostgreSQL's pgvector are filled.

    passages-00000-of-00012.parquet …    id, title, text: string; vector: list of float32, all of one length

A row for each passage, in the collection's order.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_jax.core.progress import bar
from retrieval_jax.data.records import Collection
from retrieval_jax.embeddings.encoding import Embeddings

GROUP_BYTES = 1 << 25  # of the vectors of a row group, which is in memory at once, with its texts
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
                for first in range(start, min(start + group * GROUPS, count), group):
                    rows = range(first, min(first + group, count))
                    writer.write_table(_table(schema, collection, rows, vectors_NxE[rows.start : rows.stop]))
                    advance(len(rows))
    return {"passages": count, "dimensions": dimensions}


def _table(schema: pa.Schema, collection: Collection, rows: range, vectors_RxE: np.ndarray) -> pa.Table:
    """Makes the table of some passages."""
    passages = collection.get(rows)
    numbers = pa.array(np.asarray(vectors_RxE, np.float32).ravel())
    columns = [pa.array([getattr(passage, name) for passage in passages]) for name in ("id", "title", "text")]
    vectors = pa.FixedSizeListArray.from_arrays(numbers, vectors_RxE.shape[1])
    return pa.Table.from_arrays([*columns, vectors], schema=schema)
