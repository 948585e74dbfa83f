"""A cache holds the trainer's examples under the same numbers, and is what seqio's own job writes."""

import itertools
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
from tables import KINDS
from teacher import random_scores, write_scores

from retrieval_jax.core import paths, storage, unfinished
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import synthetic
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.synthetic import QueryShards
from retrieval_jax.examples import seqio_tasks, write_cache
from retrieval_jax.examples.batches import batches
from retrieval_jax.examples.cached import OFFSETS, CachedExamples
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.examples.write_cache import DatasetFolders
from retrieval_jax.main import main

DATA = DataConfig({"firstp": 1, "daq": 1, "labelled": 2}, chunk_length=12, chunks=2, input_length=10)


def register(opened: TrainDataset) -> list[str]:
    shares = opened.mix(opened.config.mixture)
    rows = {"all": {task: share for task, (_, share) in shares.items()}}
    seqio_tasks.register(opened.prefix, {t: opened.computed(t) for t in shares}, rows, opened.vocabulary)
    return list(shares)


def test_a_cache_holds_the_same_examples_under_the_same_numbers(
    arguments: list[str], work: Workspace, collection: Collection, capsys
):
    assert main(["docids", *arguments]) == 0
    settings = [
        "--gin.DataConfig.mixture={'firstp': 1, 'daq': 1, 'labelled': 2}",
        "--gin.DataConfig.chunk_length=12",
        "--gin.DataConfig.chunks=2",
        "--gin.DataConfig.input_length=10",
    ]
    from retrieval_jax.docids.table import DocidTable

    opened = TrainDataset(DATA, work, collection, DocidTargets, DocidTable.open(work.docids("naive")))

    def take() -> list[dict]:
        return list(itertools.islice(batches(opened.stages(), opened.targets, {}, 8, seed=0), 5))

    before = take()
    assert main(["cache", *arguments, *settings]) == 0
    for task in DATA.mixture:
        cached, computed = opened.examples(task), opened.computed(task)
        assert isinstance(cached, CachedExamples)
        assert len(cached) == len(computed)
        for i in range(len(cached)):
            found, expected = (e(i, np.random.default_rng(0)) for e in (cached, computed))
            assert {n: list(found[n]) for n in expected} == {n: list(v) for n, v in expected.items()}
    for a, b in zip(before, take(), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])

    # Other settings do not take it for theirs, and seqio reads it.
    other = TrainDataset(
        DataConfig(DATA.mixture, chunk_length=13, chunks=2), work, collection, DocidTargets, opened.table
    )
    capsys.readouterr()
    for _ in range(2):
        assert not isinstance(other.examples("firstp"), CachedExamples)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("made with other settings than this run's, so it is not read") == 1
    register(opened)
    seqio.set_global_cache_dirs([str(work.cache(""))])
    mixture = seqio.get_mixture_or_task(f"{opened.prefix}.all")
    lengths = {name: feature.length for name, feature in opened.targets.features.items()}
    dataset = mixture.get_dataset(lengths, use_cached=True, shuffle=False)
    assert len(list(dataset.take(50))) == 50
    task = seqio.TaskRegistry.get(f"{opened.prefix}.daq")
    assert task.get_cached_stats("train")["examples"] == 2 * collection.passage_count


@pytest.fixture
def own(own_work: Workspace, collection: Collection, tmp_path: Path) -> Workspace:
    """A work folder with naive docids, synthetic queries, 0 to 3 a passage, and a teacher's scores."""
    own = own_work
    storage.build_once(own.docids("naive"), {}, KINDS["naive"](collection).write)
    write_scores(own, "teacher", random_scores(collection))
    shards = QueryShards(tmp_path / "shards", collection.passage_count, 1000)
    lines = [
        [f"question {k} of {passage.title}" for k in range(row % 4)]
        for row, passage in enumerate(collection.passages())
    ]
    shards.write(0, ({"queries": some, "made": len(some), "distinct": len(some)} for some in lines))
    recipe = {"collection": collection.fingerprint}
    storage.build_once(own.synthetic("d"), recipe, lambda tmp: synthetic.join(tmp, collection, shards))
    return own


