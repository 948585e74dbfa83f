"""What a retriever answers to an example: a docid, the query, or passages as texts; and the arrays of it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.tasks import PADDING, Example


@dataclasses.dataclass(frozen=True)
class Feature:
    """An array of an example.

    Attributes:
      length: most numbers.
      add_eos: whether it is text, with an end written after its tokens (within the length).
      size: of what is not text, a number above all of its numbers.
    """

    length: int
    add_eos: bool = False
    size: int = 0


Features = dict[str, Sequence[int]]


class DocidTargets:
    """inputs: the text; targets: the passage's docid, which ends as its kind says."""

    def __init__(self, table: DocidTable, input_length: int):
        self.table = table
        self.name = table.kind
        self.features = {
            "inputs": Feature(input_length, add_eos=True),
            "targets": Feature(table.length, size=table.output_size),
        }

    @functools.cached_property
    def mean_length(self) -> float:
        """Tokens of a docid, of the first 100,000."""
        return float(np.count_nonzero(self.table.tokens_NxL[:100_000], axis=1).mean())

    def __call__(self, example: Example) -> Features:
        docid = self.table.tokens_NxL[example.rows[0]]
        return {"inputs": example.tokens, "targets": docid[docid > 0].tolist()}


class QueryTargets:
    """The other way round. inputs: the passage; targets: the text."""

    name = "query"

    def __init__(
        self, collection: Collection, vocabulary: Vocabulary, passage_length: int, query_length: int
    ):
        self.collection, self.vocabulary = collection, vocabulary
        self.features = {
            "inputs": Feature(passage_length, add_eos=True),
            "targets": Feature(query_length, add_eos=True),
        }

    def __call__(self, example: Example) -> Features:
        passage = self.collection.passage(example.rows[0])
        return {"inputs": self.vocabulary.encode(passage.full_text), "targets": example.tokens}


class PassageTargets:
    """inputs: the text; then `group` candidates, positives first, padded where there are fewer.

    targets: the candidates' tokens, each ended and padded to `passage_length`, in a row; passage: their rows
    (PADDING); grade: > 0 positive, 0 negative, PADDING none; known: rows of at most so many more positives.
    The row of a passage whose text stood before is the first one's, so that copies count as one passage.
    """

    name = "passages"

    def __init__(
        self,
        collection: Collection,
        vocabulary: Vocabulary,
        input_length: int,
        passage_length: int,
        group: int,
        known: int = 1,
    ):
        self.collection, self.vocabulary = collection, vocabulary
        self.passage_length, self.group, self.known = passage_length, group, known
        self.features = {
            "inputs": Feature(input_length, add_eos=True),
            "targets": Feature(group * passage_length, size=vocabulary.size),
            "passage": Feature(group, size=collection.passage_count),
            "grade": Feature(group, size=1 << 31),
            "known": Feature(known, size=collection.passage_count),
        }

    def __call__(self, example: Example) -> Features:
        missing = [PADDING] * (self.group - len(example.rows))
        texts = [p.full_text for p in self.collection.get(example.rows)]
        tokens = self.vocabulary.batch([*texts, *([""] * len(missing))], self.passage_length)
        tokens[len(texts) :] = 0
        return {
            "inputs": example.tokens,
            "targets": tokens.ravel().tolist(),
            "passage": [*self._first_copies(example.rows), *missing],
            "grade": [*example.grades, *missing],
            "known": [*self._first_copies(example.known), *[PADDING] * (self.known - len(example.known))],
        }

    def _first_copies(self, rows: Sequence[int]) -> list[int]:
        return self.collection.first_copies(np.array(rows, np.int64)).tolist()


Targets = DocidTargets | QueryTargets | PassageTargets


def pad(features: Sequence[Features], spec: Mapping[str, Feature]) -> dict[str, np.ndarray]:
    """Int32 arrays, len(features) × length: trimmed, ended where the feature says so, padded with 0."""
    arrays = {name: np.zeros((len(features), f.length), np.int32) for name, f in spec.items()}
    for name, feature in spec.items():
        for row, example in zip(arrays[name], features, strict=True):
            tokens = trim(example[name], feature)
            row[: len(tokens)] = tokens
    return arrays


def trim(tokens: Sequence[int], feature: Feature) -> Sequence[int]:
    """At most as many as the feature is long, ended where it says so."""
    if feature.add_eos:
        return [*tokens[: feature.length - 1], EOS]
    return tokens[: feature.length]
