"""Generated queries (doc2query) on disk: a TFDS dataset with one record for each passage, by row.

    synthetic/NAME/manifest.json
    synthetic/NAME/counts.npy                         int32: how many queries each passage has
    synthetic/NAME/COLLECTION/synthetic/1.0.0/        split train: queries (may be none)

It is joined from shards, which are files of JSON with one line for each passage of a range of rows.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from retrieval_jax.core import paths, storage, unfinished
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection, Passage
from retrieval_jax.data.records import Records, write_dataset

VERB = "generate-queries"
SHARD = 100_000  # passages a file, about
_BATCH = 1024  # records read at once


class SyntheticQueries:
    """The generated queries of a finished folder `synthetic/NAME`, read without TensorFlow.

    Args:
      folder: the folder, local or remote.

    Attributes:
      fingerprint: a digest of all queries and their order.
      collection: the fingerprint of the collection whose passages they are of.
      total: the number of queries.
    """

    def __init__(self, folder: str | Path):
        self.folder = paths.as_path(folder)
        manifest = storage.read_manifest(folder, VERB)
        self.fingerprint: str = manifest["fingerprint"]
        self.collection: str = manifest["recipe"]["collection"]
        self.total: int = manifest["queries"]
        self._name: str = manifest["name"]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int32, the number of queries of each passage; mapped into memory.

        Raises:
          UserError: their file cannot be read.
        """
        try:
            return np.load(paths.ensure_local(self.folder / "counts.npy"), mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            hint = f"delete the folder, then `retrieval-jax {VERB}`"
            raise UserError(f"{self.folder}: cannot be read ({error}): {hint}") from None

    @functools.cached_property
    def _records(self) -> Records:
        return Records(self.folder, self._name, "synthetic", "train")

    def get(self, rows: Sequence[int]) -> list[list[str]]:
        """Reads the queries of the passages at these rows."""
        records = self._records.get(rows)
        return [[query.decode() for query in record["queries"].bytes_list.value] for record in records]

    def queries(self, row: int) -> list[str]:
        """Reads the queries of the passage at a row."""
        return self.get([row])[0]

    def check(self, collection: Collection) -> None:
        """Raises UserError if these are the queries of another collection."""
        if self.collection != collection.fingerprint:
            raise UserError(
                f"{self.folder}: of another collection (or an earlier version) than {collection.folder}: "
                f"make it again with `retrieval-jax {VERB}`"
            )

    def expanded(self, collection: Collection, rows: range | None = None) -> Iterator[Passage]:
        """Yields passages by row, each text followed by its queries (Nogueira et al., 2019).

        Args:
          collection: the collection.
          rows: the passages' rows; None for all.
        """
        rows = range(collection.passage_count) if rows is None else rows
        for first in range(0, len(rows), _BATCH):
            some = rows[first : first + _BATCH]
            for passage, queries in zip(collection.get(some), self.get(some), strict=True):
                yield Passage(passage.id, passage.title, " ".join([passage.text, *queries]))


class QueryShards(unfinished.Shards):
    """Shards of the passages by row: the "queries" of each, and how many were "made" and "distinct"."""

    def records(self, numbers: Iterable[int]) -> Iterator[dict]:
        """Yields the lines of these shards as records of the dataset."""
        return ({"queries": line["queries"]} for line in self.read(numbers))


def join(folder: Path, collection: Collection, shards: QueryShards) -> dict:
    """Joins all shards into the dataset.

    Args:
      folder: an empty local folder for the dataset.
      collection: the collection.
      shards: the shards, all of which exist.

    Returns:
      The facts for the folder's manifest.
    """
    import tensorflow_datasets as tfds

    shards = dataclasses.replace(shards, folder=paths.ensure_local(shards.folder))
    counts = np.zeros(shards.total, np.int32)
    totals = {"made": 0, "distinct": 0}

    def contents() -> Iterator[str]:
        for row, line in enumerate(shards.read(range(shards.count))):
            counts[row] = len(line["queries"])
            for key in totals:
                totals[key] += line[key]
            yield "\n".join(line["queries"])

    fingerprint = storage.digest(contents())
    np.save(folder / "counts.npy", counts)
    step = max(SHARD // shards.size, 1)
    files = [
        functools.partial(shards.records, range(first, min(first + step, shards.count)))
        for first in range(0, shards.count, step)
    ]
    features = {"queries": tfds.features.Sequence(tfds.features.Text())}
    write_dataset(folder, collection.name, "synthetic", features, {"train": files})
    return {
        "name": collection.name,
        "passages": shards.total,
        **totals,
        "queries": int(counts.sum()),
        "fingerprint": fingerprint,
    }