def folders(work: Workspace, targets: type = DocidTargets, scores: str | None = None) -> DatasetFolders:
    lengths = {"chunk_length": 12, "chunks": 3, "positives": 2, "negatives": 2, "passage_length": 16}
    config = DataConfig(**lengths, synthetic="d", scores=scores)
    docids = "naive" if targets in (DocidTargets, DocidGroupTargets) else None
    return DatasetFolders(config, work, targets, docids)


def made_by_seqio(opened: TrainDataset, task: str, folder: Path) -> Path:
    """The cache that seqio's own Beam job writes."""
    import apache_beam as beam
    from seqio import beam_utils

    name = f"{opened.prefix}.{task}"
    seqio_tasks.register(opened.prefix, {task: opened.computed(task)}, {}, opened.vocabulary)
    job = beam_utils.PreprocessTask(seqio.TaskRegistry.get(name), "train")
    shards = len(job.shards)
    with beam.Pipeline() as pipeline:
        examples = pipeline | job
        prefix = seqio.get_cached_tfrecord_prefix(str(folder), "train")
        _ = examples | beam_utils.WriteExampleTfRecord(prefix, shards)
        info = seqio.get_cached_info_path(str(folder), "train")
        _ = examples | "info" >> beam_utils.GetInfo(shards) | "write info" >> beam_utils.WriteJson(info)
        stats = seqio.get_cached_stats_path(str(folder), "train")
        features = seqio.TaskRegistry.get(name).output_features
        _ = examples | beam_utils.GetStats(features) | "write stats" >> beam_utils.WriteJson(stats)
    return folder


def records_of(folder: Path) -> dict[int, dict[str, list[int]]]:
    """Number of an example -> its features, read by TensorFlow, which compares the checksums."""
    found = {}
    for record in tf.data.TFRecordDataset([str(path) for path in sorted(folder.glob("train.tfrecord-*"))]):
        features = tf.train.Example.FromString(record.numpy()).features.feature
        values = {
            name: list(feature.int64_list.value) + list(map(str, feature.float_list.value))  # also NaN
            for name, feature in features.items()
        }
        assert found.setdefault(values["example"][0], values) is values  # none twice
    return found


def features_of(opened: TrainDataset, task: str, cached: bool) -> list[dict]:
    """What seqio gives a training, by number."""
    lengths = {name: feature.length for name, feature in opened.targets.features.items()}
    task = seqio.TaskRegistry.get(f"{opened.prefix}.{task}")
    found = task.get_dataset(lengths, use_cached=cached, shuffle=False).as_numpy_iterator()
    plain = [
        {name: str(value.tolist()) if name == "score" else value.tolist() for name, value in example.items()}
        for example in found
    ]
    return sorted(plain, key=lambda example: example["example"])


