"""The verb `cache`: tokenised examples on disk, written by seqio's Beam job.

    cache/COLLECTION.KIND.TASK/train.tfrecord-00000-of-00064, info.train.json, stats.train.json, COMPLETED
    cache/COLLECTION.KIND.TASK/places.npy    int64, examples × 2: example -> file and byte

The folders are seqio's own: `seqio.add_global_cache_dirs(["…/cache"])` makes any seqio or T5X program read
them. `places.npy` is for the trainer here, which reads example i in whatever order: it finds the same
examples under the same numbers with and without a cache.
"""

import functools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin
import numpy as np

from retrieval_jax.core import paths, storage
from retrieval_jax.core.progress import say
from retrieval_jax.core.workspace import Work
from retrieval_jax.data import parallel
from retrieval_jax.data.records import Collection
from retrieval_jax.docids.table import DocidTable

PLACES = "places.npy"


class CachedExamples:
    """A task's examples from its cache. See examples.Examples."""

    def __init__(self, folder: Path):
        folder = paths.local(folder)
        self.files = sorted(folder.glob("train.tfrecord-*"))
        self.places_Nx2 = np.load(folder / PLACES, mmap_mode="r")

    @classmethod
    def find(cls, folder: Path, recipe: dict) -> "CachedExamples | None":
        """The cache in a folder, if it is finished and was made by that recipe."""
        return cls(folder) if storage.holds(folder, recipe) else None

    def __len__(self) -> int:
        return len(self.places_Nx2)

    def __call__(self, i: int, rng: np.random.Generator) -> dict[str, Sequence[int]]:
        file, start = self.places_Nx2[i].tolist()
        (length,) = struct.unpack("<Q", os.pread(self._open[file], 8, start))
        return _features(os.pread(self._open[file], length, start + 12))  # after the length and its checksum

    @functools.cached_property
    def _open(self) -> list[int]:
        return [os.open(file, os.O_RDONLY) for file in self.files]


def _features(record: bytes) -> dict[str, Sequence[int]]:
    from tensorflow_datasets.proto import tf_example_pb2  # TensorFlow's, without TensorFlow

    features = tf_example_pb2.Example.FromString(record).features.feature
    return {name: feature.int64_list.value for name, feature in features.items()}


def _records(file: Path) -> Iterator[tuple[int, bytes]]:
    """(first byte, record) of each record of a TFRecord file."""
    with file.open("rb") as stream:
        while head := stream.read(12):
            yield stream.tell() - 12, stream.read(struct.unpack("<Q", head[:8])[0])
            stream.seek(4, os.SEEK_CUR)


@gin.configurable
def cache(
    source: str,
    data: "TrainingData",  # noqa: F821 (it knows about caches)
    work_dir: str | None = None,
    docids: str | None = "naive",
    answer: str = "docids",
    beam_options: Sequence[str] = (),
) -> dict:
    """Writes the tokenised examples of the tasks that a training run mixes, by seqio's Beam job.

    Training with the same settings then reads them. A task that is there already is not made again.

    Args:
      source, work_dir: the collection, and where its work lies.
      data: which tasks, as in training.
      docids: kind of docids that the examples are answered with.
      answer: docids; or passages (for a dual encoder) or query (for a query generator).
      beam_options: flags for Beam, such as ('--runner=DataflowRunner', '--project=…'); the default runs here.
    """
    work = Work.of(source, work_dir)
    parallel.check(beam_options, work.folder)
    collection = Collection(work.collection)
    table = DocidTable.open(work.docids(docids)) if answer == "docids" else None
    opened = data.of(work, collection, answer, table)
    tasks = {task for _, shares in opened.stages() for task in shares}
    made = {}
    for task in sorted(tasks):
        name = f"{opened.prefix}.{task}"
        say(f"cache {name}")
        make = functools.partial(_make, opened, task, beam_options)
        made[name] = storage.build(work.cache(name), opened.recipe(task), make)["examples"]
    return {"cache": str(work.cache("")), "examples": made}


def _make(opened, task: str, beam_options: Sequence[str], folder: Path) -> dict:
    """Runs seqio's Beam job for one task, in its parts, and finds where it put each example."""
    import apache_beam as beam
    import seqio
    from apache_beam.options.pipeline_options import PipelineOptions
    from seqio import beam_utils

    name = f"{opened.prefix}.{task}"
    setup = functools.partial(_register, opened, task)  # on every worker
    setup()
    job = beam_utils.PreprocessTask(seqio.TaskRegistry.get(name), "train", setup_fn=setup)
    shards = len(job.shards)
    with beam.Pipeline(options=PipelineOptions(list(beam_options))) as pipeline:
        examples = pipeline | job
        prefix = seqio.get_cached_tfrecord_prefix(str(folder), "train")
        _ = examples | beam_utils.WriteExampleTfRecord(prefix, shards)
        info = seqio.get_cached_info_path(str(folder), "train")
        _ = examples | "info" >> beam_utils.GetInfo(shards) | "write info" >> beam_utils.WriteJson(info)
        stats = seqio.get_cached_stats_path(str(folder), "train")
        features = seqio.TaskRegistry.get(name).output_features
        _ = examples | beam_utils.GetStats(features) | "write stats" >> beam_utils.WriteJson(stats)

    count = len(opened.computed(task))
    places_Nx2 = np.full((count, 2), -1, np.int64)
    for number, file in enumerate(sorted(folder.glob("train.tfrecord-*"))):
        for start, record in _records(file):
            places_Nx2[_features(record)["example"][0]] = number, start
    assert (places_Nx2 >= 0).all(), f"{folder}: the Beam job lost examples"
    np.save(folder / PLACES, places_Nx2)
    (folder / "COMPLETED").touch()  # seqio's mark
    return {"examples": count, "shards": shards}


def _register(opened, task: str) -> None:
    from retrieval_jax.examples import seqio_tasks

    seqio_tasks.register(opened.prefix, {task: opened.computed(task)}, {}, opened.vocabulary)
