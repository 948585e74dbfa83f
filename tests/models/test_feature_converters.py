"""The dual encoder's feature converter, on two examples written by hand."""

import numpy as np
import tensorflow as tf

from retrieval_jax.models.feature_converters import DualEncoderFeatureConverter

LENGTHS = {"inputs": 4, "targets": 6, "passage": 2, "grade": 2, "other_positives": 3}


def test_candidates_are_rows_of_tokens_and_the_rest_is_padded():
    examples = [
        {"inputs": [5, 6, 1], "targets": [7, 1, 0, 8, 9, 1], "passage": [40, 41], "grade": [1, 0]},
        {"inputs": [5, 1], "targets": [2, 3, 1, 4, 1, 0], "passage": [42, 43], "grade": [2, 1]},
    ]
    others = [[50, 51, -1], [-1, -1, -1]]
    features = {name: tf.constant([e[name] for e in examples]) for name in ("targets", "passage", "grade")}
    features |= {"inputs": tf.ragged.constant([e["inputs"] for e in examples], tf.int32)}
    features |= {"other_positives": tf.constant(others)}
    dataset = tf.data.Dataset.from_tensor_slices(features).map(
        lambda e: e | {"inputs": tf.cast(e["inputs"], tf.int32)}
    )
    converter = DualEncoderFeatureConverter(pack=False)
    (found,) = converter(dataset, LENGTHS).batch(2).as_numpy_iterator()
    expected = {
        "left_encoder_input_tokens": [[5, 6, 1, 0], [5, 1, 0, 0]],
        "right_encoder_input_tokens": [[[7, 1, 0], [8, 9, 1]], [[2, 3, 1], [4, 1, 0]]],
        "passage": [[40, 41], [42, 43]],
        "grade": [[1, 0], [2, 1]],
        "other_positives": others,
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    lengths = converter.get_model_feature_lengths(LENGTHS)
    assert lengths == {name: np.shape(array)[1] for name, array in expected.items()}

    # With a teacher's scores, and with another converter without them again.
    scores = np.float32([[0.5, np.nan], [-1, 7]])
    scored = tf.data.Dataset.zip(dataset, tf.data.Dataset.from_tensor_slices(scores))
    scored = scored.map(lambda e, score: e | {"score": score})
    converter = DualEncoderFeatureConverter(pack=False)
    (found,) = converter(scored, LENGTHS | {"score": 2}).batch(2).as_numpy_iterator()
    assert found.keys() == {*expected, "score"}
    assert found["score"].dtype == np.float32
    np.testing.assert_array_equal(found["score"], scores)
    (found,) = DualEncoderFeatureConverter(pack=False)(dataset, LENGTHS).batch(2).as_numpy_iterator()
    assert found.keys() == expected.keys()

    # With copies of the queries for self-teaching.
    copied = dataset.map(lambda e: e | {"copy": tf.reverse(e["inputs"], [0])})
    converter, lengths = DualEncoderFeatureConverter(pack=False), LENGTHS | {"copy": 4}
    (found,) = converter(copied, lengths).batch(2).as_numpy_iterator()
    np.testing.assert_array_equal(found["copy_encoder_input_tokens"], [[1, 6, 5, 0], [1, 5, 0, 0]])
    sizes = {name: array.shape[1] for name, array in found.items()}
    assert converter.get_model_feature_lengths(lengths) == sizes
    assert sizes.keys() == {*expected, "copy_encoder_input_tokens"}
