"""Targets: what a model is trained to write or to rank for an example, as features and as a batch of them.

A generative retriever writes docids, a query generator queries; a dual encoder ranks passages.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import SetShape, TokenSets
from retrieval_jax.examples.features import COPY, SCORE, SET_IMPACTS, SET_TOKENS, Batch, Feature, Features
from retrieval_jax.examples.tasks import PADDING, Example


class Targets(abc.ABC):
    """Makes the features of an example, and a model's batch of many: one subclass a family of retrievers.

    Attributes:
      name: stands for the kind of targets in the names of seqio's tasks, as in msmarco.NAME.firstp.
      features: name of a feature -> its length and contents.
      has_groups: whether a labelled query comes with a group of candidates, not with one passage.
      has_copies: whether a query may come with a copy that has a typo.
      draws: whether a target may differ from one epoch to the next, as it is drawn.
      prompt: the tokens that come before every text in `inputs`.
      tasks: the tasks whose examples make sense with these targets, besides labelled_LABEL.
      mean_length: mean tokens of a target; None where several examples cannot share a row (packing).
    """

    name: str
    features: Mapping[str, Feature]
    has_groups = False
    has_copies = False
    draws = False
    prompt: Sequence[int] = ()
    tasks: Sequence[str] = ("firstp", "daq", "sentence", "title", "d2q", "labelled")
    mean_length: float | None = None

    @classmethod
    @abc.abstractmethod
    def of(cls, dataset) -> "Targets":
        """Makes the targets of a TrainDataset."""

    @classmethod
    @abc.abstractmethod
    def lengths(cls, config, docid_length: int | None = None) -> dict[str, int]:
        """Gives the length of each feature.

        Args:
          config: a DataConfig.
          docid_length: tokens of a docid, where docids are written.

        Returns:
          {name of a feature: its most numbers}.
        """

    def draw(self, examples: Sequence[Example], rngs: Iterable[np.random.Generator]) -> Sequence[Example]:
        """Draws what `get` is to be given, where an example has several targets: here as it is.

        Args:
          examples: as a task made them.
          rngs: for each of them the generator that drew for the task.
        """
        return examples

    @abc.abstractmethod
    def get(self, examples: Sequence[Example]) -> list[Features]:
        """Gives the features of each example, neither trimmed nor padded."""

    def __call__(self, example: Example) -> Features:
        """Gives the features of one example."""
        return self.get([example])[0]

    @staticmethod
    def to_batch(features: Batch) -> Batch:
        """Turns padded features into a model's batch, as seqio's EncDecFeatureConverter does.

        Args:
          features: int32, inputs B×S and targets B×T (or …×T), 0 is padding.

        Returns:
          Int32 arrays encoder_input_tokens B×S and decoder_target_tokens, decoder_input_tokens (the targets
          one position later, begun with 0) and decoder_loss_weights (1 for each token), each like targets.
        """
        targets = features["targets"]
        shifted = np.zeros_like(targets)
        shifted[..., 1:] = targets[..., :-1]
        return {
            "encoder_input_tokens": features["inputs"],
            "decoder_target_tokens": targets,
            "decoder_input_tokens": shifted,
            "decoder_loss_weights": (targets > 0).astype(np.int32),
        }


class DocidTargets(Targets):
    """The feature `inputs` is the text; `targets` is the passage's docid, which ends as its kind says."""

    def __init__(self, table: DocidTable, input_length: int):
        self.table = table
        self.name, self.draws = table.kind, table.has_several
        self.features = {
            "inputs": Feature(input_length, add_eos=True),
            "targets": Feature(table.length, size=table.output_size),
        }

    @classmethod
    def of(cls, dataset) -> "DocidTargets":
        """See `Targets.of`."""
        return cls(dataset.table, dataset.config.input_length)

    @classmethod
    def lengths(cls, config, docid_length: int | None = None) -> dict[str, int]:
        """See `Targets.lengths`."""
        return {"inputs": config.input_length, "targets": docid_length}

    @functools.cached_property
    def mean_length(self) -> float:
        """Mean tokens of a docid, over the first 100,000."""
        return float(np.count_nonzero(self.table.tokens_NxL[:100_000], axis=1).mean())

    def draw(self, examples: Sequence[Example], rngs: Iterable[np.random.Generator]) -> Sequence[Example]:
        """See `Targets.draw`. A passage with several docids becomes the row of one of them."""
        return draw_docids(self.table, examples, rngs)

    def get(self, examples: Sequence[Example]) -> list[Features]:
        """See `Targets.get`."""
        docids = self.table.tokens_NxL[[example.rows[0] for example in examples]]
        lengths = np.count_nonzero(docids, axis=1).tolist()
        return [
            {"inputs": example.tokens, "targets": docid[:length]}
            for example, docid, length in zip(examples, docids.tolist(), lengths, strict=True)
        ]


