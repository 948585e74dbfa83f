"""Features of examples become arrays: cut, ended and padded, each in its dtype."""

import numpy as np

from retrieval_jax.data.vocabulary import EOS
from retrieval_jax.examples.features import SCORE, Feature, array_dtype, pad, trim


def test_features_are_cut_ended_and_padded():
    spec = {
        "inputs": Feature(3, add_eos=True),
        "targets": Feature(3, size=10),
        SCORE: Feature(2, dtype="float32"),
    }
    examples = [
        {"inputs": [5, 6, 7, 8], "targets": [5, 6, 7, 8], SCORE: [1.5]},
        {"inputs": [5], "targets": [], SCORE: [0.5, 2.5, 3.5]},
    ]
    arrays = pad(examples, spec)
    np.testing.assert_array_equal(arrays["inputs"], [[5, 6, EOS], [5, EOS, 0]])
    np.testing.assert_array_equal(arrays["targets"], [[5, 6, 7], [0, 0, 0]])
    np.testing.assert_array_equal(arrays[SCORE], [[1.5, np.nan], [0.5, 2.5]])
    assert all(array.dtype == array_dtype(name) for name, array in arrays.items())
    assert trim([5, 6, 7], spec["inputs"]) == [5, 6, EOS]
    assert trim([5, 6], spec["targets"]) == [5, 6]
