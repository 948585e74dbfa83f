"""Sets of tokens on disk."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids.token_sets import TokenSets, token_dtype

SETS = TokenSets(
    np.array([[5, 3, 0], [9, 0, 0]], np.uint16),
    np.array([[255, 7, 0], [100, 0, 0]], np.uint8),
    0.01,
    arrow_ids.array(["a", "b"]),
    "collection",
    "vocabulary",
)


@pytest.mark.parametrize("impacts", [True, False])
def test_what_is_written_is_opened(tmp_path: Path, impacts: bool):
    sets = SETS if impacts else dataclasses.replace(SETS, impacts_PxM=None)
    manifest = storage.build_once(tmp_path / "sets", {}, sets.write)
    assert manifest["m"] == 3
    assert manifest["bytes_per_passage"] == (9 if impacts else 6)
    opened = TokenSets.open(tmp_path / "sets")
    assert isinstance(opened.tokens_PxM, np.memmap)
    np.testing.assert_array_equal(opened.tokens_PxM, sets.tokens_PxM)
    np.testing.assert_array_equal(opened.impacts_PxM, sets.impacts_PxM)
    assert opened.passage_ids.to_pylist() == ["a", "b"]
    assert (opened.impact_scale, opened.collection, opened.vocabulary) == (0.01, "collection", "vocabulary")
    assert opened.fingerprint() == sets.fingerprint() == manifest["fingerprint"]


def test_the_fingerprint_is_of_the_content():
    wide = dataclasses.replace(SETS, tokens_PxM=SETS.tokens_PxM.astype(np.uint32))
    assert wide.fingerprint() == SETS.fingerprint()
    others = [{"impacts_PxM": None}, {"impact_scale": 0.02}, {"passage_ids": arrow_ids.array(["a", "c"])}]
    assert len({dataclasses.replace(SETS, **other).fingerprint() for other in [{}, *others]}) == 4


def test_files_that_were_changed_are_refused(tmp_path: Path):
    storage.build_once(tmp_path / "sets", {}, SETS.write)
    tokens = SETS.tokens_PxM.copy()
    for changed in (tokens[:1], tokens + np.uint16(1)):
        np.save(tmp_path / "sets" / "tokens.npy", changed)
        with pytest.raises(UserError, match="its files were changed after they were made"):
            TokenSets.open(tmp_path / "sets")
    (tmp_path / "sets" / "tokens.npy").write_bytes(b"")
    with pytest.raises(UserError, match="sets that cannot be read"):
        TokenSets.open(tmp_path / "sets")


def test_tokens_take_two_bytes_where_they_can():
    assert token_dtype(32128) == token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32


def test_contributions_are_weights_times_impacts():
    weights_V = np.arange(10, dtype=np.float32)
    found = SETS.contributions(weights_V, np.array([1, 0, 1]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[9, 0, 0], [5 * 2.55, 3 * 0.07, 0], [9, 0, 0]], rtol=1e-6)
    plain = dataclasses.replace(SETS, impacts_PxM=None)
    np.testing.assert_array_equal(plain.contributions(weights_V + 1, np.array([0])), [[6, 4, 0]])