def draw_docids(
    table: DocidTable, examples: Sequence[Example], rngs: Iterable[np.random.Generator]
) -> Sequence[Example]:
    """Draws a docid of each passage of each example; see `Targets.draw`."""
    if not table.has_several:
        return examples
    return [
        dataclasses.replace(example, rows=[int(rng.choice(table.docids_of(row))) for row in example.rows])
        for example, rng in zip(examples, rngs, strict=True)
    ]


class QueryTargets(Targets):
    """The other way round: the feature `inputs` is the passage, `targets` is the text."""

    name = "query"
    tasks = ("doc2query",)

    def __init__(
        self, collection: Collection, vocabulary: Vocabulary, passage_length: int, query_length: int
    ):
        self.collection, self.vocabulary = collection, vocabulary
        self.features = {
            "inputs": Feature(passage_length, add_eos=True),
            "targets": Feature(query_length, add_eos=True),
        }

    @classmethod
    def of(cls, dataset) -> "QueryTargets":
        """See `Targets.of`."""
        config = dataset.config
        return cls(dataset.collection, dataset.vocabulary, config.passage_length, config.input_length)

    @classmethod
    def lengths(cls, config, docid_length: int | None = None) -> dict[str, int]:
        """See `Targets.lengths`."""
        return {"inputs": config.passage_length, "targets": config.input_length}

    def get(self, examples: Sequence[Example]) -> list[Features]:
        """See `Targets.get`."""
        passages = self.collection.get([example.rows[0] for example in examples])
        inputs = self.vocabulary.encode_all([passage.full_text for passage in passages])
        return [
            {"inputs": tokens, "targets": example.tokens}
            for tokens, example in zip(inputs, examples, strict=True)
        ]


