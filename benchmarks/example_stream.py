"""Examples a second of the D2Q mixture (the paper's row 3b): this project's stream, and plain seqio.

    python benchmarks/example_stream.py ours|seqio --source FOLDER --work WORK_DIR [--seconds 30]

FOLDER is a collection with predicted queries, made by data_scale.py; WORK_DIR holds its import, naive docids
and, for `ours`, the synthetic queries. Both tokenise on the fly and shuffle; batches of 128, 64 tokens.

- ours: what the trainer reads (DataConfig, Grain): one thread, a global permutation, seeks to any position;
- seqio: the same three tasks from the text files by seqio's own sources and preprocessors, mixed by seqio,
  with a shuffle buffer of 16,384 and as many threads as tf.data takes.

Prints one line of JSON: examples_per_second after the first batch, seconds to the first batch.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.table import DocidTable

BATCH, LENGTH = 128, 64


def ours(work: Workspace, collection: Collection, table: DocidTable) -> Iterator[dict]:
    from retrieval_jax.examples.batches import batches
    from retrieval_jax.examples.targets import DocidTargets
    from retrieval_jax.examples.training_data import DataConfig, TrainDataset

    data = DataConfig(mixture="3b", input_length=LENGTH, synthetic="doc2query")
    opened = TrainDataset(data, work, collection, DocidTargets, table)
    return batches(opened.stages(), opened.targets, {}, BATCH, seed=0)


def seqio(source: Path, collection: Collection, table: DocidTable) -> Iterator[dict]:
    """MS MARCO's ids are its line numbers, so a docid is a line number through the vocabulary."""
    import seqio
    import tensorflow as tf

    vocabulary = seqio.SentencePieceVocabulary(str(collection.vocabulary_path))
    features = {"inputs": seqio.Feature(vocabulary), "targets": seqio.Feature(vocabulary)}

    def numbered(path: Path, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        lines = tf.data.TextLineDataset(str(path)).enumerate()
        return lines.map(lambda row, text: {"inputs": text, "targets": tf.strings.as_string(row)})

    def passages(path: Path, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        def fields(line: tf.Tensor) -> dict:
            parts = tf.strings.split(line, "\t")
            return {"inputs": parts[1], "targets": parts[0]}

        return tf.data.TextLineDataset(str(path)).map(fields)

    def labelled(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        pairs = [(q.text, passage) for q in collection.queries("train") for passage in q.positives]
        texts, ids = zip(*pairs, strict=True)
        return tf.data.Dataset.from_tensor_slices({"inputs": list(texts), "targets": list(ids)})

    samples = sorted(source.glob("predicted_queries_sample*.txt"))
    readers = {f"d2q_{i}": functools.partial(numbered, path) for i, path in enumerate(samples)}
    readers |= {"firstp": functools.partial(passages, source / "collection.tsv"), "labelled": labelled}
    counts = {name: len(table.tokens_NxL) for name in readers} | {
        "labelled": collection.query_counts["train"]
    }
    for name, read in readers.items():
        seqio.TaskRegistry.add(
            f"plain_{name}",
            source=seqio.FunctionDataSource(read, ["train"], {"train": counts[name]}),
            preprocessors=[
                functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=features,
            shuffle_buffer_size=16_384,
        )
    seqio.MixtureRegistry.add("plain", [(f"plain_{name}", count) for name, count in counts.items()])
    dataset = seqio.get_dataset(
        "plain",
        {"inputs": LENGTH, "targets": table.length},
        seqio.EncDecFeatureConverter(pack=False),
        shuffle=True,
        num_epochs=None,
        seed=0,
        batch_size=BATCH,
    )
    return dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stream", choices=("ours", "seqio"))
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    work = Workspace(args.work)
    collection, table = Collection(work.collection), DocidTable.open(work.docids("naive"))

    began = time.perf_counter()
    streams = {"ours": functools.partial(ours, work), "seqio": functools.partial(seqio, args.source)}
    stream = streams[args.stream](collection, table)
    next(stream)
    started, examples = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < args.seconds:
        next(stream)
        examples += BATCH
    print(
        json.dumps({"examples_per_second": round(examples / took), "first_batch": round(started - began, 1)})
    )


if __name__ == "__main__":
    main()
