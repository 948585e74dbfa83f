"""Tokenised examples on disk, which the verb `cache` writes by seqio's Beam job.

    cache/COLLECTION.KIND.TASK/train.tfrecord-00000-of-00064, info.train.json, stats.train.json, COMPLETED
    cache/COLLECTION.KIND.TASK/record_offsets.npy    int64, examples × 2: example -> file and byte

The folders are seqio's own: `seqio.add_global_cache_dirs(["…/cache"])` makes any seqio or T5X program read
them. `record_offsets.npy` is for the trainer here, which reads example i in whatever order: it finds the same
examples under the same numbers with and without a cache.
"""

import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrieval_jax.core import paths, storage

OFFSETS = "record_offsets.npy"


class CachedExamples:
    """The examples of a task, read from its cache; called with a number, as `examples.Examples` is."""

    def __init__(self, folder: Path):
        folder = paths.ensure_local(folder)
        self.files = sorted(folder.glob("train.tfrecord-*"))
        self.offsets_Nx2 = np.load(folder / OFFSETS, mmap_mode="r")

    @classmethod
    def find(cls, folder: Path, recipe: dict) -> "CachedExamples | None":
        """Opens the cache in a folder, if it is finished and was made by the recipe; else gives None."""
        return cls(folder) if storage.is_up_to_date(folder, recipe) else None

    def __len__(self) -> int:
        return len(self.offsets_Nx2)

    def __call__(self, i: int, rng: np.random.Generator) -> dict[str, Sequence[int]]:
        """Reads example i; nothing is drawn, as a cache holds one epoch."""
        file, start = self.offsets_Nx2[i].tolist()
        (length,) = struct.unpack("<Q", os.pread(self._open[file], 8, start))
        # The record follows its length and that length's checksum.
        return features_of(os.pread(self._open[file], length, start + 12))

    @functools.cached_property
    def _open(self) -> list[int]:
        return [os.open(file, os.O_RDONLY) for file in self.files]


def features_of(record: bytes) -> dict[str, Sequence[int]]:
    """Parses a serialised tf.train.Example: {name: numbers}."""
    from tensorflow_datasets.proto import tf_example_pb2  # TensorFlow's, without TensorFlow

    features = tf_example_pb2.Example.FromString(record).features.feature
    return {name: feature.int64_list.value for name, feature in features.items()}
