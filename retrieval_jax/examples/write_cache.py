"""Writes the cache of tokenised examples: the files that seqio's own cache job would write. See cached.py.

Each file holds a range of examples. Processes, as many as there are cores, make a file each: they read and
tokenise some thousand examples at once, put them into a random order (a program that reads files from their
beginning, as seqio does, is to see examples of the whole range in its buffer) and write TFRecords. A finished
file is kept in CACHE.unfinished, so that a kill loses only the files in progress.
"""

import dataclasses
import importlib.metadata
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from retrieval_jax.core import locks, npy, paths, storage, unfinished
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import UNFINISHED, Workspace
from retrieval_jax.data import parallel
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import EOS, NO_PROMPTS, PAD, Prompts
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.cached import OFFSETS, shard_range
from retrieval_jax.examples.examples import Examples
from retrieval_jax.examples.features import Features, array_dtype
from retrieval_jax.examples.targets import Targets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset

NUMBER = "example"  # the feature that holds an example's number
SHARD_BYTES = 1 << 27  # of a file, about
MAX_SHARDS = 512  # files that a reader has open; beyond, files get larger
FEWEST = 10_000  # examples of a file, where a task has less than SHARD_BYTES for each of …
SHARED_BY = 64  # … so many cores, which make the files, and hosts, which read them
_BATCH = 2048  # examples that are made at once
_SAMPLE = 1000  # examples that tell how large one is


@dataclasses.dataclass(frozen=True)
class DatasetFolders:
    """What a TrainDataset is opened from, in any process.

    Attributes:
      config, work, target_type, prompts: as TrainDataset has them.
      docids: the kind of the docids, where they are the targets.
    """

    config: DataConfig
    work: Workspace
    target_type: type[Targets]
    docids: str | None = None
    prompts: Prompts = NO_PROMPTS

    def open(self) -> TrainDataset:
        """Opens the examples. Raises UserError where something that they are made of is missing."""
        table = DocidTable.open(self.work.docids(self.docids)) if self.docids else None
        collection = Collection(self.work.collection)
        return TrainDataset(self.config, self.work, collection, self.target_type, table, self.prompts)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write.

    Attributes:
      dataset, task: where its examples come from.
      recipe: that of the examples, as JSON.
      folder: where the file goes.
      number, shards, count: see `shard_range`.
    """

    dataset: DatasetFolders
    task: str
    recipe: str
    folder: Path
    number: int
    shards: int
    count: int

    @property
    def numbers(self) -> range:
        """The numbers of the examples."""
        return shard_range(self.number, self.shards, self.count)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"train.tfrecord-{self.number:05}-of-{self.shards:05}"

    @property
    def offsets_path(self) -> Path:
        """The file that tells where the records are, by example."""
        return self.folder / f"{self.number:05}.npy"

    @property
    def stats_path(self) -> Path:
        """The file that counts tokens; written last, it says that the shard is finished."""
        return self.folder / f"{self.number:05}.json"


def write_cache(
    dataset: DatasetFolders, opened: TrainDataset, task: str, beam_options: Sequence[str] = ()
) -> dict:
    """Writes the cache of a task, unless it is there.

    Args:
      dataset: the examples.
      opened: the same, opened.
      task: the name of the task.
      beam_options: flags of a Beam runner that makes the files instead of this machine's cores.

    Returns:
      The manifest of the folder, with "examples", "shards" (their number) and "bytes".

    Raises:
      UserError: the task has no examples, or the folder cannot be written.
    """
    folder, recipe = opened.work.cache(f"{opened.prefix}.{task}"), opened.recipe(task)
    scratch = _unfinished_folder(folder)
    if storage.is_up_to_date(folder, recipe):
        manifest = storage.read_manifest(folder, "cache")
        unfinished.remove_leftover(scratch, recipe | {"shards": manifest["shards"]})
        return manifest
    with locks.lock(scratch):  # another command may be making it
        if not storage.is_up_to_date(folder, recipe):
            examples = opened.computed(task)
            if not len(examples):
                raise UserError(f"{folder.name}: no examples: leave the task out of DataConfig.mixture")
            shards = shard_count(examples)
            jobs = [
                Shard(dataset, task, json.dumps(recipe), scratch, number, shards, len(examples))
                for number in range(shards)
            ]
            begun = recipe | {"shards": shards}
            unfinished.begin(scratch, begun, [job.stats_path for job in jobs], "files")
            _make(jobs, beam_options)
            storage.build_once(folder, recipe, lambda tmp: _join(tmp, jobs, examples))
            paths.remove(scratch)
    return storage.read_manifest(folder, "cache")


def _unfinished_folder(folder: Path) -> Path:
    """Returns where the files of a cache lie until all are there: for a bucket, on this machine."""
    name = f"{folder.name}{UNFINISHED}"
    if paths.is_remote(folder):
        return paths.cache_folder() / storage.digest([str(folder)]) / name
    return paths.absolute(folder).with_name(name)


def shard_count(examples: Examples) -> int:
    """Chooses the number of files, by the size of a sample of the examples."""
    count = len(examples)
    sample = np.unique(np.linspace(0, count - 1, _SAMPLE).astype(np.int64)).tolist()
    features = examples.get(sample, map(np.random.default_rng, sample))
    size = sum(len(record(serialise(made, i))) for made, i in zip(features, sample, strict=True))
    whole = count * size / len(sample)
    return max(min(count // FEWEST, SHARED_BY), min(round(whole / SHARD_BYTES), MAX_SHARDS), 1)


def _make(jobs: Sequence[Shard], beam_options: Sequence[str]) -> None:
    """Makes the files that are missing."""
    for half_written in jobs[0].folder.glob(".*"):
        half_written.unlink()
    missing = [job for job in jobs if not job.stats_path.exists()]
    if beam_options:
        parallel.run_on_beam(write_shard, missing, beam_options)
        return
    done = sum(len(job.numbers) for job in jobs) - sum(len(job.numbers) for job in missing)
    sizes = [len(job.numbers) for job in missing]
    parallel.map_jobs(write_shard, missing, f"cache {jobs[0].task}", sizes, done)


def write_shard(shard: Shard) -> None:
    """Makes the examples of a file and writes it, completely or not at all."""
    examples = _opened(shard)
    features, records, stats = examples.targets.features, [], _Stats()
    for first in range(shard.numbers.start, shard.numbers.stop, _BATCH):
        numbers = range(first, min(first + _BATCH, shard.numbers.stop))
        for i, made in zip(numbers, examples.get(numbers, map(np.random.default_rng, numbers)), strict=True):
            records.append(record(serialise(made, i)))
            stats.add(made, features)
    order = np.random.default_rng(shard.number).permutation(len(records))
    lengths = np.array([len(one) for one in records])[order]
    offsets_N = np.empty(len(records), np.int64)
    offsets_N[order] = np.cumsum(lengths) - lengths

    tmp = shard.path.with_name(f".{shard.path.name}.{os.getpid()}")
    with tmp.open("wb", buffering=1 << 20) as file:
        file.writelines(map(records.__getitem__, order.tolist()))
    tmp.replace(shard.path)
    np.save(shard.offsets_path, offsets_N)
    storage.write_json(shard.stats_path, {"total": stats.total, "most": stats.most})


_EXAMPLES: dict[tuple, Examples] = {}
"""Of this process: the task whose shards it makes, since opening one takes seconds."""


def _opened(shard: Shard) -> Examples:
    key = (shard.folder, shard.task, shard.recipe)
    if key not in _EXAMPLES:
        dataset = shard.dataset.open()
        dataset.vocabulary.threads = 1  # each core has a process of its own
        _EXAMPLES.clear()
        _EXAMPLES[key] = dataset.computed(shard.task)
    return _EXAMPLES[key]


def serialise(features: Features, number: int) -> bytes:
    """Returns the tf.train.Example of an example and its number, as seqio's `dict_to_tfexample` makes it."""
    from tensorflow_datasets.proto import tf_example_pb2  # TensorFlow's, without TensorFlow

    example = tf_example_pb2.Example()
    of_name = example.features.feature
    for name, values in features.items():
        feature = of_name[name]
        numbers = feature.int64_list if array_dtype(name) is np.int32 else feature.float_list
        numbers.value.extend(values)
    of_name[NUMBER].int64_list.value.append(number)
    return example.SerializeToString(deterministic=True)


