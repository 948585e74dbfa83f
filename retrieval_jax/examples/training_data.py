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
from retrieval_jax.examples.examples import ROWS, TASKS, Examples, Inputs, mixture
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets, Targets
from retrieval_jax.examples.tasks import LabelledGroups

Task = Annotated[str, Names("a task", TASKS)]
Rates = Annotated[str, Names("a row of the paper", tuple(ROWS))] | Mapping[Task, NonNegativeFloat]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TrainingData:
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

    def of(
        self,
        work: Workspace,
        collection: Collection,
        answer: str,
        table: DocidTable | None,
        prompts: Prompts = NO_PROMPTS,
    ) -> "OpenData":
        """The examples of a collection, whose targets are `answer`: docids, passages or query.

        `prompts` are a dual encoder's: they come before every input and every passage.
        """
        return OpenData(self, work, collection, answer, table, prompts)


@dataclasses.dataclass(frozen=True)
class OpenData:
    """Examples of a collection. See TrainingData."""

    settings: TrainingData
    work: Workspace
    collection: Collection
    answer: str
    table: DocidTable | None
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
        if not self.settings.synthetic:
            return None
        queries = SyntheticQueries(self.work.synthetic(self.settings.synthetic))
        queries.check(self.collection)
        return queries

    @functools.cached_property
    def mined(self) -> MinedNegatives | None:
        return MinedNegatives(self.work.negatives(self.settings.mined)) if self.settings.mined else None

    @functools.cached_property
    def targets(self) -> Targets:
        s = self.settings
        if self.answer == "docids":
            return DocidTargets(self.table, s.input_length)
        if self.answer == "passages":
            return PassageTargets(
                self.collection,
                self.vocabulary.with_prompt(self.prompts.passage),
                s.input_length,
                s.passage_length,
                group=s.positives + s.negatives,
                known=max(self._inputs.most_known(s.positives), 1),
            )
        return QueryTargets(self.collection, self.vocabulary, s.passage_length, s.input_length)

    @functools.cached_property
    def _inputs(self) -> Inputs:
        s = self.settings
        group = (s.positives, s.negatives) if self.answer == "passages" else None
        mined = self.mined.of_queries(self.collection) if self.mined else {}
        return Inputs(
            self.collection, self._input_vocabulary, self.synthetic, s.chunk_length, s.chunks, group, mined
        )

    @property
    def labels(self) -> list[str]:
        """The tasks of the labels that the train queries have: labelled_human, …"""
        return [f"labelled_{label}" for label in sorted({q.label for q in self._inputs.queries if q.label})]

    @property
    def prefix(self) -> str:
        """COLLECTION.KIND, with which the names of seqio's tasks begin."""
        return f"{self.collection.name}.{self.targets.name}"

    def recipe(self, task: str) -> dict:
        """What a task's examples depend on, for its cache."""
        s = self.settings
        facts = {
            "collection": self.collection.fingerprint,
            "docids": self.table.fingerprint() if self.table else None,
            "vocabulary": self.vocabulary.checksum,
            "tokens": [s.chunk_length, s.chunks],
        }
        if task == "d2q" and self.synthetic:
            facts["synthetic"] = self.synthetic.fingerprint
        if self.answer == "passages":
            facts["candidates"] = [s.positives, s.negatives, s.passage_length, self.targets.known]
            facts["mined"] = self.mined.fingerprint if self.mined else None
        if any(self.prompts):
            facts["prompts"] = list(self.prompts)
        return facts

    def computed(self, task: str) -> Examples:
        """A task's examples, made as they are asked for."""
        return Examples(self._inputs.task(task), self.targets)

    def queries(self, split: str) -> tuple[Examples, list[Query]]:
        """A split's labelled queries, each once, with as many candidates as in training; and the queries."""
        s = self.settings
        queries = [query for query in self.collection.queries(split) if query.positives]
        answers, vocabulary = KnownAnswers(queries), self._input_vocabulary
        task = LabelledGroups(self.collection, vocabulary, queries, s.positives, s.negatives, answers)
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
        for task in self.settings.drop_rates:
            if task.startswith("labelled_"):
                self._inputs.task(task)
        stages = [(steps, self.shares(rates)) for steps, rates in self.settings.curriculum]
        return [*stages, (None, self.shares(self.settings.rates))]


@functools.cache
def _tell_unread(folder: Path) -> None:
    """Says it once for each folder."""
    log(f"{folder}: of other settings than this run's, so it is not read: `retrieval-jax cache`")
