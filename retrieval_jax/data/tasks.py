"""The third noun: examples. seqio tasks of a collection, and the batches that a trainer takes from them.

An example's input is some text that should find a passage; its target names that passage: a docid's tokens
for a generative retriever, the passage's text for a dual encoder. Three tasks make inputs (after the
generative-retrieval paper, section 3.1):

    NAME.TARGET.firstp     the first tokens of each passage
    NAME.TARGET.chunks     a random chunk of each passage, another one in each epoch ("document as query")
    NAME.TARGET.queries    the labelled train queries

and NAME.TARGET is their mixture. This module imports TensorFlow: import it only to train.
"""

import functools
from collections.abc import Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from retrieval_jax.data.records import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError

SHUFFLE_BUFFER = 1 << 14


@seqio.map_over_dataset(num_seeds=1)
def random_chunk(example: dict, seed: tf.Tensor, length: int) -> dict:
    """Replaces the input's tokens by `length` consecutive ones from a random place."""
    tokens = example["inputs"]
    last = tf.maximum(tf.size(tokens) - length, 0)
    start = tf.random.stateless_uniform([], seed, 0, last + 1, tf.int32)
    return {**example, "inputs": tokens[start : start + length]}


@seqio.map_over_dataset(num_seeds=1)
def drop_tokens(example: dict, seed: tf.Tensor, rate: float) -> dict:
    """Leaves out each token of the input with probability `rate`; a chunk then reads more like a query."""
    tokens = example["inputs"]
    kept = tf.boolean_mask(tokens, tf.random.stateless_uniform(tf.shape(tokens), seed) >= rate)
    return {**example, "inputs": tokens if tf.equal(tf.size(kept), 0) else kept}


def register(
    collection: Collection,
    docids: DocidTable | None,
    rates: Mapping[str, float],
    chunk_length: int,
    drop_rates: Mapping[str, float],
) -> str:
    """Registers the tasks and their mixture with seqio (again, if need be); gives the mixture's name.

    Args:
      collection: the passages and queries.
      docids: what the targets are made of; None takes the passages' texts.
      rates: task -> its share of the mixture. Tasks at rate 0 and tasks without examples are left out.
      chunk_length: tokens of a random chunk.
      drop_rates: task -> the probability that a token of its input is left out.
    """
    text = seqio.Feature(seqio.SentencePieceVocabulary(str(collection.vocabulary_path)), add_eos=True)
    if docids:
        written = seqio.PassThroughVocabulary(docids.output_size)
        features = {"inputs": text, "targets": seqio.Feature(written, add_eos=False)}
    else:
        row = seqio.Feature(seqio.PassThroughVocabulary(collection.passage_count), add_eos=False)
        features = {"inputs": text, "targets": text, "passage": row}

    labelled = collection.query_counts.get("train", 0)
    if labelled:
        labelled = sum(len(q.positives) for q in collection.queries("train"))
    counts = {"firstp": collection.passage_count, "chunks": collection.passage_count, "queries": labelled}
    if unknown := sorted(set(rates) - set(counts)):
        raise UserError(f"rates: no task {unknown[0]!r}: the tasks are {', '.join(counts)}")

    mixture = f"{collection.name}.{docids.kind if docids else 'passages'}"
    members = []
    for task, count in counts.items():
        if not rates.get(task) or not count:
            continue
        random = [functools.partial(random_chunk, length=chunk_length)] if task == "chunks" else []
        if drop_rates.get(task):
            random.append(functools.partial(drop_tokens, rate=drop_rates[task]))
        name = f"{mixture}.{task}"
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(
                functools.partial(_examples, collection, docids, task), ["train"], {"train": count}
            ),
            preprocessors=[
                functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
                seqio.CacheDatasetPlaceholder(),
                *random,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=features,
            shuffle_buffer_size=min(count, SHUFFLE_BUFFER),  # it is filled before the first batch
        )
        members.append((name, rates[task]))
    if not members:
        raise UserError(f"{collection.folder}: no task has both a rate and examples: set --gin.train.rates")
    seqio.MixtureRegistry.remove(mixture)
    seqio.MixtureRegistry.add(mixture, members)
    return mixture


def _examples(
    collection: Collection,
    docids: DocidTable | None,
    task: str,
    split: str,
    shuffle_files: bool,
    seed: object = None,
) -> tf.data.Dataset:
    """The untokenised examples of a task: input text, target (tokens or text) and the passage's row."""

    def inputs() -> Iterator[tuple[str, int]]:
        if task != "queries":
            yield from ((p.full_text, row) for row, p in enumerate(collection.passages()))
            return
        rows = {p.id: row for row, p in enumerate(collection.passages())}
        for query in collection.queries(split):
            yield from ((query.text, rows[passage]) for passage in query.positives)

    def examples() -> Iterator[dict]:
        for text, row in inputs():
            if docids:
                tokens = docids.tokens_NxL[row]
                yield {"inputs": text, "targets": tokens[tokens > 0], "passage": [row]}
            else:
                yield {"inputs": text, "targets": collection.passage(row).full_text, "passage": [row]}

    targets = tf.TensorSpec([None], tf.int32) if docids else tf.TensorSpec([], tf.string)
    return tf.data.Dataset.from_generator(
        examples,
        output_signature={
            "inputs": tf.TensorSpec([], tf.string),
            "targets": targets,
            "passage": tf.TensorSpec([None], tf.int32),
        },
    )


def batches(
    mixture: str,
    lengths: Mapping[str, int],
    converter: seqio.FeatureConverter,
    batch_size: int,
    seed: int,
    position: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of a mixture, from the given one on: `position` counts the batches before it.

    The same seed and position always give the same batches. Each is a dict of int32 arrays of batch_size
    rows, as the converter names them.
    """
    dataset = seqio.get_dataset(
        mixture,
        lengths,
        converter,
        shuffle=True,
        num_epochs=None,
        seed=seed,
        batch_size=batch_size,
        verbose=False,
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1  # the processor's cores are for the training step
    options.deterministic = True
    yield from dataset.skip(position).prefetch(4).with_options(options).as_numpy_iterator()
