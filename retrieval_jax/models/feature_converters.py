"""Converts seqio's features to the arrays of a model's batch. Imports TensorFlow.

Generative retrievers use seqio's own `EncDecFeatureConverter`, unless they rank groups of docids.
"""

import types
from collections.abc import Mapping

import seqio
import tensorflow as tf

_INT32 = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
_ROWS = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=2)
_FLOATS = {rank: seqio.FeatureConverter.FeatureSpec(dtype=tf.float32, rank=rank) for rank in (1, 2)}


class _GroupFeatureConverter(seqio.FeatureConverter):
    """Converts queries with groups of candidates, for which there may be a teacher's scores or set docids."""

    PACKING_FEATURE_DTYPES = {}  # noqa: RUF012 (seqio's name)
    # What may be there: name -> (as a task's feature, as an array of an example).
    OPTIONAL: Mapping[str, tuple] = types.MappingProxyType(
        {
            "score": (_FLOATS[1], _FLOATS[1]),
            "set_tokens": (_INT32, _ROWS),
            "set_impacts": (_FLOATS[1], _FLOATS[2]),
        }
    )
    # The arrays that have other names than the tasks' features.
    NAMES: Mapping[str, str] = types.MappingProxyType({})

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        """Converts a dataset; the optional features that have a length are among its features."""
        for name, (of_task, of_model) in self.OPTIONAL.items():
            if name in task_feature_lengths:
                self.TASK_FEATURES = self.TASK_FEATURES | {name: of_task}
                self.MODEL_FEATURES = self.MODEL_FEATURES | {self.NAMES.get(name, name): of_model}
        return super().__call__(ds, task_feature_lengths)


class DualEncoderFeatureConverter(_GroupFeatureConverter):
    """Makes the batches of a dual encoder: two encoder inputs, named as in t5x_retrieval, and the candidates.

    With `lengths` those of the task's features: left_encoder_input_tokens is B × lengths["inputs"],
    right_encoder_input_tokens B × G × lengths["targets"] / G, passage and grade B × G, other_positives
    B × lengths["other_positives"], where G = lengths["passage"] is how many candidates a query has. Where
    there is a lengths["score"], which is G, the batch has a teacher's scores, score B × G (float32); where
    there are lengths["set_tokens"] and lengths["set_impacts"], these arrays are B × G × M. Where there is a
    lengths["copy"], copy_encoder_input_tokens is B × lengths["copy"].
    """

    OPTIONAL = _GroupFeatureConverter.OPTIONAL | {"copy": (_INT32, _INT32)}
    NAMES = types.MappingProxyType(
        {"inputs": "left_encoder_input_tokens", "copy": "copy_encoder_input_tokens"}
    )
    TASK_FEATURES = dict.fromkeys(("inputs", "targets", "passage", "grade", "other_positives"), _INT32)
    MODEL_FEATURES = {  # noqa: RUF012 (seqio's names)
        "left_encoder_input_tokens": _INT32,
        "right_encoder_input_tokens": _ROWS,
        "passage": _INT32,
        "grade": _INT32,
        "other_positives": _INT32,
    }

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        group = task_feature_lengths["passage"]

        def convert(example: dict) -> dict:
            return {
                "right_encoder_input_tokens": tf.reshape(example["targets"], [group, -1]),
                **{
                    self.NAMES.get(name, name): tf.reshape(x, [group, -1]) if name.startswith("set_") else x
                    for name, x in example.items()
                    if name != "targets"
                },
            }

        return self._pack_or_pad(ds, task_feature_lengths).map(convert)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Gives the length of each array's first dimension after the batch; seqio calls it so."""
        group, there = task_feature_lengths["passage"], task_feature_lengths.keys()
        return {
            "right_encoder_input_tokens": group,  # the length of its first dimension
            "passage": group,
            "grade": group,
            "other_positives": task_feature_lengths["other_positives"],
            **{array: task_feature_lengths[name] for name, array in self.NAMES.items() if name in there},
            **{name: group for name in _GroupFeatureConverter.OPTIONAL if name in there},
        }


class DocidGroupFeatureConverter(_GroupFeatureConverter):
    """Makes the batches of a generative retriever that ranks groups of docids; see `DocidGroupTargets`.

    With `lengths` those of the task's features, C = lengths["grade"] candidates of T = lengths["targets"] / C
    tokens: encoder_input_tokens is B × lengths["inputs"]; decoder_target_tokens, decoder_input_tokens and
    decoder_loss_weights are B × C × T, and so is score (float32), where there is a lengths["score"]; grade is
    B × C. Where there are lengths["set_tokens"] and lengths["set_impacts"], these arrays are B × C × M.
    """

    TASK_FEATURES = dict.fromkeys(("inputs", "targets", "grade"), _INT32)
    MODEL_FEATURES = {  # noqa: RUF012 (seqio's names)
        "encoder_input_tokens": _INT32,
        "decoder_target_tokens": _ROWS,
        "decoder_input_tokens": _ROWS,
        "decoder_loss_weights": _ROWS,
        "grade": _INT32,
    }
    OPTIONAL = _GroupFeatureConverter.OPTIONAL | {"score": (_FLOATS[1], _FLOATS[2])}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        group = task_feature_lengths["grade"]

        def convert(example: dict) -> dict:
            of_docids = {name: example[name] for name in ("targets", *self.OPTIONAL) if name in example}
            rows = {name: tf.reshape(x, [group, -1]) for name, x in of_docids.items()}
            targets_CxT = rows.pop("targets")
            return {
                "encoder_input_tokens": example["inputs"],
                "decoder_target_tokens": targets_CxT,
                "decoder_input_tokens": tf.pad(targets_CxT[:, :-1], [[0, 0], [1, 0]]),
                "decoder_loss_weights": tf.cast(targets_CxT > 0, tf.int32),
                "grade": example["grade"],
                **rows,
            }

        return self._pack_or_pad(ds, task_feature_lengths).map(convert)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Gives the length of each array's first dimension after the batch; seqio calls it so."""
        group = dict.fromkeys(self.MODEL_FEATURES, task_feature_lengths["grade"])
        return group | {"encoder_input_tokens": task_feature_lengths["inputs"]}
