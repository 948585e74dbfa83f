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
from collections.abc import Callable, Mapping, Sized

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.data.collection import Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.records import Collection
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.examples.targets import Features, Targets
from retrieval_jax.examples.tasks import D2Q, DaQ, FirstP, LabelledGroups, LabelledPairs, Task


class Examples:
    """A task's examples with their targets: `examples(i, rng)` gives example i's features, untrimmed."""

    def __init__(self, task: Task, targets: Targets):
        self.task, self.targets = task, targets

    def __len__(self) -> int:
        return len(self.task)

    def __call__(self, i: int, rng: np.random.Generator) -> Features:
        return self.targets(self.task(i, rng))


TASKS = ("firstp", "daq", "d2q", "labelled", "labelled_LABEL", "doc2query")


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
    """

    collection: Collection
    vocabulary: Vocabulary
    synthetic: SyntheticQueries | None = None
    chunk_length: int = 64
    chunks: int = 10
    train_group_size: tuple[int, int] | None = None
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

    @functools.cached_property
    def answers(self) -> KnownAnswers:
        """What is known to answer the train queries."""
        return KnownAnswers(self.queries)

    def most_other_positives(self, positives: int) -> int:
        """The most passages that answer a train query besides the `positives` of its group."""
        counts = (
            max(len(query.positives) - positives, 0) + len(self.answers.others(query))
            for query in self.queries
        )
        return max(counts, default=0)

    def task(self, name: str) -> Task:
        """The task of that name. Raises UserError for a name that is none."""
        if name == "firstp":
            return FirstP(self.collection, self.vocabulary, self.chunk_length)
        if name == "daq":
            return DaQ(self.collection, self.vocabulary, self.chunk_length, self.chunks)
        if name == "d2q":
            if not self.synthetic:
                raise UserError(
                    "d2q: no synthetic queries: `retrieval-jax generate-queries`, then --SYNTHETIC=doc2query"
                )
            return D2Q(self.synthetic, self.vocabulary)
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
            return LabelledGroups(
                self.collection, self.vocabulary, queries, *self.train_group_size, self.answers
            )
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
        log(f"{', '.join(empty)}: no examples, so left out of the mixture (DataConfig.rates)")
    if not weights:
        raise UserError("no task has both a rate and examples: set --gin.train.rates")
    return {name: (made[name], weight / sum(weights.values())) for name, weight in weights.items()}
