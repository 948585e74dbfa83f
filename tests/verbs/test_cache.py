"""seqio's view of the examples, and the cache that its Beam job writes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import seqio
from tables import KINDS

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.examples import seqio_tasks
from retrieval_jax.examples.batches import batches
from retrieval_jax.examples.cached import CachedExamples
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets, pad
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.main import main

DATA = DataConfig({"firstp": 1, "daq": 1, "labelled": 2}, chunk_length=12, chunks=2, input_length=10)


@pytest.fixture(scope="module", params=[DocidTargets, PassageTargets, QueryTargets])
def opened(request, work: Workspace, collection: Collection) -> TrainDataset:
    table = KINDS["naive"](collection) if request.param is DocidTargets else None
    data = DATA
    if request.param is QueryTargets:
        data = DataConfig({"doc2query": 1}, passage_length=16, input_length=8)
    return TrainDataset(data, work, collection, request.param, table)


def register(opened: TrainDataset) -> list[str]:
    shares = opened.shares(opened.config.rates)
    rows = {"all": {task: share for task, (_, share) in shares.items()}}
    seqio_tasks.register(opened.prefix, {t: opened.computed(t) for t in shares}, rows, opened.vocabulary)
    return list(shares)


def test_seqio_trims_and_ends_examples_as_the_trainer_does(opened: TrainDataset):
    for task in register(opened):
        examples, spec = opened.computed(task), opened.targets.features
        expected = pad([examples(i, np.random.default_rng(i)) for i in range(len(examples))], spec)
        lengths = {name: feature.length for name, feature in spec.items()}
        dataset = seqio.TaskRegistry.get(f"{opened.prefix}.{task}").get_dataset(lengths, shuffle=False)
        found = list(dataset.as_numpy_iterator())
        assert len(found) == len(examples)
        for name, array in expected.items():
            for row, example in zip(array, found, strict=True):
                np.testing.assert_array_equal(row[: len(example[name])], example[name])
                assert not row[len(example[name]) :].any()


def test_seqios_own_tokeniser_gives_the_same_tokens(collection: Collection, work: Workspace):
    opened = TrainDataset(DATA, work, collection, PassageTargets)
    feature = seqio.Feature(seqio.SentencePieceVocabulary(str(collection.vocabulary_path)))
    queries = [q.text for q in collection.queries("train")]
    examples = opened.computed("labelled")
    for i, text in enumerate(queries):
        assert list(examples(i, np.random.default_rng(0))["inputs"]) == feature.vocabulary.encode(text)


def test_shards_are_parts_of_the_whole(opened: TrainDataset):
    (task, *_) = register(opened)
    source = seqio.TaskRegistry.get(f"{opened.prefix}.{task}").source
    parts = [
        [
            e["example"]
            for e in source.get_dataset(shuffle=False, shard_info=seqio.ShardInfo(i, 3)).as_numpy_iterator()
        ]
        for i in range(3)
    ]
    assert [*itertools.chain(*parts)] == list(range(len(opened.computed(task))))
    shuffled = [e["example"] for e in source.get_dataset(shuffle=True, seed=1).as_numpy_iterator()]
    assert sorted(shuffled) == list(range(len(shuffled))) != shuffled


def test_a_cache_holds_the_same_examples_under_the_same_numbers(
    arguments: list[str], work: Workspace, collection: Collection, capsys
):
    assert main(["docids", *arguments]) == 0
    settings = [
        "--gin.DataConfig.rates={'firstp': 1, 'daq': 1, 'labelled': 2}",
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
    for task in DATA.rates:
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
        DataConfig(DATA.rates, chunk_length=13, chunks=2), work, collection, DocidTargets, opened.table
    )
    capsys.readouterr()
    for _ in range(2):
        assert not isinstance(other.examples("firstp"), CachedExamples)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("of other settings than this run's, so it is not read") == 1
    register(opened)
    seqio.add_global_cache_dirs([str(work.cache(""))])
    mixture = seqio.get_mixture_or_task(f"{opened.prefix}.all")
    lengths = {name: feature.length for name, feature in opened.targets.features.items()}
    dataset = mixture.get_dataset(lengths, use_cached=True, shuffle=False)
    assert len(list(dataset.take(50))) == 50
    task = seqio.TaskRegistry.get(f"{opened.prefix}.daq")
    assert task.get_cached_stats("train")["examples"] == 2 * collection.passage_count


def test_a_cache_of_other_records_is_not_read(tmp_path: Path):
    assert CachedExamples.find(tmp_path / "none", {}) is None
