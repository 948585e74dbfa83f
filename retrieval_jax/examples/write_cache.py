"""Writes the cache of tokenised examples, by seqio's Beam job. See cached.py, which reads it."""

import functools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.examples.cached import OFFSETS, features_of
from retrieval_jax.examples.training_data import TrainDataset


def write_cache(dataset: TrainDataset, task: str, beam_options: Sequence[str], folder: Path) -> dict:
    """Runs seqio's Beam job for one task, and writes where in its files each example lies.

    Args:
      dataset: the examples.
      task: the name of the task.
      beam_options: the flags of Beam; () runs here.
      folder: where to write; see examples/cached.py for the files.

    Returns:
      {"examples": their number, "shards": the number of files}.

    Raises:
      UserError: the Beam job lost examples.
    """
    import apache_beam as beam
    import seqio
    from apache_beam.options.pipeline_options import PipelineOptions
    from seqio import beam_utils

    name = f"{dataset.prefix}.{task}"
    setup = functools.partial(_register, dataset, task)  # on every worker
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

    count = len(dataset.computed(task))
    offsets_Nx2 = np.full((count, 2), -1, np.int64)
    for number, file in enumerate(sorted(folder.glob("train.tfrecord-*"))):
        for start, record in _records(file):
            offsets_Nx2[features_of(record)["example"][0]] = number, start
    if lost := int((offsets_Nx2[:, 0] < 0).sum()):
        raise UserError(f"{folder}: the Beam job lost {lost} of {count} examples: run it again")
    np.save(folder / OFFSETS, offsets_Nx2)
    (folder / "COMPLETED").touch()  # seqio's mark
    return {"examples": count, "shards": shards}


def _register(dataset: TrainDataset, task: str) -> None:
    from retrieval_jax.examples import seqio_tasks  # imports TensorFlow

    seqio_tasks.register(dataset.prefix, {task: dataset.computed(task)}, {}, dataset.vocabulary)


def _records(file: Path) -> Iterator[tuple[int, bytes]]:
    """(first byte, record) of each record of a TFRecord file."""
    with file.open("rb") as stream:
        while head := stream.read(12):
            yield stream.tell() - 12, stream.read(struct.unpack("<Q", head[:8])[0])
            stream.seek(4, os.SEEK_CUR)
