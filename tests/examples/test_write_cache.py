"""A cache holds the examples that the trainer would make, under the same numbers."""

import itertools

import numpy as np
import seqio

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.examples import seqio_tasks
from retrieval_jax.examples.batches import batches
from retrieval_jax.examples.cached import CachedExamples
from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
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
    seqio.add_global_cache_dirs([str(work.cache(""))])
    mixture = seqio.get_mixture_or_task(f"{opened.prefix}.all")
    lengths = {name: feature.length for name, feature in opened.targets.features.items()}
    dataset = mixture.get_dataset(lengths, use_cached=True, shuffle=False)
    assert len(list(dataset.take(50))) == 50
    task = seqio.TaskRegistry.get(f"{opened.prefix}.daq")
    assert task.get_cached_stats("train")["examples"] == 2 * collection.passage_count
