"""ScaNN's settings by the number of vectors, and a shard: its dtypes, and what cannot be opened."""

import resource
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.search.scann_index import ScannShard, settings

N, E = 2000, 32


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(N, E)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_structure_depends_on_the_number_of_vectors():
    assert settings(19_999) == {}
    assert settings(20_000) == {"reorder": 800}
    assert settings(100_000) == {"reorder": 800, "leaves": 316}
    assert settings(1 << 20) == {"reorder": 800, "leaves": 1024}
    assert settings(8_841_823) == {
        "reorder": 89,
        "shards": 9,
        "shard_size": 1 << 20,
        "leaves": 991,
    }
    assert settings(1001, exact_below=0, tree_from=0, reorder=10, shard_size=500) == {
        "reorder": 4,
        "shards": 3,
        "shard_size": 500,
        "leaves": 18,
    }
    assert settings(1001, shard_size=500) == {"shards": 3, "shard_size": 500}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 4e-3), ("int8", 1e-2)])
@pytest.mark.parametrize("structure", [{}, {"reorder": 200}, {"reorder": 200, "leaves": 20}])
def test_a_shard_keeps_vectors_in_each_dtype(dtype, error, structure, vectors, tmp_path: Path):
    """Rows are those of the collection; scores are within the rounding of the dtype, also after an update."""
    rows = np.arange(100, N)
    shard = ScannShard.build(vectors, rows, dtype, **structure)
    facts = shard.write(tmp_path)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "scann").iterdir()}
    item = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    assert max(sizes.values()) == pytest.approx(len(rows) * E * item, abs=256)  # and no float32 beside it
    now = np.where(rows < 150, -1, rows)
    updated = ScannShard.open(tmp_path, facts).update(vectors, now, np.arange(60))
    assert (updated.changes, updated.training_size) == (110, N - 100)
    queries = vectors[:40] + 0.02
    for one, there in ((ScannShard.open(tmp_path, facts), rows), (updated, [*range(60), *range(150, N)])):
        leaves = structure.get("leaves")
        found, scores = one.search(queries, 50, 400 if structure else None, leaves)
        assert set(found.ravel()) <= set(there)
        products = np.take_along_axis(queries @ vectors.T, found, axis=1)
        # The scales of int8 are those of the dimensions when it was built: new vectors may exceed them.
        assert np.quantile(np.abs(scores - products), 0.99) < error
        exact = np.array(there)[np.argsort(-(queries @ vectors[there].T), axis=1)[:, :10]]
        assert np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)]) > 0.97


def test_many_changes_build_a_shard_again(vectors):
    rows = np.arange(0, N, 2)  # not a range of the file
    shard = ScannShard.build(vectors, rows, "float32")
    updated = shard.update(vectors, np.where(rows < 150, -1, rows), np.arange(1, 101, 2))
    assert (updated.changes, updated.training_size) == (0, N // 2 - 75 + 50)
    found, scores = updated.search(vectors[:1], len(updated.rows_M), None, None)
    assert sorted(found[0]) == [*range(1, 101, 2), *range(150, N, 2)]
    np.testing.assert_allclose(scores[0], vectors[found[0]] @ vectors[0], atol=1e-6)


def test_a_full_disk_is_told(vectors, tmp_path: Path):
    shard = ScannShard.build(vectors, np.arange(N), "float32")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (N * E, hard))  # the same error of the system, but its name
    try:
        with pytest.raises(UserError, match=r"cannot be written \(.*\): make room, the same command goes on"):
            shard.write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_of_another_dtype_or_none_are_told(vectors, tmp_path: Path):
    facts = ScannShard.build(vectors, np.arange(N), "int8").write(tmp_path)
    with pytest.raises(UserError, match=r"holds no vectors as bfloat16: delete .*`retrieval-jax index`"):
        ScannShard.open(tmp_path, facts | {"dtype": "bfloat16"})
    (tmp_path / "rows.npy").unlink()
    with pytest.raises(UserError, match=r"rows.npy.*: delete the searcher's folder"):
        ScannShard.open(tmp_path, facts)
