"""The third noun: examples. What a retriever reads and what it shall answer, by number.

An example's input is some text that should find a passage. Four tasks make inputs (the generative-retrieval
paper, section 3.1), and one turns the labelled queries around:

    firstp       the first tokens of each passage
    daq          "document as query": random chunks of each passage
    d2q          synthetic queries of each passage
    labelled     the train queries; labelled_LABEL those that LABEL judged (labelled_human, labelled_llm)
    doc2query    the same, to be written from the passage

The target is the passage's docid (a generative retriever), passages as texts (a dual encoder), or the query
(a query generator). A task is an array in spirit: `len(task)`, and `task(i, rng)` for example i, the same one
each time; only which of several positives and negatives are drawn comes from `rng`. `Examples` joins a task
with a target. Nothing here imports TensorFlow; `batches.py` feeds a trainer, `seqio_tasks.py` tells seqio.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Protocol

import numpy as np

from retrieval_jax import storage
from retrieval_jax.data.collection import Query
from retrieval_jax.data.records import Collection
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError
from retrieval_jax.progress import say

PADDING = -1  # in a dual encoder's candidates: the row and the grade of no passage


@dataclasses.dataclass(frozen=True)
class Example:
    """A text, and the passages it is about.

    Attributes:
      tokens: the text in pieces, without an end.
      rows: the passages' rows in the collection; a generative retriever has just one.
      grades: their relevance, > 0 for positives, which come first, and 0 for negatives.
      known: rows of more passages that the text is about, which are never to be its negatives.
    """

    tokens: list[int]
    rows: Sequence[int]
    grades: Sequence[int]
    known: Sequence[int] = ()


class Task(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def __call__(self, i: int, rng: np.random.Generator) -> Example: ...


class FirstP:
    """Each passage's first `length` tokens."""

    def __init__(self, collection: Collection, vocabulary: Vocabulary, length: int):
        self.collection, self.vocabulary, self.length = collection, vocabulary, length

    def __len__(self) -> int:
        return self.collection.passage_count

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        tokens = self.vocabulary.encode(self.collection.passage(i).full_text)
        return Example(tokens[: self.length], [i], [1])


class DaQ:
    """`chunks` runs of `length` tokens from random places of each passage; a short passage is its own chunk.

    Example i is a chunk of passage i % passages, so an epoch visits every passage before its next chunk. A
    place depends on passage and chunk alone.
    """

    def __init__(self, collection: Collection, vocabulary: Vocabulary, length: int, chunks: int):
        self.collection, self.vocabulary = collection, vocabulary
        self.length, self.chunks = length, chunks

    def __len__(self) -> int:
        return self.chunks * self.collection.passage_count

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        chunk, row = divmod(i, self.collection.passage_count)
        tokens = self.vocabulary.encode(self.collection.passage(row).full_text)
        places = max(len(tokens) - self.length, 0) + 1
        start = int(storage.hash_fraction(f"{row}.{chunk}") * places)
        return Example(tokens[start : start + self.length], [row], [1])


class D2Q:
    """Each passage's synthetic queries."""

    def __init__(self, queries: SyntheticQueries, vocabulary: Vocabulary):
        self.queries, self.vocabulary = queries, vocabulary
        self.ends = np.cumsum(queries.counts, dtype=np.int64)  # after each passage's queries

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        row = int(np.searchsorted(self.ends, i, side="right"))
        (queries,) = self.queries.some([row])
        return Example(self.vocabulary.encode(queries[i - self.ends[row]]), [row], [1])


class LabelledPairs:
    """Each labelled query with each of its positives, one at a time."""

    def __init__(self, collection: Collection, vocabulary: Vocabulary, queries: Sequence[Query]):
        self.vocabulary = vocabulary
        pairs = [(q.text, p, grade) for q in queries for p, grade in q.positives.items()]
        self.texts = [text for text, _, _ in pairs]
        self.rows = collection.rows([passage for _, passage, _ in pairs])
        self.grades = [grade for _, _, grade in pairs]

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        return Example(self.vocabulary.encode(self.texts[i]), [int(self.rows[i])], [self.grades[i]])


class LabelledGroups:
    """Each labelled query with at most `positives` of its positives and `negatives` of its negatives.

    Where it has more, they are drawn without replacement, anew in each epoch; where it has fewer, the group
    is smaller.
    """

    def __init__(
        self,
        collection: Collection,
        vocabulary: Vocabulary,
        queries: Sequence[Query],
        positives: int,
        negatives: int,
    ):
        self.vocabulary, self.queries = vocabulary, queries
        self.positives, self.negatives = positives, negatives
        ids = [passage for q in queries for passage in (*q.positives, *q.negatives)]
        self.rows = collection.rows(ids)
        sizes = [len(q.positives) + len(q.negatives) for q in queries]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.queries)

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        query = self.queries[i]
        rows = self.rows[self.starts[i] : self.starts[i + 1]]
        good = len(query.positives)
        drawn = _draw(rng, good, self.positives)
        chosen = [*drawn, *(good + n for n in _draw(rng, len(rows) - good, self.negatives))]
        grades = [*query.positives.values()] + [0] * (len(rows) - good)
        tokens = self.vocabulary.encode(query.text)
        known = [int(rows[j]) for j in range(good) if j not in drawn]
        return Example(tokens, [int(rows[j]) for j in chosen], [grades[j] for j in chosen], known)


