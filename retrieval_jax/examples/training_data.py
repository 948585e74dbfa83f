"""The data of a training: which tasks of a collection are mixed, and how long their texts are."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Fraction, Names, NonNegative, NonNegativeFloat, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.mined import MinedNegatives
from retrieval_jax.data.scores import TeacherScores
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import NO_PROMPTS, Prompts, Vocabulary
from retrieval_jax.docids import token_sets
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.examples.cached import LAYOUT, CachedExamples
from retrieval_jax.examples.examples import TASKS, Examples, TaskFactory
from retrieval_jax.examples.mixtures import PAPER_MIXTURES, mix_tasks
from retrieval_jax.examples.targets import Targets
from retrieval_jax.examples.tasks import LabelledGroups, Typos

Task = Annotated[str, Names("a task", TASKS)]
MixtureWeights = (
    Annotated[str, Names("a row of the paper", tuple(PAPER_MIXTURES))] | Mapping[Task, NonNegativeFloat]
)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples a run is trained on, whatever the collection.

    Args:
      mixture: the weight of each task (firstp, daq, sentence, title, d2q, labelled, labelled_LABEL,
        doc2query), or a row of the generative-retrieval paper, such as '3b'.
      unlabelled: the mixture instead, where the collection has no train queries; None: those tasks of
        `mixture` that have examples. Where `synthetic` names queries, half of it are these (d2q).
      unlabelled_dropout: what `token_dropout` is for the tasks of `unlabelled`, where it differs.
      curriculum: stages (steps, mixture) that come before the mixture, in order.
      input_length: tokens of a query or another text that a model reads.
      passage_length: tokens of a passage that a dual encoder or a query generator reads.
      chunk_length: tokens of a firstp or daq text.
      chunks: daq chunks of a passage.
      positives: the most positives of a query, where it comes with a group of passages: in a dual encoder's
        batch, and in a generative retriever's where `negatives` is above 0.
      negatives: the most negatives of a query in its group. Above 0, a generative retriever's objective must
        be one of models/ranking.py.
      token_dropout: for each task, the probability that a token of its input is left out, but for those of
        a prompt; drawn again in each epoch.
      typos: the probability that a query of d2q or labelled has a typo: two letters that changed places, a
        key beside the right one, another letter, one more or one less. Drawn again in each epoch, so that
        these tasks are not read from a cache. A searcher then copes better with misspelled queries.
      typo_copies: whether the typo is in a copy of the query, and the query stays as it is. A dual encoder
        then learns to score passages for the copy as for the query (DualEncoder.self_teaching_weight).
      synthetic: the name of the synthetic queries for d2q.
      mined: the name of mined negatives, which are added to those of the collection.
      scores: the name of a teacher's scores, which come with the candidates of a query. Where no mined
        negatives are named, the passages that it scored, and that do not answer the query, are negatives.
      sets: the name of set docids (`retrieval-jax sets`), which come with the candidates of a query, for a
        generative retriever's `joint_ranking` and for a lexical encoder.
      pack: how many short examples share a row of a batch, about input_length over their mean length. What
        does not fit into a row is cut. 1: each example has a row of its own.
    """

    mixture: MixtureWeights = "2a"
    unlabelled: Mapping[Task, NonNegativeFloat] | None = None
    unlabelled_dropout: Mapping[Task, Fraction] = dataclasses.field(default_factory=dict)
    curriculum: Sequence[tuple[NonNegative, MixtureWeights]] = ()
    input_length: Positive = 64
    passage_length: Positive = 128
    chunk_length: Positive = 64
    chunks: Positive = 10
    positives: Positive = 1
    negatives: NonNegative = 0
    token_dropout: Mapping[Task, Fraction] = dataclasses.field(default_factory=dict)
    typos: Fraction = 0.0
    typo_copies: bool = False
    synthetic: str | None = None
    mined: str | None = None
    scores: str | None = None
    sets: str | None = None
    pack: Positive = 1


