"""Sets of a model's best tokens: their impacts."""

from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.docids.encoded_sets import write_encoded_sets
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.embeddings.encoding import Embeddings


class Opened:
    """What is read of a loaded model: the size of its vocabulary, and which one it is."""

    class model:
        class config:
            vocab_size = 1 << 17

    class vocabulary:
        checksum = "pieces"


@pytest.mark.parametrize("impacts", [True, False])
def test_impacts_are_weights_but_for_rounding(tmp_path: Path, impacts: bool):
    tokens = np.array([[70_000, 3], [5, 0]], np.float32)
    weights = np.array([[0.5, 2.55], [1.0, 0.0]], np.float32)
    numbers, ids = np.concatenate([tokens, weights], axis=1), arrow_ids.array(["a", "b"])
    encoded = Embeddings(tmp_path, numbers, ids, np.zeros(2), {"recipe": {"collection": "c"}})

    def make(folder: Path) -> dict:
        return write_encoded_sets(folder, encoded, Opened, impacts)

    storage.build_once(tmp_path / "sets", {}, make)
    sets = TokenSets.open(tmp_path / "sets")
    assert sets.tokens_PxM.dtype == np.uint32
    np.testing.assert_array_equal(sets.tokens_PxM, tokens)
    assert (sets.collection, sets.vocabulary) == ("c", "pieces")
    if impacts:
        assert sets.impact_scale == pytest.approx(0.01)
        np.testing.assert_allclose(sets.impacts_PxM * sets.impact_scale, weights, atol=0.005)
