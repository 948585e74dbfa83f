"""Features: the arrays of an example, which are trimmed and padded to those of a batch."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from retrieval_jax.data.vocabulary import EOS

SCORE, SET_TOKENS, SET_IMPACTS = "score", "set_tokens", "set_impacts"
FLOATS = (SCORE, SET_IMPACTS)  # the features, and the arrays of a batch, that are float32; others are int32
COPY = "copy"  # of a query, with a typo
Features = dict[str, Sequence[int] | Sequence[float]]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Feature:
    """An array of an example.

    Attributes:
      length: the most numbers that it holds.
      add_eos: whether it holds the tokens of a text, and ends with an end of sequence (within the length).
      size: where it holds no text, an exclusive upper bound of its numbers.
      dtype: of its numbers. Integers are padded with 0, floats with NaN.
    """

    length: int
    add_eos: bool = False
    size: int = 0
    dtype: str = "int32"

    @property
    def padding(self) -> float:
        """The number that fills the feature up to its length."""
        return 0 if self.dtype == "int32" else math.nan


def array_dtype(name: str) -> type[np.number]:
    """Gives the dtype of an array of a batch by its name."""
    return np.float32 if name in FLOATS else np.int32


def pad(features: Sequence[Features], spec: Mapping[str, Feature]) -> dict[str, np.ndarray]:
    """Collates features into arrays len(features) × length: trimmed, ended, padded (see `Feature`)."""
    arrays = {name: np.full((len(features), f.length), f.padding, f.dtype) for name, f in spec.items()}
    for name, feature in spec.items():
        for row, example in zip(arrays[name], features, strict=True):
            tokens = trim(example[name], feature)
            row[: len(tokens)] = tokens
    return arrays


def trim(tokens: Sequence[int], feature: Feature) -> Sequence[int]:
    """Cuts the tokens to the length of the feature, and ends them where the feature is a text."""
    if feature.add_eos:
        return [*tokens[: feature.length - 1], EOS]
    return tokens[: feature.length]
