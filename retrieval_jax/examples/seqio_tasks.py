"""Examples as seqio tasks and mixtures, for seqio and T5X. Imports TensorFlow.

    COLLECTION.KIND.TASK    msmarco.naive.d2q, squad_dev.passages.labelled, tldr.query.doc2query, …
    COLLECTION.KIND.queries splits train, dev, test: labelled queries, each once, in their order
    COLLECTION.KIND.ROW     msmarco.naive.3b, …: the mixtures of the generative-retrieval paper

KIND is what the targets are: a kind of docids (KIND_groups: of a query's candidates), `passages` for dual
encoders, `query` for query generators.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.examples import Examples
from retrieval_jax.examples.features import Feature, Features
from retrieval_jax.examples.mixtures import PAPER_MIXTURES
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset, check_table

SHARD = 100_000  # examples of a shard, where seqio divides a task
SHUFFLE_BUFFER = 1 << 14


class ExampleSource(seqio.DataSource):
    """Numbered examples as a seqio source of one split, train; a shard is a range of numbers."""

    def __init__(self, examples: Examples):
        self.examples = examples
        super().__init__(["train"], {"train": len(examples)})

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Whether seqio may ask for any number of shards: it may."""
        return True

    def list_shards(self, split: str) -> list[str]:
        """Names of the shards."""
        return [str(shard) for shard in range(-(-len(self.examples) // SHARD))]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Makes the examples' features, untrimmed and without ends, and `example`, their number."""
        shard = shard_info or seqio.ShardInfo(0, 1)
        count = len(self.examples)
        first, end = (count * i // shard.num_shards for i in (shard.index, shard.index + 1))

        def generate() -> Iterator[Features]:
            order = np.arange(first, end)
            if shuffle:
                np.random.default_rng(seed).shuffle(order)
            for i in order.tolist():
                # What is drawn (candidates of a dual encoder) is drawn once: a cache holds one epoch.
                yield {**self.examples(i, np.random.default_rng(i)), "example": i}

        signature = _signature(self.examples)
        signature["example"] = tf.TensorSpec([], tf.int64)
        return tf.data.Dataset.from_generator(generate, output_signature=signature).repeat(num_epochs)


class QuerySource(seqio.DataSource):
    """Queries of splits as a seqio source: each query's features, its id and its text."""

    def __init__(self, splits: Mapping[str, tuple[Examples, Sequence[Query]]]):
        self.members = splits
        super().__init__([*splits], {split: len(queries) for split, (_, queries) in splits.items()})

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Whether seqio may ask for any number of shards: it may."""
        return True

    def list_shards(self, split: str) -> list[str]:
        """One shard."""
        return [split]

    def get_dataset(
        self,
        split: str,
        shuffle: bool = False,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Makes the features, untrimmed and without ends; `query`, the id; `query_pretokenized`, the text.

        In the split's order; of shard i of n, queries i, i + n, ….
        """
        examples, queries = self.members[split]
        shard = shard_info or seqio.ShardInfo(0, 1)

        def generate() -> Iterator[Features]:
            for i in range(shard.index, len(queries), shard.num_shards):
                features = examples(i, np.random.default_rng(i))
                yield {**features, "query": queries[i].id, "query_pretokenized": queries[i].text}

        signature = _signature(examples)
        signature |= {name: tf.TensorSpec([], tf.string) for name in ("query", "query_pretokenized")}
        return tf.data.Dataset.from_generator(generate, output_signature=signature).repeat(num_epochs)


def register(
    prefix: str,
    members: Mapping[str, Examples],
    rows: Mapping[str, Mapping[str, float]],
    vocabulary: Vocabulary,
) -> None:
    """Registers tasks and mixtures with seqio, in the place of earlier ones of their names.

    Args:
      prefix: COLLECTION.KIND.
      members: task -> its examples.
      rows: mixture -> {task: its share}.
      vocabulary: of the text features.
    """
    for task, examples in members.items():
        seqio.TaskRegistry.remove(f"{prefix}.{task}")
        seqio.TaskRegistry.add(
            f"{prefix}.{task}",
            source=ExampleSource(examples),
            preprocessors=[seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos_after_trim],
            output_features=_features(examples, vocabulary),
            shuffle_buffer_size=SHUFFLE_BUFFER,
        )
    for row, shares in rows.items():
        seqio.MixtureRegistry.remove(f"{prefix}.{row}")
        seqio.MixtureRegistry.add(
            f"{prefix}.{row}", [(f"{prefix}.{t}", share) for t, share in shares.items()]
        )


def register_queries(
    prefix: str,
    splits: Mapping[str, tuple[Examples, Sequence[Query]]],
    vocabulary: Vocabulary,
    metrics: Sequence[Callable] = (),
) -> str:
    """Registers the task PREFIX.queries with seqio, in the place of an earlier one of that name.

    Args:
      prefix: COLLECTION.KIND.
      splits: split -> (the examples of its queries; the queries).
      vocabulary: of the text features.
      metrics: seqio's metric functions, whose targets are the queries' ids.

    Returns:
      The name of the task.
    """
    name = f"{prefix}.queries"
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=QuerySource(splits),
        preprocessors=[seqio.preprocessors.append_eos_after_trim],
        output_features=_features(next(iter(splits.values()))[0], vocabulary),
        metric_fns=[*metrics],
        postprocess_fn=lambda output, example, is_target: example["query"].decode() if is_target else output,
    )
    return name


def register_all(work_dir: str | Path, config: DataConfig) -> list[str]:
    """Registers every task and every row of the paper that a work folder has the examples for.

    Docids of an earlier state of the collection are left out, and a line says so.

    For a module that is T5X's `MIXTURE_OR_TASK_MODULE`; the gin files of gin_configs/t5x/ need none.

    Args:
      work_dir: the work folder.
      config: gives the lengths, the sizes of groups (with negatives, docids come in groups, too) and the name
        of the synthetic queries; its mixture is not looked at.

    Returns:
      The names of the tasks and mixtures.
    """
    work = Workspace(paths.as_path(work_dir))
    collection = Collection(work.collection)
    tables = []
    for folder in storage.finished_folders(work.folder / "docids"):
        table = DocidTable.open(folder)
        try:
            check_table(table, collection)
            tables.append(table)
        except UserError as error:
            log(f"left out: {error}")
    names = []
    of_docids = [DocidTargets, *([DocidGroupTargets] if config.negatives else [])]
    of_tables = itertools.product(of_docids, tables)
    for targets, table in [(PassageTargets, None), (QueryTargets, None), *of_tables]:
        opened = TrainDataset(config, work, collection, targets, table)
        tasks = [task for task in targets.tasks if task != "d2q" or opened.synthetic]
        tasks += opened.labels if "labelled" in tasks else []
        members = {task: opened.computed(task) for task in tasks}
        members = {task: examples for task, examples in members.items() if len(examples)}
        rows = {
            row: {task: len(members[task]) for task in tasks}
            for row, tasks in PAPER_MIXTURES.items()
            if members.keys() >= set(tasks)
        }
        register(opened.prefix, members, rows, opened.vocabulary)
        names += [f"{opened.prefix}.{name}" for name in (*members, *rows)]
    return names


def _signature(examples: Examples) -> dict[str, tf.TensorSpec]:
    return {name: tf.TensorSpec([None], feature.dtype) for name, feature in examples.targets.features.items()}


def _features(examples: Examples, vocabulary: Vocabulary) -> dict[str, seqio.Feature]:
    return {
        name: seqio.Feature(
            _vocabulary(feature, vocabulary), add_eos=feature.add_eos, dtype=tf.as_dtype(feature.dtype)
        )
        for name, feature in examples.targets.features.items()
    }


def _vocabulary(feature: Feature, vocabulary: Vocabulary) -> seqio.Vocabulary:
    if feature.add_eos:  # text, in pieces
        return seqio.SentencePieceVocabulary(str(vocabulary.path))
    return seqio.PassThroughVocabulary(feature.size)
