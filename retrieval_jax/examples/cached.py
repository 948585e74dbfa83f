"""Tokenised examples on disk, which the verb `cache` writes; see write_cache.py.

    cache/COLLECTION.KIND.TASK/train.tfrecord-00000-of-00064, info.train.json, stats.train.json, COMPLETED
    cache/COLLECTION.KIND.TASK/record_offsets.npy    int64, the first byte of each example in its file

The folders are seqio's own: `seqio.add_global_cache_dirs(["…/cache"])` makes any seqio or T5X program read
them. Each file holds a range of examples (`shard_range`), in a random order. `record_offsets.npy` is for the
trainer here, which reads example i in whatever order: it finds the same examples under the same numbers with
and without a cache. A cache holds one epoch, so the trainer reads none of a task whose examples are drawn
again in each (typos, candidates of a group, one of a passage's docids).
"""

import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrieval_jax.core import paths, storage

OFFSETS = "record_offsets.npy"
LAYOUT = 3  # of the folder, a part of its recipe: another one is not read


def shard_range(number: int, shards: int, count: int) -> range:
    """Returns the numbers of the examples in a file.

    Args:
      number: which file.
      shards: how many files there are.
      count: the examples in all of them.
    """
    return range(count * number // shards, count * (number + 1) // shards)


def shard_of(i: int, shards: int, count: int) -> int:
    """Returns the file that example i is in; see `shard_range`."""
    return ((i + 1) * shards - 1) // count


class CachedExamples:
    """The examples of a task, read from its cache; called with a number, as `examples.Examples` is.

    Attributes:
      draws: whether an example may differ from one epoch to the next: none does.
    """

    draws = False

    def __init__(self, folder: Path):
        folder = paths.ensure_local(folder)
        self.files = sorted(folder.glob("train.tfrecord-*"))
        self.offsets_N = np.load(folder / OFFSETS, mmap_mode="r")

    @classmethod
    def find(cls, folder: Path, recipe: dict) -> "CachedExamples | None":
        """Opens the cache in a folder, if it is finished and was made by the recipe; else gives None."""
        return cls(folder) if storage.is_up_to_date(folder, recipe) else None

    def __len__(self) -> int:
        return len(self.offsets_N)

    def __call__(self, i: int, rng: np.random.Generator) -> dict[str, Sequence[int] | Sequence[float]]:
        """Reads example i; nothing is drawn, as a cache holds one epoch."""
        file, start = self._open[shard_of(i, len(self.files), len(self))], int(self.offsets_N[i])
        (length,) = struct.unpack("<Q", os.pread(file, 8, start))
        # The record follows its length and that length's checksum.
        return features_of(os.pread(file, length, start + 12))

    @functools.cached_property
    def _open(self) -> list[int]:
        return [os.open(file, os.O_RDONLY) for file in self.files]


def features_of(record: bytes) -> dict[str, Sequence[int] | Sequence[float]]:
    """Parses a serialised tf.train.Example: {name: numbers}, of integers or floats."""
    from tensorflow_datasets.proto import tf_example_pb2  # TensorFlow's, without TensorFlow

    features = tf_example_pb2.Example.FromString(record).features.feature
    return {name: feature.float_list.value or feature.int64_list.value for name, feature in features.items()}
