"""Examples are read from a cache by their number."""

from pathlib import Path

import numpy as np
import tensorflow as tf

from retrieval_jax.examples.cached import OFFSETS, CachedExamples, features_of


def test_a_cache_of_other_records_is_not_read(tmp_path: Path):
    assert CachedExamples.find(tmp_path / "none", {}) is None


def test_examples_are_found_by_file_and_offset(tmp_path: Path):
    """The files are TensorFlow's own; a record lies 12 bytes after its offset, and ends with a checksum."""
    offsets = np.zeros((6, 2), np.int64)
    for file in range(2):
        name, place = f"train.tfrecord-{file:05}-of-00002", 0
        with tf.io.TFRecordWriter(str(tmp_path / name)) as writer:
            for i in range(file, 6, 2):
                numbers = tf.train.Int64List(value=range(i))
                feature = {"inputs": tf.train.Feature(int64_list=numbers)}
                record = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
                writer.write(record)
                assert list(features_of(record)["inputs"]) == [*range(i)]
                offsets[i] = file, place
                place += 12 + len(record) + 4
    np.save(tmp_path / OFFSETS, offsets)
    examples = CachedExamples(tmp_path)
    assert len(examples) == 6
    for i in (5, 0, 3, 3, 1):
        assert list(examples(i, np.random.default_rng(0))["inputs"]) == [*range(i)]
