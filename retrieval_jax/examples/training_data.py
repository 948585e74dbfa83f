"""Which examples to train on: a collection's tasks, their shares, lengths and order, set by gin."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Fraction, Names, NonNegative, NonNegativeFloat, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.mined import MinedNegatives
from retrieval_jax.data.records import Collection
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import NO_PROMPTS, Prompts, Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.cached import CachedExamples
from retrieval_jax.examples.examples import ROWS, TASKS, Examples, TaskFactory, mixture
from retrieval_jax.examples.targets import Targets
from retrieval_jax.examples.tasks import LabelledGroups

Task = Annotated[str, Names("a task", TASKS)]
Rates = Annotated[str, Names("a row of the paper", tuple(ROWS))] | Mapping[Task, NonNegativeFloat]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The examples of a run, before it is known which collection they come from.

    Args:
      rates: task -> its share (firstp, daq, d2q, labelled, labelled_LABEL, doc2query), or a row of the
        generative-retrieval paper, such as '3b'.
      curriculum: (steps, rates) stages that come before, in order.
      input_length, passage_length: tokens of a text, and of a passage where that is read or written whole.
      chunk_length, chunks: tokens of firstp and of a daq chunk, and chunks a passage.
      positives, negatives: most passages a query has in a dual encoder's batch.
      drop_rates: task -> share of the input's tokens left out, anew in each epoch.
      synthetic: name of the synthetic queries for d2q.
      mined: name of mined negatives, besides those that the collection has.
      pack: examples that share a row of a batch, where queries are short: about input_length over their
        tokens. What does not fit into a row is cut. 1: each has its own.
    """

    rates: Rates = "2a"
    curriculum: Sequence[tuple[int, Rates]] = ()
    input_length: Positive = 64
    passage_length: Positive = 128
    chunk_length: Positive = 64
    chunks: Positive = 10
    positives: Positive = 1
    negatives: NonNegative = 0
    drop_rates: Mapping[Task, Fraction] = dataclasses.field(default_factory=dict)
    synthetic: str | None = None
    mined: str | None = None
    pack: Positive = 1


@dataclasses.dataclass(frozen=True)
class TrainDataset:
    """The examples of a collection, as a DataConfig chooses them.

    Attributes:
      config: which tasks, lengths and mixture.
      work: where the collection's synthetic queries, mined negatives and cached examples lie.
      collection: the passages and the queries.
      target_type: the class of the targets.
      table: the docids, where they are the targets.
      prompts: a dual encoder's; they come before every input and every passage.
    """

    config: DataConfig
    work: Workspace
    collection: Collection
    target_type: type[Targets]
    table: DocidTable | None = None
    prompts: Prompts = NO_PROMPTS

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The collection's, without a prompt."""
        return Vocabulary(self.collection.vocabulary_path)

    @property
    def _input_vocabulary(self) -> Vocabulary:
        return self.vocabulary.with_prompt(self.prompts.query)

    @functools.cached_property
    def synthetic(self) -> SyntheticQueries | None:
        if not self.config.synthetic:
            return None
        queries = SyntheticQueries(self.work.synthetic(self.config.synthetic))
        queries.check(self.collection)
        return queries

    @functools.cached_property
    def mined(self) -> MinedNegatives | None:
        return MinedNegatives(self.work.negatives(self.config.mined)) if self.config.mined else None

    @functools.cached_property
    def targets(self) -> Targets:
        return self.target_type.of(self)

    @property
    def most_other_positives(self) -> int:
        """The most passages that answer a train query besides the positives in its group."""
        return self._tasks.most_other_positives(self.config.positives)

    @functools.cached_property
    def _tasks(self) -> TaskFactory:
        c = self.config
        group_size = (c.positives, c.negatives) if self.target_type.has_groups else None
        mined = self.mined.of_queries(self.collection) if self.mined else {}
        vocabulary = self._input_vocabulary
        return TaskFactory(
            self.collection, vocabulary, self.synthetic, c.chunk_length, c.chunks, group_size, mined
        )

    @property
    def labels(self) -> list[str]:
        """The tasks of the labels that the train queries have: labelled_human, …"""
        return [f"labelled_{label}" for label in sorted({q.label for q in self._tasks.queries if q.label})]

    @property
    def prefix(self) -> str:
        """COLLECTION.KIND, with which the names of seqio's tasks begin."""
        return f"{self.collection.name}.{self.targets.name}"

    def recipe(self, task: str) -> dict:
        """What a task's examples depend on, for its cache."""
        c = self.config
        facts = {
            "collection": self.collection.fingerprint,
            "docids": self.table.fingerprint() if self.table else None,
            "vocabulary": self.vocabulary.checksum,
            "tokens": [c.chunk_length, c.chunks],
        }
        if task == "d2q" and self.synthetic:
            facts["synthetic"] = self.synthetic.fingerprint
        if self.target_type.has_groups:
            others = self.targets.features["other_positives"].length
            facts["candidates"] = [c.positives, c.negatives, c.passage_length, others]
            facts["mined"] = self.mined.fingerprint if self.mined else None
        if any(self.prompts):
            facts["prompts"] = list(self.prompts)
        return facts

    def computed(self, task: str) -> Examples:
        """A task's examples, made as they are asked for."""
        return Examples(self._tasks.task(task), self.targets)

    def queries(self, split: str) -> tuple[Examples, list[Query]]:
        """A split's labelled queries, each once, with as many candidates as in training; and the queries."""
        c = self.config
        queries = [query for query in self.collection.queries(split) if query.positives]
        answers, vocabulary = KnownAnswers(queries), self._input_vocabulary
        task = LabelledGroups(self.collection, vocabulary, queries, c.positives, c.negatives, answers)
        return Examples(task, self.targets), queries

    def examples(self, task: str) -> Examples | CachedExamples:
        """A task's examples: from the cache where they are in it, else made as they are asked for."""
        folder = self.work.cache(f"{self.prefix}.{task}")
        if cached := CachedExamples.find(folder, self.recipe(task)):
            return cached
        if storage.finished(folder):
            _tell_unread(folder)
        return self.computed(task)

    def shares(self, rates: Rates) -> Mapping[str, tuple[Examples | CachedExamples, float]]:
        """Task -> (its examples, its share)."""
        return mixture(rates, self.examples)

    def stages(self) -> list[tuple[int | None, Mapping]]:
        """(batches, shares) of the curriculum's stages and of the last one, which never ends.

        Raises UserError for a task that this collection does not have, with a share or a drop rate.
        """
        return self._stages

    @functools.cached_property
    def _stages(self) -> list[tuple[int | None, Mapping]]:
        for task in self.config.drop_rates:
            if task.startswith("labelled_"):
                self._tasks.task(task)
        stages = [(steps, self.shares(rates)) for steps, rates in self.config.curriculum]
        return [*stages, (None, self.shares(self.config.rates))]


@functools.cache
def _tell_unread(folder: Path) -> None:
    """Says it once for each folder."""
    log(f"{folder}: of other settings than this run's, so it is not read: `retrieval-jax cache`")