class PassageTargets(Targets):
    """The feature `inputs` is the text; the others hold a group of candidates, positives first.

    - targets: the candidates' tokens in one row, each candidate ended and padded to `passage_length`. Where
      there are set docids, which then stand for the passages, it is one PAD each.
    - passage: the candidates' rows in the collection; PADDING where the group has fewer candidates.
    - grade: > 0 for a positive, 0 for a negative, PADDING for none.
    - other_positives: rows of positives that are not in the group, which are never negatives; PADDING.
    - copy: where queries come with copies that have typos, the copy; the text itself where there is none.
    - score: where there is a teacher, its score of each candidate, float32; NaN where it gave none.
    - set_tokens, set_impacts: where there are set docids, C × M; see `set_features`.

    A passage whose text occurs earlier in the collection has the row of the first copy, so that copies count
    as one passage.
    """

    name = "passages"
    has_groups = True
    has_copies = True

    def __init__(
        self,
        collection: Collection,
        vocabulary: Vocabulary,
        input_length: int,
        passage_length: int,
        group_size: int,
        other_positives: int = 1,
        has_scores: bool = False,
        sets: TokenSets | None = None,
        has_copies: bool = False,
        prompt: Sequence[int] = (),
    ):
        self.collection, self.vocabulary = collection, vocabulary
        self.passage_length, self.group_size = 1 if sets else passage_length, group_size
        self.other_positives, self.sets, self.prompt = other_positives, sets, prompt
        self.features = {
            "inputs": Feature(input_length, add_eos=True),
            "targets": Feature(group_size * self.passage_length, size=vocabulary.size),
            "passage": Feature(group_size, size=collection.passage_count),
            "grade": Feature(group_size, size=1 << 31),
            "other_positives": Feature(other_positives, size=collection.passage_count),
            **({SCORE: Feature(group_size, dtype="float32")} if has_scores else {}),
            **set_lengths(sets and sets.shape, group_size),
            **({COPY: Feature(input_length, add_eos=True)} if has_copies else {}),
        }

    @classmethod
    def of(cls, dataset) -> "PassageTargets":
        """See `Targets.of`."""
        config, vocabulary = dataset.config, dataset.vocabulary.with_prompt(dataset.prompts.passage)
        lengths = config.input_length, config.passage_length, config.positives + config.negatives
        others = max(dataset.most_other_positives, 1)
        given = {"has_scores": config.scores is not None, "has_copies": config.typo_copies}
        if dataset.prompts.query:
            given["prompt"] = dataset.vocabulary.encode(dataset.prompts.query)
        return cls(dataset.collection, vocabulary, *lengths, others, sets=dataset.sets, **given)

    @classmethod
    def lengths(cls, config, docid_length: int | None = None) -> dict[str, int]:
        """See `Targets.lengths`."""
        group_size = config.positives + config.negatives
        return {
            "inputs": config.input_length,
            "targets": group_size * (1 if config.sets else config.passage_length),
            "passage": group_size,
            "grade": group_size,
            "other_positives": 1,  # a collection may have more: see `most_other_positives`
            **({SCORE: group_size} if config.scores else {}),
            **({COPY: config.input_length} if config.typo_copies else {}),
        }

    @staticmethod
    def to_batch(features: Batch) -> Batch:
        """Turns padded features into a dual encoder's batch.

        Args:
          features: by the names of this class's features.

        Returns:
          Int32 arrays left_encoder_input_tokens B×S (queries), right_encoder_input_tokens B×G×P (candidates),
          passage B×G, grade B×G and other_positives B×K; where there is a teacher, score B×G, float32; where
          there are set docids, set_tokens B×G×M, and set_impacts B×G×M, float32, if they have them; where
          queries have copies, copy_encoder_input_tokens B×S.
        """
        rows, group_size = features["passage"].shape
        same = ("passage", "grade", "other_positives", SCORE)
        return {
            "left_encoder_input_tokens": features["inputs"],
            "right_encoder_input_tokens": features["targets"].reshape(rows, group_size, -1),
            **{name: features[name] for name in same if name in features},
            **{
                name: features[name].reshape(rows, group_size, -1)
                for name in (SET_TOKENS, SET_IMPACTS)
                if name in features
            },
            **({"copy_encoder_input_tokens": features[COPY]} if COPY in features else {}),
        }

    def get(self, examples: Sequence[Example]) -> list[Features]:
        """See `Targets.get`."""
        tokens_RxP = self._texts(examples)
        ends = itertools.accumulate(len(example.rows) for example in examples)
        return [
            self._features(example, tokens_RxP[end - len(example.rows) : end])
            for example, end in zip(examples, ends, strict=True)
        ]

    def _texts(self, examples: Sequence[Example]) -> np.ndarray:
        """Gives the tokens of all candidates of all examples, R×P."""
        rows = list(itertools.chain.from_iterable(example.rows for example in examples))
        if self.sets:
            return np.zeros((len(rows), 1), np.int32)
        texts = [passage.full_text for passage in self.collection.get(rows)]
        starts = itertools.accumulate([len(example.rows) for example in examples], initial=0)
        for start, example in zip(starts, examples, strict=False):
            if example.rest is not None:
                texts[start] = example.rest
        return self.vocabulary.batch(texts, self.passage_length)

    def _features(self, example: Example, tokens_RxP: np.ndarray) -> Features:
        """Gives the features of an example, of whose candidates the tokens are given."""
        missing = [PADDING] * (self.group_size - len(example.rows))
        others = self._first_copies(example.other_positives)
        scores = [*example.scores, *[math.nan] * (self.group_size - len(example.scores))]
        return {
            "inputs": example.tokens,
            "targets": [*tokens_RxP.ravel().tolist(), *[0] * (len(missing) * self.passage_length)],
            "passage": [*self._first_copies(example.rows), *missing],
            "grade": [*example.grades, *missing],
            "other_positives": [*others, *[PADDING] * (self.other_positives - len(others))],
            **({SCORE: scores} if SCORE in self.features else {}),
            **(set_features(self.sets, example.rows, self.group_size) if self.sets else {}),
            **({COPY: example.copy or example.tokens} if COPY in self.features else {}),
        }

    def _first_copies(self, rows: Sequence[int]) -> list[int]:
        return self.collection.first_copies(np.array(rows, np.int64)).tolist()


def set_lengths(sets: SetShape | None, group_size: int) -> dict[str, Feature]:
    """Gives the features that `set_features` makes; {} without sets."""
    if sets is None:
        return {}
    lengths = {SET_TOKENS: Feature(group_size * sets.size, size=np.iinfo(np.int32).max)}
    if sets.impacts:
        lengths[SET_IMPACTS] = Feature(group_size * sets.size, dtype="float32")
    return lengths


def set_features(sets: TokenSets, passages: Sequence[int], group_size: int) -> Features:
    """Gives the set docids of a group of candidates.

    Args:
      sets: those of the collection.
      passages: the rows of the candidates, `group_size` at most.
      group_size: C.

    Returns:
      set_tokens: the M tokens of each candidate's set in one row, C × M; 0 is none. set_impacts: where the
      sets have them, how much each token counts, in the units of a score.
    """
    rows, shape = np.asarray(passages, np.int64), (group_size, sets.size)
    tokens_CxM = np.zeros(shape, np.int32)
    tokens_CxM[: len(rows)] = sets.tokens_PxM[rows]
    if sets.impacts_PxM is None:
        return {SET_TOKENS: tokens_CxM.ravel().tolist()}
    impacts_CxM = np.zeros(shape, np.float32)
    impacts_CxM[: len(rows)] = sets.impacts_PxM[rows] * sets.impact_scale
    return {SET_TOKENS: tokens_CxM.ravel().tolist(), SET_IMPACTS: impacts_CxM.ravel().tolist()}
