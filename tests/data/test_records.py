"""TFDS records: any features come back from any split, and a file is whole or not there."""

from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.data.records import Records, write_dataset


def test_any_features_can_be_written(tmp_path: Path):
    import tensorflow_datasets as tfds

    features = {"row": np.int64, "texts": tfds.features.Sequence(tfds.features.Text())}
    records = [{"row": i, "texts": ["x"] * i} for i in range(3)]
    counts = write_dataset(tmp_path, "any", "thing", features, {"train": [lambda: records], "dev": [list]})
    assert counts == {"train": 3, "dev": 0}
    found = Records(tmp_path, "any", "thing", "train").get(range(3))
    assert [(r["row"].int64_list.value[0], list(r["texts"].bytes_list.value)) for r in found] == [
        (0, []),
        (1, [b"x"]),
        (2, [b"x", b"x"]),
    ]
    assert Records(tmp_path, "any", "thing", "dev").get([]) == []


def test_a_failing_shard_is_not_there(tmp_path: Path):
    import tensorflow_datasets as tfds

    def records():
        yield {"text": "a"}
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_dataset(tmp_path, "any", "thing", {"text": tfds.features.Text()}, {"train": [records]})
    assert not list(tmp_path.rglob("any-train*"))
