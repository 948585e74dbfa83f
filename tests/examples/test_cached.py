"""Examples are read from a cache by their number."""

from pathlib import Path

import numpy as np
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from retrieval_jax.examples.cached import OFFSETS, CachedExamples, features_of, shard_of, shard_range


def test_a_cache_of_other_records_is_not_read(tmp_path: Path):
    assert CachedExamples.find(tmp_path / "none", {}) is None


def test_examples_are_found_by_their_number(tmp_path: Path):
    """The files are TensorFlow's own; a record lies 12 bytes after its offset, and ends with a checksum."""
    offsets = np.zeros(7, np.int64)
    for file in range(3):
        name, place = f"train.tfrecord-{file:05}-of-00003", 0
        with tf.io.TFRecordWriter(str(tmp_path / name)) as writer:
            for i in reversed(shard_range(file, 3, 7)):
                numbers = tf.train.Int64List(value=range(i))
                feature = {"inputs": tf.train.Feature(int64_list=numbers)}
                record = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
                writer.write(record)
                assert list(features_of(record)["inputs"]) == [*range(i)]
                offsets[i] = place
                place += 12 + len(record) + 4
    np.save(tmp_path / OFFSETS, offsets)
    examples = CachedExamples(tmp_path)
    assert len(examples) == 7
    for i in (5, 0, 3, 3, 1, 6, 2, 4):
        assert list(examples(i, np.random.default_rng(0))["inputs"]) == [*range(i)]


@given(st.integers(1, 400_000_000), st.integers(1, 600), st.data())
def test_every_example_is_in_one_file(count: int, shards: int, data):
    shards = min(shards, count)
    ranges = [shard_range(number, shards, count) for number in range(shards)]
    assert [some.start for some in ranges] == [0, *[some.stop for some in ranges[:-1]]]
    assert ranges[-1].stop == count
    i = data.draw(st.integers(0, count - 1))
    assert i in ranges[shard_of(i, shards, count)]
