"""seqio's view of a collection's queries."""

import numpy as np
import pytest

from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.main import main


@pytest.fixture
def opened(work, collection, arguments):
    assert main(["docids", *arguments, "--json"]) == 0
    return TrainDataset(DataConfig(), work, collection, DocidTargets, DocidTable.open(work.docids("naive")))


def test_queries_are_a_task_of_all_splits(opened, collection):
    """Each once and in order, with its id, its text, and the docid of a passage that answers it."""
    import seqio

    from retrieval_jax.examples.seqio_tasks import register_queries

    splits = {split: opened.queries(split) for split in ("dev", "test")}
    name = register_queries(opened.prefix, splits, opened.vocabulary)
    assert name == "small_docs.naive.queries"
    lengths = {name: feature.length for name, feature in opened.targets.features.items()}
    task = seqio.TaskRegistry.get(name)
    docids, ids = opened.table.tokens_NxL, opened.table.passage_ids.to_pylist()
    for split in splits:
        queries = collection.queries(split)
        found = [*task.get_dataset(lengths, split, shuffle=False).as_numpy_iterator()]
        assert [one["query"].decode() for one in found] == [query.id for query in queries]
        assert [one["query_pretokenized"].decode() for one in found] == [query.text for query in queries]
        for one, query in zip(found, queries, strict=True):
            expected = opened.vocabulary.batch([query.text], lengths["inputs"])[0]
            assert one["inputs"].tolist() == expected[expected > 0].tolist()
            row = docids[ids.index(next(iter(query.positives)))]
            assert one["targets"].tolist() == row[row > 0].tolist()

    parts = [
        task.get_dataset(lengths, "test", shuffle=False, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)
    ]
    shared = [[one["query"].decode() for one in part.as_numpy_iterator()] for part in parts]
    assert shared == [[q.id for q in collection.queries("test")[i::3]] for i in range(3)]
    assert np.concatenate(shared).size == 10
