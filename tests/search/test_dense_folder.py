"""What of a dense searcher's folder is not read; whole searchers are in test_indexing.py."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from retrieval_jax.checkpoints import checksums
from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.search.dense_folder import FIRST_DIMENSIONS, check_files, indexed_passages

RECIPE = {"kind": "exact", "checksum": "1", "vector_dtype": "int8", FIRST_DIMENSIONS: 4}


def write(folder: Path) -> dict:
    arrow_ids.write(folder / "ids.arrow", arrow_ids.array("ab"))
    np.save(folder / "text_hashes.npy", np.array([5, 6]))
    checksums.write(folder)
    return {"vector_dtype": "int8"}


def test_an_earlier_searcher_counts_if_it_is_whole_and_of_this_kind_model_and_vectors(tmp_path: Path):
    folder = tmp_path / "exact"

    def earlier(kind: str = "exact", checksum: str = "1", vector_dtype: str = "int8", dimensions: int = 4):
        embeddings = SimpleNamespace(manifest={"recipe": {"checksum": checksum}})
        settings = SimpleNamespace(vector_dtype=vector_dtype, dimensions=dimensions)
        inputs = SimpleNamespace(folder=folder, embeddings=embeddings, settings=settings)
        return indexed_passages(inputs, kind)

    assert earlier() is None
    storage.build_once(folder, RECIPE, write)
    ids, hashes_N = earlier()
    assert (ids.to_pylist(), hashes_N.tolist()) == (["a", "b"], [5, 6])
    others = ({"kind": "scann"}, {"checksum": "2"}, {"vector_dtype": "float32"}, {"dimensions": None})
    assert not any(earlier(**other) for other in others)
    np.save(folder / "text_hashes.npy", np.array([5, 7]))
    assert earlier() is None


def test_a_folder_that_is_damaged_or_of_an_earlier_version_is_named(tmp_path: Path):
    manifest = write(tmp_path)
    check_files(tmp_path, manifest)
    with pytest.raises(UserError, match=r"made by an earlier version .*: delete it, then"):
        check_files(tmp_path, {})
    (tmp_path / "ids.arrow").write_bytes(b"")
    check_files(tmp_path, manifest, ["text_hashes.npy"])
    with pytest.raises(UserError, match=r"damaged \(ids.arrow has 0 bytes, not"):
        check_files(tmp_path, manifest)
    (tmp_path / checksums.NAME).unlink()
    with pytest.raises(UserError, match=r"checksums.json is missing"):
        check_files(tmp_path, manifest)