def record(data: bytes) -> bytes:
    """Returns a record of a TFRecord file: length, its checksum, data, their checksum."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked_crc(length), data, _masked_crc(data)))


def _masked_crc(data: bytes) -> bytes:
    """Returns the CRC-32C, rotated right by 15 bits and added to a constant, as TFRecord wants it."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


class _Stats:
    """Counts tokens as seqio does: of features of integers, neither padding nor, in a text, ends."""

    def __init__(self):
        self.total: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def add(self, made: Features, features: Mapping[str, object]) -> None:
        for name, values in made.items():
            if array_dtype(name) is not np.int32:
                continue
            tokens = len(values) - values.count(PAD)
            if features[name].add_eos:
                tokens -= values.count(EOS)
            self.total[name] = self.total.get(name, 0) + tokens
            self.most[name] = max(self.most.get(name, 0), tokens)


def _join(folder: Path, jobs: Sequence[Shard], examples: Examples) -> dict:
    """Makes the cache's folder of its finished files, and returns the manifest's facts."""
    count, size = len(examples), 0
    with (folder / OFFSETS).open("wb") as file:
        npy.begin(file, np.int64, (count,))
        for job in jobs:
            file.write(np.load(job.offsets_path).tobytes())
    stats = {"examples": count}
    for job in jobs:
        paths.link(job.path, folder / job.path.name)
        size += paths.size(job.path)
        made = storage.read_json(job.stats_path, f"delete {job.folder}")
        for name, total in made["total"].items():
            stats[f"{name}_tokens"] = stats.get(f"{name}_tokens", 0) + total
        for name, most in made["most"].items():
            stats[f"{name}_max_tokens"] = max(stats.get(f"{name}_max_tokens", 0), most)
    described = {
        name: {"dtype": feature.dtype, "shape": [None]} for name, feature in examples.targets.features.items()
    }
    info = {
        "num_shards": len(jobs),
        "features": described | {NUMBER: {"dtype": "int64", "shape": []}},
        "seqio_version": importlib.metadata.version("seqio"),
    }
    storage.write_json(folder / "info.train.json", info)
    storage.write_json(folder / "stats.train.json", stats)
    (folder / "COMPLETED").touch()  # seqio's mark
    return {"examples": count, "shards": len(jobs), "bytes": size}
