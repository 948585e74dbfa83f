"""seqio's view of a collection's queries."""

import itertools

import numpy as np
import pytest
import seqio
from tables import KINDS

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples import seqio_tasks
from retrieval_jax.examples.features import pad
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.main import main


@pytest.fixture
def naive(work, collection, arguments):
    assert main(["docids", *arguments, "--json"]) == 0
    return TrainDataset(DataConfig(), work, collection, DocidTargets, DocidTable.open(work.docids("naive")))


def test_queries_are_a_task_of_all_splits(naive, collection):
    """Each once and in order, with its id, its text, and the docid of a passage that answers it."""
    import seqio

    from retrieval_jax.examples.seqio_tasks import register_queries

    splits = {split: naive.queries(split) for split in ("dev", "test")}
    name = register_queries(naive.prefix, splits, naive.vocabulary)
    assert name == "small_docs.naive.queries"
    lengths = {name: feature.length for name, feature in naive.targets.features.items()}
    task = seqio.TaskRegistry.get(name)
    docids, ids = naive.table.tokens_NxL, naive.table.passage_ids.to_pylist()
    for split in splits:
        queries = collection.queries(split)
        found = [*task.get_dataset(lengths, split, shuffle=False).as_numpy_iterator()]
        assert [one["query"].decode() for one in found] == [query.id for query in queries]
        assert [one["query_pretokenized"].decode() for one in found] == [query.text for query in queries]
        for one, query in zip(found, queries, strict=True):
            expected = naive.vocabulary.batch([query.text], lengths["inputs"])[0]
            assert one["inputs"].tolist() == expected[expected > 0].tolist()
            row = docids[ids.index(next(iter(query.positives)))]
            assert one["targets"].tolist() == row[row > 0].tolist()

    parts = [
        task.get_dataset(lengths, "test", shuffle=False, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)
    ]
    shared = [[one["query"].decode() for one in part.as_numpy_iterator()] for part in parts]
    assert shared == [[q.id for q in collection.queries("test")[i::3]] for i in range(3)]
    assert np.concatenate(shared).size == 10


DATA = DataConfig({"firstp": 1, "daq": 1, "labelled": 2}, chunk_length=12, chunks=2, input_length=10)


@pytest.fixture(scope="module", params=[DocidTargets, PassageTargets, QueryTargets])
def opened(request, work: Workspace, collection: Collection) -> TrainDataset:
    table = KINDS["naive"](collection) if request.param is DocidTargets else None
    data = DATA
    if request.param is QueryTargets:
        data = DataConfig({"doc2query": 1}, passage_length=16, input_length=8)
    return TrainDataset(data, work, collection, request.param, table)


def register(opened: TrainDataset) -> list[str]:
    shares = opened.mix(opened.config.mixture)
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
