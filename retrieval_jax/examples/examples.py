"""Examples: what a retriever reads and what it is trained to write or to rank, by number.

The input of an example is a text that should find a passage. Six tasks make inputs (four of them are those of
section 3.1 of the generative-retrieval paper), and one turns the labelled queries around:

    firstp       the first tokens of each passage
    daq          "document as query": random chunks of each passage
    sentence     sentences of each passage, which a dual encoder finds by the rest of the passage
    title        the title of each passage, which a dual encoder finds by its text
    d2q          synthetic queries of each passage
    labelled     the train queries; labelled_LABEL those that LABEL judged (labelled_human, labelled_llm)
    doc2query    the same, to be written from the passage

The target is the passage's docid (a generative retriever), passages as texts (a dual encoder), or the query
(a query generator). A task behaves like an array: it has a length, and `task(i, rng)` gives example i, the
same one at each call; only the choice among several positives and negatives is drawn from `rng`. `Examples`
joins a task with its targets. Nothing here imports TensorFlow: `batches.py` feeds the trainer, and
`seqio_tasks.py` registers the examples with seqio.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.scores import ScoredRows
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.examples.features import Features
from retrieval_jax.examples.targets import Targets
from retrieval_jax.examples.tasks import (
    D2Q,
    NO_TYPOS,
    DaQ,
    FirstP,
    LabelledGroups,
    LabelledPairs,
    Sentences,
    Task,
    Titles,
    Typos,
)


class Examples:
    """A task joined with its targets: `examples(i, rng)` gives the features of example i, untrimmed."""

    def __init__(self, task: Task, targets: Targets):
        self.task, self.targets = task, targets

    @property
    def draws(self) -> bool:
        """Whether an example may differ from one epoch to the next, so that no cache can stand for it."""
        return self.task.draws or self.targets.draws

    def __len__(self) -> int:
        return len(self.task)

    def __call__(self, i: int, rng: np.random.Generator) -> Features:
        """Makes the features of example i; `rng` draws where there is a choice."""
        return self.get([i], [rng])[0]

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Features]:
        """Makes the features of the examples of these numbers; see `Task.get`."""
        rngs = [*rngs]
        return self.targets.get(self.targets.draw(self.task.get(numbers, rngs), rngs))


TASKS = ("firstp", "daq", "sentence", "title", "d2q", "labelled", "labelled_LABEL", "doc2query")


@dataclasses.dataclass(frozen=True)
class TaskFactory:
    """Makes the tasks of a collection by name.

    Attributes:
      collection, vocabulary: the passages and queries, and how inputs become tokens (a prompt included).
      synthetic: queries for d2q; None where there are none.
      chunk_length: tokens of firstp and of a chunk (64 in the paper).
      chunks: chunks of a passage (10 in the paper).
      train_group_size: (most positives, most negatives) of a labelled query, where the targets are groups of
        candidates; None gives pairs of a query and a passage.
      mined: query id -> passages that are its negatives, besides those of the collection.
      scores: a teacher's scores of the train queries' passages; None where there is no teacher. Where nothing
        is mined, the passages that it scored are negatives.
      typos: which queries have typos, where queries are inputs.
    """

    collection: Collection
    vocabulary: Vocabulary
    synthetic: SyntheticQueries | None = None
    chunk_length: int = 64
    chunks: int = 10
    train_group_size: tuple[int, int] | None = None
    mined: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    scores: ScoredRows | None = None
    typos: Typos = NO_TYPOS

    @functools.cached_property
    def queries(self) -> list[Query]:
        """The train queries, with the mined negatives behind their own; [] where there are none."""
        queries = self.collection.queries("train") if self.collection.query_counts.get("train") else []
        if not self.mined:
            return queries

        def with_mined(query: Query) -> Query:
            negatives = dict.fromkeys((*query.negatives, *self.mined.get(query.id, ())))
            return dataclasses.replace(query, negatives=tuple(negatives))

        return [with_mined(query) for query in queries]

    @functools.cached_property
    def answers(self) -> KnownAnswers:
        """The passages that are known to answer each train query."""
        return KnownAnswers(self.queries)

    def most_other_positives(self, positives: int) -> int:
        """The most passages that answer a train query besides the `positives` of its group."""
        counts = (
            max(len(query.positives) - positives, 0) + len(self.answers.others(query))
            for query in self.queries
        )
        return max(counts, default=0)

    def task(self, name: str) -> Task:
        """Makes the task of a name.

        Raises:
          UserError: there is no such task, or the collection lacks what it is made of.
        """
        if name == "firstp":
            return FirstP(self.collection, self.vocabulary, self.chunk_length)
        if name == "daq":
            return DaQ(self.collection, self.vocabulary, self.chunk_length, self.chunks)
        if name == "sentence":
            return Sentences(self.collection, self.vocabulary, self.chunks)
        if name == "title":
            return Titles(self.collection, self.vocabulary)
        if name == "d2q":
            if not self.synthetic:
                raise UserError(
                    "d2q: no synthetic queries: `retrieval-jax generate-queries`, then --SYNTHETIC=doc2query"
                )
            return D2Q(self.synthetic, self.vocabulary, self.typos)
        kind, _, label = name.partition("_")
        if name != "doc2query" and kind != "labelled":
            raise UserError(f"no task {name!r}: the tasks are {', '.join(TASKS)}")
        queries = [q for q in self.queries if not label or q.label == label]
        if label and not queries:
            there = sorted({q.label for q in self.queries if q.label})
            raise UserError(
                f"{name}: no train query is labelled {label!r}: there are {', '.join(there) or 'no labels'}"
            )
        if self.train_group_size:
            groups = LabelledGroups(
                self.collection,
                self.vocabulary,
                queries,
                *self.train_group_size,
                self.answers,
                self.scores,
                draw_scored=self.scores is not None and not self.mined,
                typos=self.typos,
            )
            if self.scores and self.train_group_size[1] and not groups.has_scored_negatives():
                raise UserError(
                    f"{name}: the teacher scored no negative of any query, so that nothing is ranked: score "
                    "what was mined, --gin.score_pairs.candidates=\"('NAME',)\""
                )
            return groups
        typos = NO_TYPOS if name == "doc2query" else self.typos  # nobody wants to generate them
        return LabelledPairs(self.collection, self.vocabulary, queries, typos)