def _draw(rng: np.random.Generator, count: int, most: int) -> Sequence[int]:
    return range(count) if count <= most else sorted(rng.choice(count, most, replace=False).tolist())


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
        texts = [p.full_text for p in self.collection.some(example.rows)]
        tokens = self.vocabulary.batch([*texts, *([""] * len(missing))], self.passage_length)
        tokens[len(texts) :] = 0
        return {
            "inputs": example.tokens,
            "targets": tokens.ravel().tolist(),
            "passage": [*example.rows, *missing],
            "grade": [*example.grades, *missing],
            "known": [*example.known, *[PADDING] * (self.known - len(example.known))],
        }


Targets = DocidTargets | QueryTargets | PassageTargets


class Examples:
    """A task's examples with their targets: `examples(i, rng)` gives example i's features, untrimmed."""

    def __init__(self, task: Task, targets: Targets):
        self.task, self.targets = task, targets

    def __len__(self) -> int:
        return len(self.task)

    def __call__(self, i: int, rng: np.random.Generator) -> Features:
        return self.targets(self.task(i, rng))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Makes the tasks of a collection by name.

    Attributes:
      collection, vocabulary: the passages and queries, and how they become tokens.
      synthetic: queries for d2q; None where there are none.
      chunk_length: tokens of firstp and of a chunk (64 in the paper).
      chunks: chunks of a passage (10 in the paper).
      group: (most positives, most negatives) of a labelled query, for a dual encoder; None gives pairs.
      mined: query id -> passages that are its negatives, besides those of the collection.
    """

    collection: Collection
    vocabulary: Vocabulary
    synthetic: SyntheticQueries | None = None
    chunk_length: int = 64
    chunks: int = 10
    group: tuple[int, int] | None = None
    mined: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def queries(self) -> list[Query]:
        """The train queries, if there are any."""
        queries = self.collection.queries("train") if self.collection.query_counts.get("train") else []
        if not self.mined:
            return queries

        def with_mined(query: Query) -> Query:
            negatives = dict.fromkeys((*query.negatives, *self.mined.get(query.id, ())))
            return dataclasses.replace(query, negatives=tuple(negatives))

        return [with_mined(query) for query in queries]

    def task(self, name: str) -> Task:
        """The task of that name. Raises UserError for a name that is none."""
        if name == "firstp":
            return FirstP(self.collection, self.vocabulary, self.chunk_length)
        if name == "daq":
            return DaQ(self.collection, self.vocabulary, self.chunk_length, self.chunks)
        if name == "d2q":
            if not self.synthetic:
                raise UserError(
                    "d2q: no synthetic queries: `retrieval-jax generate-queries`, then "
                    "--gin.SYNTHETIC=\"'doc2query'\""
                )
            return D2Q(self.synthetic, self.vocabulary)
        kind, _, label = name.partition("_")
        if name != "doc2query" and kind != "labelled":
            names = "firstp, daq, d2q, labelled, labelled_LABEL, doc2query"
            raise UserError(f"no task {name!r}: the tasks are {names}")
        queries = [q for q in self.queries if not label or q.label == label]
        if label and not queries:
            there = sorted({q.label for q in self.queries if q.label})
            raise UserError(
                f"{name}: no train query is labelled {label!r}: there are {', '.join(there) or 'no labels'}"
            )
        if self.group:
            return LabelledGroups(self.collection, self.vocabulary, queries, *self.group)
        return LabelledPairs(self.collection, self.vocabulary, queries)


# The generative-retrieval paper's rows: which tasks are mixed, each in proportion to its examples (the paper
# does not say in which). Rows 4 and 5 change the model, not the mixture. On MS MARCO, whose passages are some
# 64 tokens, DaQ is FirstP; on NQ and TriviaQA, row 7 has both, and queries of a generator trained on them.
ROWS: Mapping[str, tuple[str, ...]] = {
    "1a": ("labelled",),
    "2a": ("firstp", "labelled"),
    "2b": ("daq", "labelled"),
    "3a": ("daq", "d2q", "labelled"),
    "3b": ("firstp", "d2q", "labelled"),
    "6b": ("d2q",),
    "7": ("firstp", "daq", "d2q", "labelled"),
}


def mixture(
    rates: str | Mapping[str, float], make: Callable[[str], Sized]
) -> Mapping[str, tuple[Sized, float]]:
    """Task -> (its examples, its share), for one of ROWS or for given rates.

    Raises UserError for an unknown row, and where no task has both a rate and examples.
    """
    if isinstance(rates, str) and rates not in ROWS:
        raise UserError(f"no mixture {rates!r}: the paper's rows are {', '.join(ROWS)}")
    names = ROWS[rates] if isinstance(rates, str) else [name for name, rate in rates.items() if rate]
    made = {name: make(name) for name in names}
    weights = {
        name: (len(examples) if isinstance(rates, str) else rates[name])
        for name, examples in made.items()
        if len(examples)
    }
    if weights and (empty := [name for name in names if name not in weights]):
        say(f"{', '.join(empty)}: no examples, so left out of the mixture (TrainingData.rates)")
    if not weights:
        raise UserError("no task has both a rate and examples: set --gin.train.rates")
    return {name: (made[name], weight / sum(weights.values())) for name, weight in weights.items()}


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