@pytest.mark.parametrize(
    ("targets", "task", "scores"),
    [
        (DocidTargets, "d2q", None),
        (PassageTargets, "labelled", None),
        (PassageTargets, "labelled", "teacher"),
        (DocidGroupTargets, "labelled", "teacher"),
        (QueryTargets, "doc2query", None),
    ],
)
def test_a_cache_is_what_seqios_own_job_writes(
    own: Workspace, monkeypatch, tmp_path: Path, targets, task, scores
):
    monkeypatch.setattr(write_cache, "FEWEST", 30)
    dataset = folders(own, targets, scores)
    opened = dataset.open()
    count = len(opened.computed(task))
    made = write_cache.write_cache(dataset, opened, task)
    ours = own.cache(f"{opened.prefix}.{task}")
    assert (made["examples"], made["shards"]) == (count, count // 30)
    assert made["bytes"] == sum(path.stat().st_size for path in ours.glob("train.tfrecord-*"))
    theirs = made_by_seqio(opened, task, tmp_path / "seqio")
    ours_by_number, theirs_by_number = records_of(ours), records_of(theirs)
    assert ours_by_number == theirs_by_number
    assert sorted(ours_by_number) == list(range(count))
    assert [*ours_by_number] != sorted(ours_by_number)  # in no order
    for name in ("info", "stats"):
        found, expected = (
            json.loads((folder / f"{name}.train.json").read_text()) for folder in (ours, theirs)
        )
        found.pop("num_shards", None), expected.pop("num_shards", None)
        assert found == expected
    seqio.set_global_cache_dirs([str(own.cache(""))])
    assert features_of(opened, task, cached=True) == features_of(opened, task, cached=False)


SCRIPT = """
import pickle, sys
from retrieval_jax.examples import write_cache

write_cache.FEWEST = 4
dataset = pickle.loads(bytes.fromhex(sys.argv[1]))
write_cache.write_cache(dataset, dataset.open(), "daq")
"""


def test_a_kill_loses_the_files_in_progress_alone(own: Workspace, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(write_cache, "FEWEST", 4)
    dataset = folders(own)
    opened = dataset.open()
    folder = own.cache(f"{opened.prefix}.daq")
    # Killed, as the system does it: by SIGKILL.
    command = [sys.executable, "-c", SCRIPT, pickle.dumps(dataset).hex()]
    process = subprocess.Popen(command)
    scratch = folder.with_name(f"{folder.name}.unfinished")
    while process.poll() is None and len(list(scratch.glob("*.json"))) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(1)  # its workers notice
    assert not folder.exists()
    (scratch / ".train.tfrecord-00063-of-00064.1").write_bytes(b"half")
    finished = [path.stem for path in scratch.glob("*.json") if path.stem != "recipe"]
    assert 3 <= len(finished) < 64
    nodes = {(scratch / f"train.tfrecord-{number}-of-00064").stat().st_ino for number in finished}
    write_cache.write_cache(dataset, opened, "daq")
    assert f"going on, {len(finished)} of 64 files are finished" in " ".join(capsys.readouterr().err.split())
    assert nodes <= {path.stat().st_ino for path in folder.iterdir()}
    assert not scratch.exists()
    unfinished.begin(scratch, opened.recipe("daq") | {"shards": 64}, [])  # a kill came before it was removed
    write_cache.write_cache(dataset, opened, "daq")
    assert not scratch.exists()
    offsets = np.load(folder / OFFSETS)
    for number in range(64):  # made here, in one go
        shard = write_cache.Shard(dataset, "daq", "", tmp_path, number, 64, 300)
        write_cache.write_shard(shard)
        assert (folder / shard.path.name).read_bytes() == shard.path.read_bytes()
        np.testing.assert_array_equal(
            offsets[shard.numbers.start : shard.numbers.stop], np.load(shard.offsets_path)
        )


def test_a_cache_in_a_bucket_is_the_same(own: Workspace, bucket):
    remote = paths.as_path("gs://bucket/cached")
    names = [str(path.relative_to(own.folder)) for path in paths.files(own.folder)]
    collection = own.collection.resolve()
    names += [f"collection/{path.relative_to(collection)}" for path in paths.files(collection)]
    paths.copy_files(own.folder, remote, names, "test")
    for work in (own, Workspace(remote)):
        dataset = folders(work)
        write_cache.write_cache(dataset, dataset.open(), "firstp")
    ours, theirs = (work.cache("small_docs.naive.firstp") for work in (own, Workspace(remote)))
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
        path.name: path.read_bytes() for path in theirs.iterdir()
    }
    assert isinstance(dataset.open().examples("firstp"), CachedExamples)


def test_the_number_of_files_depends_on_the_size_of_the_examples(own: Workspace, monkeypatch):
    examples = folders(own).open().computed("daq")
    size = sum(
        len(write_cache.record(write_cache.serialise(examples(i, None), i))) for i in range(len(examples))
    )
    assert write_cache.shard_count(examples) == 1
    monkeypatch.setattr(write_cache, "SHARD_BYTES", size // 7)
    assert write_cache.shard_count(examples) == 7
    monkeypatch.setattr(write_cache, "MAX_SHARDS", 5)
    assert write_cache.shard_count(examples) == 5
