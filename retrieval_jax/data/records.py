"""A collection on disk: TFDS records with random access (ArrayRecord), a vocabulary and a manifest.

    collection/manifest.json
    collection/sentencepiece.model
    collection/NAME/passages/1.0.0/     split train: id, title, text
    collection/NAME/queries/1.0.0/      splits train, dev, test: id, text, passage_ids, grades

Any TFDS program reads the records; here they are read without TensorFlow.
"""

import contextlib
import dataclasses
import functools
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from retrieval_jax import storage
from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.errors import UserError

VERSION = "1.0.0"


def write_passages(folder: Path, name: str, passages: Iterable[Passage]) -> None:
    """Writes the TFDS dataset NAME/passages into `folder`, in the order given."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({"id": text, "title": text, "text": text})
    _store(folder, name, "passages", features, {"train": map(dataclasses.asdict, passages)})


def write_queries(folder: Path, name: str, queries: Mapping[str, list[Query]]) -> None:
    """Writes the TFDS dataset NAME/queries (split -> queries) into `folder`, in the order given."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, sequence = tfds.features.Text(), tfds.features.Sequence
    features = tfds.features.FeaturesDict(
        {"id": text, "text": text, "passage_ids": sequence(text), "grades": sequence(np.int32)}
    )

    def record(query: Query) -> dict:
        ids, grades = list(query.positives), list(query.positives.values())
        return {"id": query.id, "text": query.text, "passage_ids": ids, "grades": grades}

    _store(folder, name, "queries", features, {split: map(record, qs) for split, qs in queries.items()})


def _store(folder: Path, name: str, config: str, features, splits: Mapping[str, Iterable[dict]]) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            config=config,
            version=VERSION,
            features=features,
            split_datasets={split: enumerate(records) for split, records in splits.items()},
            data_dir=folder,
            file_format="array_record",
            disable_shuffling=True,
        )
    shutil.rmtree(folder / "downloads", ignore_errors=True)


class Collection:
    """A finished `collection` folder, opened for reading."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = storage.read_manifest(folder, "import")
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self.passage_count: int = manifest["passages"]
        self.query_counts: dict[str, int] = manifest["queries"]
        self.vocabulary_path = self.folder / "sentencepiece.model"

    def _records(self, config: str, split: str):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.folder / self.name / config / VERSION)
        return builder.as_data_source(split)

    @functools.cached_property
    def _passages(self):
        return self._records("passages", "train")

    def passage(self, row: int) -> Passage:
        """The passage at a row (0-based, in the source's order)."""
        record = self._passages[row]
        return Passage(*(record[key].decode() for key in ("id", "title", "text")))

    def passages(self) -> Iterator[Passage]:
        """All passages, by row."""
        return map(self.passage, range(self.passage_count))

    def queries(self, split: str) -> list[Query]:
        """The judged queries of a split. Raises UserError for a split that is not there."""
        if split not in self.query_counts:
            there = ", ".join(self.query_counts)
            raise UserError(
                f"{self.folder}: no queries of split {split!r}: choose one of {there} by --gin.SPLIT"
            )
        return [
            Query(
                record["id"].decode(),
                record["text"].decode(),
                dict(
                    zip((i.decode() for i in record["passage_ids"]), map(int, record["grades"]), strict=True)
                ),
            )
            for record in self._records("queries", split)
        ]
