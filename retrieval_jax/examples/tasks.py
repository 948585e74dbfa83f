"""Tasks: the texts that should find passages. A task behaves like an array of examples; see examples.py."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from retrieval_jax.core import storage
from retrieval_jax.data.collection import Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.records import Collection
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import Vocabulary

PADDING = -1  # in a dual encoder's candidates: the row and the grade of no passage


@dataclasses.dataclass(frozen=True)
class Example:
    """A text, and the passages that it is about.

    Attributes:
      tokens: the tokens of the text, without an end of sequence.
      rows: the rows of the passages in the collection; one row where the targets have no groups.
      grades: the relevance of each: > 0 for positives, which come first, 0 for negatives.
      other_positives: rows of more passages that the text is about, which are never its negatives.
    """

    tokens: list[int]
    rows: Sequence[int]
    grades: Sequence[int]
    other_positives: Sequence[int] = ()


class Task(Protocol):
    """Examples by number: `task(i, rng)` gives example i."""

    def __len__(self) -> int: ...

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        """Makes example i."""
        ...


class FirstP:
    """The first `length` tokens of each passage (FirstP)."""

    def __init__(self, collection: Collection, vocabulary: Vocabulary, length: int):
        self.collection, self.vocabulary, self.length = collection, vocabulary, length

    def __len__(self) -> int:
        return self.collection.passage_count

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        """Makes example i."""
        text = self.collection.passage(i).full_text
        return Example(self.vocabulary.encode_chunk(text, self.length), [i], [1])


class DaQ:
    """`chunks` random chunks of `length` tokens of each passage ("document as query"); a short one is whole.

    Example i is a chunk of passage i % passages, so that an epoch visits every passage before the next chunk
    of any. Where a chunk starts depends on the passage and the number of the chunk alone.
    """

    def __init__(self, collection: Collection, vocabulary: Vocabulary, length: int, chunks: int):
        self.collection, self.vocabulary = collection, vocabulary
        self.length, self.chunks = length, chunks

    def __len__(self) -> int:
        return self.chunks * self.collection.passage_count

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        """Makes example i."""
        chunk, row = divmod(i, self.collection.passage_count)
        text, start = self.collection.passage(row).full_text, storage.hash_fraction(f"{row}.{chunk}")
        return Example(self.vocabulary.encode_chunk(text, self.length, start), [row], [1])


class D2Q:
    """The synthetic queries of each passage (D2Q)."""

    def __init__(self, queries: SyntheticQueries, vocabulary: Vocabulary):
        self.queries, self.vocabulary = queries, vocabulary
        self.ends = np.cumsum(queries.counts, dtype=np.int64)  # after each passage's queries

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        """Makes example i."""
        row = int(np.searchsorted(self.ends, i, side="right"))
        (queries,) = self.queries.get([row])
        return Example(self.vocabulary.encode(queries[i - self.ends[row]]), [row], [1])


class LabelledPairs:
    """Each labelled query with each of its positives, one at a time."""

    def __init__(self, collection: Collection, vocabulary: Vocabulary, queries: Sequence[Query]):
        self.vocabulary = vocabulary
        pairs = [(q.text, p, grade) for q in queries for p, grade in q.positives.items()]
        self.texts = [text for text, _, _ in pairs]
        self.rows = collection.find_rows([passage for _, passage, _ in pairs])
        self.grades = [grade for _, _, grade in pairs]

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        """Makes example i."""
        return Example(self.vocabulary.encode(self.texts[i]), [int(self.rows[i])], [self.grades[i]])


class LabelledGroups:
    """Each labelled query with at most `positives` of its positives and `negatives` of its negatives.

    Where a query has more, they are drawn without replacement, again in each epoch; where it has fewer, the
    group is smaller. A passage with the same text as one that answers the query is never its negative.
    """

    def __init__(
        self,
        collection: Collection,
        vocabulary: Vocabulary,
        queries: Sequence[Query],
        positives: int,
        negatives: int,
        answers: KnownAnswers,
    ):
        self.vocabulary, self.queries = vocabulary, queries
        self.positives, self.negatives = positives, negatives
        ids = [(*q.positives, *answers.others(q), *q.negatives) for q in queries]
        self.rows = collection.find_rows(itertools.chain.from_iterable(ids))
        self.first_rows = collection.first_copies(self.rows)  # a row a text
        self.starts = np.concatenate([[0], np.cumsum([len(some) for some in ids], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.queries)

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        """Makes example i."""
        query = self.queries[i]
        rows, first_rows = (
            some[self.starts[i] : self.starts[i + 1]].tolist() for some in (self.rows, self.first_rows)
        )
        good, bad = len(query.positives), len(rows) - len(query.negatives)
        answers = {*first_rows[:bad]}
        negatives = [
            row for row, first in zip(rows[bad:], first_rows[bad:], strict=True) if first not in answers
        ]
        drawn = _draw(rng, good, self.positives)
        chosen = [negatives[n] for n in _draw(rng, len(negatives), self.negatives)]
        grades = [*query.positives.values()]
        tokens = self.vocabulary.encode(query.text)
        other_positives = [rows[j] for j in range(bad) if j not in drawn and rows[j] >= 0]
        return Example(
            tokens,
            [*(rows[j] for j in drawn), *chosen],
            [*(grades[j] for j in drawn), *[0] * len(chosen)],
            other_positives,
        )


def _draw(rng: np.random.Generator, count: int, most: int) -> Sequence[int]:
    return range(count) if count <= most else sorted(rng.choice(count, most, replace=False).tolist())
