"""Converts seqio's features to the arrays of a model's batch. Imports TensorFlow.

Generative retrievers use seqio's own `EncDecFeatureConverter`.
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

_INT32 = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
_FLOAT32 = seqio.FeatureConverter.FeatureSpec(dtype=tf.float32)


class DualEncoderFeatureConverter(seqio.FeatureConverter):
    """Makes the batches of a dual encoder: two encoder inputs, named as in t5x_retrieval, and the candidates.

    With `lengths` those of the task's features: left_encoder_input_tokens is B × lengths["inputs"],
    right_encoder_input_tokens B × G × lengths["targets"] / G, passage and grade B × G, other_positives
    B × lengths["other_positives"], where G = lengths["passage"] is how many candidates a query has. Where
    there is a lengths["score"], which is G, the batch has a teacher's scores, score B × G (float32).
    """

    TASK_FEATURES = dict.fromkeys(("inputs", "targets", "passage", "grade", "other_positives"), _INT32)
    MODEL_FEATURES = {  # noqa: RUF012 (seqio's names)
        "left_encoder_input_tokens": _INT32,
        "right_encoder_input_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=2),
        "passage": _INT32,
        "grade": _INT32,
        "other_positives": _INT32,
    }
    PACKING_FEATURE_DTYPES = {}  # noqa: RUF012

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        """Converts a dataset; `score` is one of its features where it has a length."""
        if "score" in task_feature_lengths:
            self.TASK_FEATURES = self.TASK_FEATURES | {"score": _FLOAT32}
            self.MODEL_FEATURES = self.MODEL_FEATURES | {"score": _FLOAT32}
        return super().__call__(ds, task_feature_lengths)

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        group = task_feature_lengths["passage"]

        def convert(example: dict) -> dict:
            return {
                "left_encoder_input_tokens": example["inputs"],
                "right_encoder_input_tokens": tf.reshape(example["targets"], [group, -1]),
                **{name: example[name] for name in self.TASK_FEATURES if name not in ("inputs", "targets")},
            }

        return self._pack_or_pad(ds, task_feature_lengths).map(convert)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Gives the length of each array's first dimension after the batch; seqio calls it so."""
        group = task_feature_lengths["passage"]
        return {
            "left_encoder_input_tokens": task_feature_lengths["inputs"],
            "right_encoder_input_tokens": group,  # the length of its first dimension
            "passage": group,
            "grade": group,
            "other_positives": task_feature_lengths["other_positives"],
            **({"score": group} if "score" in task_feature_lengths else {}),
        }
