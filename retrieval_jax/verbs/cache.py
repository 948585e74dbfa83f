"""The verb `cache`: tokenised examples on disk, written by seqio's Beam job; see examples/cached.py."""

import functools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin
import numpy as np

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import parallel
from retrieval_jax.data.records import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.cached import PLACES, features_of
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training.families import family_of


def _records(file: Path) -> Iterator[tuple[int, bytes]]:
    """(first byte, record) of each record of a TFRecord file."""
    with file.open("rb") as stream:
        while head := stream.read(12):
            yield stream.tell() - 12, stream.read(struct.unpack("<Q", head[:8])[0])
            stream.seek(4, os.SEEK_CUR)


@gin.configurable
def cache(
    source: str,
    data: DataConfig,
    work_dir: str | None = None,
    docids: str | None = "naive",
    retriever: type[Retriever] = GenerativeRetriever,
    beam_options: Sequence[str] = (),
) -> dict:
    """Writes the tokenised examples of the tasks that a training run mixes, by seqio's Beam job.

    Training with the same settings then reads them. A task that is there already is not made again.

    Args:
      source, work_dir: the collection, and where its work lies.
      data: which tasks, as in training.
      docids: kind of docids that a generative retriever writes.
      retriever: the class of the models that train on the examples: GenerativeRetriever, DualEncoder or
        QueryGenerator.
      beam_options: flags for Beam, such as ('--runner=DataflowRunner', '--project=…'); the default runs here.
    """
    if retriever.writes_docids and not docids:
        raise UserError("cache: docids of no kind: --DOCIDS=naive, or --gin.cache.retriever=@DualEncoder")
    work = Workspace.for_source(source, work_dir)
    parallel.check_beam_options(beam_options, work.folder)
    collection = Collection(work.collection)
    table = DocidTable.open(work.docids(docids)) if retriever.writes_docids else None
    opened = TrainDataset(data, work, collection, family_of(retriever).target_type, table)
    tasks = {task for _, shares in opened.stages() for task in shares}
    made = {}
    for task in sorted(tasks):
        name = f"{opened.prefix}.{task}"
        log(f"cache {name}")
        make = functools.partial(_make, opened, task, beam_options)
        made[name] = storage.build_once(work.cache(name), opened.recipe(task), make)["examples"]
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
            places_Nx2[features_of(record)["example"][0]] = number, start
    assert (places_Nx2 >= 0).all(), f"{folder}: the Beam job lost examples"
    np.save(folder / PLACES, places_Nx2)
    (folder / "COMPLETED").touch()  # seqio's mark
    return {"examples": count, "shards": shards}


def _register(opened, task: str) -> None:
    from retrieval_jax.examples import seqio_tasks

    seqio_tasks.register(opened.prefix, {task: opened.computed(task)}, {}, opened.vocabulary)