def check_table(table: DocidTable, collection: Collection) -> None:
    """Raises UserError if docids are of another collection, or are written in another vocabulary."""
    if table.collection != collection.fingerprint:
        raise UserError(
            f"docids/{table.kind}: of another collection than {collection.folder}: `retrieval-jax docids`"
        )
    if table.vocabulary and table.vocabulary != Vocabulary(collection.vocabulary_path).checksum:
        raise UserError(
            f"docids/{table.kind}: written in another vocabulary than {collection.vocabulary_path}: "
            "`retrieval-jax docids` makes them anew"
        )


@dataclasses.dataclass(frozen=True)
class TrainDataset:
    """The examples of a collection, as a DataConfig chooses them.

    Attributes:
      config: which tasks, lengths and mixture.
      work: where the collection's synthetic queries, mined negatives, scores and cached examples lie.
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

    def __post_init__(self):
        if self.table:
            check_table(self.table, self.collection)
        if self.config.typo_copies and not (self.config.typos and self.target_type.has_copies):
            raise UserError(
                "DataConfig.typo_copies: a dual encoder alone learns from them, and needs typos: set "
                "DataConfig.typos, too, or leave it away"
            )
        lengths = {"input_length": self.config.input_length, "passage_length": self.config.passage_length}
        for (setting, length), prompt in zip(lengths.items(), self.prompts, strict=True):
            count = len(self.vocabulary.with_prompt(prompt).encode("")) if prompt else 0
            if count and count + 1 >= length:  # the end takes one
                raise UserError(
                    f"DataConfig.{setting}: {length} tokens have no room for a text after the prompt, which "
                    f"takes {count}: set a larger one, or a shorter prompt"
                )

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the collection, without a prompt."""
        return Vocabulary(self.collection.vocabulary_path)

    @property
    def _input_vocabulary(self) -> Vocabulary:
        return self.vocabulary.with_prompt(self.prompts.query)

    @functools.cached_property
    def synthetic(self) -> SyntheticQueries | None:
        """The synthetic queries that the config names; None if it names none."""
        if not self.config.synthetic:
            return None
        queries = SyntheticQueries(self.work.synthetic(self.config.synthetic))
        queries.check(self.collection)
        return queries

    @functools.cached_property
    def mined(self) -> MinedNegatives | None:
        """The mined negatives that the config names; None if it names none."""
        return MinedNegatives(self.work.negatives(self.config.mined)) if self.config.mined else None

    @functools.cached_property
    def scores(self) -> TeacherScores | None:
        """The teacher's scores that the config names; None if it names none."""
        return TeacherScores(self.work.scores(self.config.scores)) if self.config.scores else None

    @functools.cached_property
    def sets(self) -> TokenSets | None:
        """The set docids that the config names; None if it names none.

        Raises:
          UserError: they are of another collection or vocabulary.
        """
        if not self.config.sets:
            return None
        folder = self.work.sets(self.config.sets)
        return token_sets.open_for(folder, self.collection.fingerprint, self.vocabulary.checksum)

    @functools.cached_property
    def targets(self) -> Targets:
        """Makes the targets of the examples."""
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
        scores = self.scores.by_row(self.collection) if self.scores and group_size else None
        return TaskFactory(
            self.collection,
            self._input_vocabulary,
            self.synthetic,
            c.chunk_length,
            c.chunks,
            group_size,
            mined,
            scores,
            Typos(c.typos, c.typo_copies),
        )

    @property
    def labels(self) -> list[str]:
        """The tasks labelled_LABEL of the labels that the train queries have."""
        return [f"labelled_{label}" for label in sorted({q.label for q in self._tasks.queries if q.label})]

    @property
    def prefix(self) -> str:
        """COLLECTION.KIND, the prefix of the names of seqio's tasks."""
        return f"{self.collection.name}.{self.targets.name}"

    def recipe(self, task: str) -> dict:
        """All that the examples of a task depend on; it identifies their cache."""
        c = self.config
        facts = {
            "layout": LAYOUT,
            **self.collection.recipe("train"),
            "docids": self.table.fingerprint() if self.table else None,
            "vocabulary": self.vocabulary.checksum,
            "tokens": [c.chunk_length, c.chunks],
        }
        if task == "d2q" and self.synthetic:
            facts["synthetic"] = self.synthetic.fingerprint
        if self.target_type.has_groups:
            facts["candidates"] = [c.positives, c.negatives]
            if others := self.targets.features.get("other_positives"):
                facts["candidates"] += [self.targets.passage_length, others.length]
            facts["mined"] = self.mined.fingerprint if self.mined else None
            if self.scores:
                facts["scores"] = self.scores.fingerprint
            if self.sets:
                facts["sets"] = self.sets.fingerprint()
        if any(self.prompts):
            facts["prompts"] = list(self.prompts)
        if c.typo_copies:
            facts["copies"] = True
        return facts

    def computed(self, task: str) -> Examples:
        """The examples of a task, made as they are read."""
        return Examples(self._tasks.task(task), self.targets)

    def queries(self, split: str) -> tuple[Examples, list[Query]]:
        """Gives the labelled queries of a split.

        Args:
          split: train, dev or test.

        Returns:
          (examples, one for each query, with as many candidates as in training; the queries).
        """
        c = self.config
        queries = [query for query in self.collection.queries(split) if query.positives]
        answers, vocabulary = KnownAnswers(queries), self._input_vocabulary
        task = LabelledGroups(self.collection, vocabulary, queries, c.positives, c.negatives, answers)
        return Examples(task, self.targets), queries

    def examples(self, task: str) -> Examples | CachedExamples:
        """The examples of a task: read from the cache if they are in it, else made as they are read.

        Those that differ from one epoch to the next are always made: a cache holds one epoch.
        """
        computed, folder = self.computed(task), self.work.cache(f"{self.prefix}.{task}")
        if computed.draws:
            return computed
        if cached := CachedExamples.find(folder, self.recipe(task)):
            return cached
        if storage.finished(folder):
            _tell_unread(folder)
        return computed

    def mix(self, mixture: MixtureWeights) -> Mapping[str, tuple[Examples | CachedExamples, float]]:
        """{task: (its examples, its weight)}; see `mix_tasks`."""
        return mix_tasks(mixture, self.examples)

    def stages(self) -> list[tuple[int | None, Mapping]]:
        """The stages of the curriculum, and the mixture as the last one.

        Returns:
          [(its batches, None for the last, which never ends; {task: (its examples, its weight)})].

        Raises:
          UserError: a task has a weight or a token dropout, and this collection does not have the task.
        """
        return self._stages

    @functools.cached_property
    def _stages(self) -> list[tuple[int | None, Mapping]]:
        for task in self.config.token_dropout:
            if task.startswith("labelled_"):
                self._tasks.task(task)
        stages = [(steps, self.mix(mixture)) for steps, mixture in self.config.curriculum]
        return [*stages, (None, self.mix(self._mixture))]

    @property
    def makes_its_own(self) -> bool:
        """Whether the collection has no train queries, so that the mixture is `DataConfig.unlabelled`."""
        return self.config.unlabelled is not None and not self._tasks.queries

    @property
    def token_dropout(self) -> Mapping[str, float]:
        """The probability that a token of an input is left out, for each task that has one."""
        c = self.config
        return {**c.token_dropout, **c.unlabelled_dropout} if self.makes_its_own else c.token_dropout

    @property
    def _mixture(self) -> MixtureWeights:
        """The mixture that is meant for the collection, with or without train queries."""
        c = self.config
        if not self.makes_its_own:
            return c.mixture
        mixture = c.unlabelled
        if c.synthetic and "d2q" not in mixture:
            mixture = {**mixture, "d2q": sum(mixture.values())}
        told = ", ".join(f"{name} {weight:g}" for name, weight in mixture.items())
        log(f"no train queries: the collection makes its own: {told} (DataConfig.unlabelled)")
        return mixture


@functools.cache
def _tell_unread(folder: Path) -> None:
    """Logs it once for each folder."""
    log(f"{folder}: made with other settings than this run's, so it is not read: `retrieval-jax cache`")
