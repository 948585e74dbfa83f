"""A collection: its passages, queries and relevance judgements (qrels), and the folder that holds them.

    collection/manifest.json
    collection/ids.arrow                passage ids by row
    collection/copies.npy               passages whose text is an earlier one's; see copies.py
    collection/sentencepiece.model
    collection/NAME/passages/1.0.0/     split train: id, title, text
    collection/NAME/queries/1.0.0/      splits train, dev, test: id, text, passage_ids, grades,
                                        negatives, label, missing_ids, missing_grades, is_passage

Any TFDS program reads the records; here they are read without TensorFlow.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.records import Records, write_dataset

_BATCH = 1024  # records read at once
TRAINING_SPLITS = ("train", "dev")  # what models learn from, and what chooses among their checkpoints
_QUERIES = 1 << 17  # in a file of records


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text that can be retrieved.

    Attributes:
      id: its name, which is unique, not empty and without white space (TREC files separate columns by it).
      title: its title; may be empty.
      text: its text; may be empty if there is a title.
    """

    id: str
    title: str
    text: str

    @property
    def full_text(self) -> str:
        """Title and text as one string, as models and BM25 read them."""
        return f"{self.title}. {self.text}" if self.title else self.text


@dataclasses.dataclass(frozen=True)
class Query:
    """A question with its relevance judgements.

    Attributes:
      id: its name, unique in a split.
      text: the question.
      positives: passage id -> grade (> 0). A query that was judged without any still counts in every mean.
      negatives: ids of passages that were judged irrelevant, hardest first if the source orders them.
      label: who judged: "human", "llm", or "" if the source does not say.
      missing: like `positives`, of passages that are not in the collection (with `ON_ERROR=skip`).
      is_passage: whether the query is itself a passage of this id and text (as in ArguAna and Quora), so that
        evaluations leave it out of its own results. False if it is among its positives.
    """

    id: str
    text: str
    positives: dict[str, int]
    negatives: tuple[str, ...] = ()
    label: str = ""
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)
    is_passage: bool = False

    @property
    def relevant(self) -> dict[str, int]:
        """Passage id -> grade (> 0) of all passages that count in an evaluation, in the collection or not."""
        return {**self.positives, **self.missing}

    @property
    def judgements(self) -> dict[str, int]:
        """Passage id -> grade of all judgements, as in a file of qrels; the grade of negatives is 0."""
        return {**self.relevant, **dict.fromkeys(self.negatives, 0)}


class Collection:
    """A finished `collection` folder, opened for reading.

    Args:
      folder: the folder, local or remote.

    Attributes:
      name: the name of its dataset.
      fingerprint: a digest of all passages and their order.
      query_fingerprints: split -> a digest of its queries, their judgements and their order.
      passage_count: the number of passages.
      query_counts: split -> its number of queries.
      vocabulary_path: the file of its SentencePiece model.

    Raises:
      UserError: the folder is not finished, or was made by another version of this package.
    """

    def __init__(self, folder: str | Path):
        self.folder = paths.as_path(folder)
        manifest = storage.read_manifest(folder, "import")
        if "query_fingerprints" not in manifest:
            raise UserError(
                f"{folder}: was made by an earlier version of retrieval_jax: `retrieval-jax import` makes it "
                "again"
            )
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self.query_fingerprints: dict[str, str] = manifest["query_fingerprints"]
        self.passage_count: int = manifest["passages"]
        self.query_counts: dict[str, int] = manifest["queries"]
        self.vocabulary_path = self.folder / "sentencepiece.model"
        self._opened: dict[str, Records] = {}  # split -> its queries, after `open_all`

    def recipe(self, *splits: str) -> dict:
        """Returns the collection's part of an artefact's recipe: the fingerprints of what the artefact reads.

        A new split, or another judgement in one, makes stale only what reads that split.

        Args:
          splits: the splits whose queries the artefact reads beside the passages. A split may be missing.

        Returns:
          "collection": the fingerprint of the passages; "queries", if any are read: split -> fingerprint.
        """
        read = {split: self.query_fingerprints[split] for split in splits if split in self.query_fingerprints}
        return {"collection": self.fingerprint} | ({"queries": read} if read else {})

    @functools.cached_property
    def ids(self) -> pa.LargeStringArray:
        """The passage ids by row, mapped into memory. Raises UserError if their file cannot be read."""
        try:
            return arrow_ids.read(self.folder / "ids.arrow")
        except (OSError, ValueError) as error:
            hint = "delete the folder, then `retrieval-jax import`"
            raise UserError(f"{self.folder / 'ids.arrow'}: cannot be read ({error}): {hint}") from None

    def find_rows(self, passage_ids: Iterable[str] | pa.Array) -> np.ndarray:
        """Finds the rows of passages, best for many ids at once.

        Args:
          passage_ids: ids; they may repeat.

        Returns:
          int64, the row of each id, or -1 if there is no such passage.
        """
        return arrow_ids.find_rows(self.ids, passage_ids)

    @functools.cached_property
    def _copies(self) -> np.ndarray:
        """Int64 C×2, by row: a passage, and the first passage with the same text."""
        try:
            return np.load(paths.ensure_local(self.folder / "copies.npy"))
        except (OSError, ValueError) as error:
            hint = "delete the folder, then `retrieval-jax import`"
            raise UserError(f"{self.folder / 'copies.npy'}: cannot be read ({error}): {hint}") from None

    def first_copies(self, rows: np.ndarray) -> np.ndarray:
        """Returns for each row (-1 for none) the first row whose passage has the same text."""
        if not len(self._copies):
            return rows
        place = np.searchsorted(self._copies[:, 0], rows).clip(max=len(self._copies) - 1)
        row, first = self._copies[place].T
        return np.where(row == rows, first, rows)

    @functools.cached_property
    def first_ids(self) -> dict[str, str]:
        """The id of each passage that is a later copy -> the id of the first passage with the same text."""
        copy, first = (self.ids.take(pa.array(rows)).to_pylist() for rows in self._copies.T)
        return dict(zip(copy, first, strict=True))

    @functools.cached_property
    def _passages(self) -> Records:
        return Records(self.folder, self.name, "passages", "train")

    def get(self, rows: Sequence[int]) -> list[Passage]:
        """Reads the passages at these rows (0-based, in the source's order)."""
        return read_passages(self._passages, rows)

    def passage(self, row: int) -> Passage:
        """Reads the passage at a row."""
        return self.get([row])[0]

    def passages(self, rows: range | None = None) -> Iterator[Passage]:
        """Yields the passages of a range of rows, or all, by row."""
        rows = range(self.passage_count) if rows is None else rows
        for first in range(0, len(rows), _BATCH):
            yield from self.get(rows[first : first + _BATCH])

    def open_all(self) -> None:
        """Opens every file, so that passages and queries can be read after the folder is replaced."""
        self._passages.open_all()
        for split in self.query_counts:
            self._opened[split] = Records(self.folder, self.name, "queries", split)
            self._opened[split].open_all()

    def queries(self, split: str, rows: range | None = None) -> list[Query]:
        """Reads the judged queries of a split.

        Args:
          split: the split.
          rows: which of its queries, within their number; None for all.

        Raises:
          UserError: there is no such split.
        """
        if split not in self.query_counts:
            there = ", ".join(self.query_counts)
            raise UserError(
                f"{self.folder}: no queries of split {split!r}: choose one of {there} by --gin.SPLIT"
            )
        records = self._opened.get(split)
        if records is None:
            records = Records(self.folder, self.name, "queries", split)
        rows = range(len(records)) if rows is None else rows
        return [
            _query(record)
            for first in range(0, len(rows), _BATCH)
            for record in records.get(rows[first : first + _BATCH])
        ]


def write_passages(
    folder: Path,
    name: str,
    shards: Sequence[Callable[[], Iterable[Passage]]],
    beam_options: Sequence[str] = (),
) -> None:
    """Writes the TFDS dataset NAME/passages.

    Args:
      folder: the collection's folder.
      name: the name of the dataset.
      shards: one callable for each shard, which returns its passages; see `write_dataset`.
      beam_options: flags of a Beam runner that writes the shards instead of this machine.
    """
    import tensorflow_datasets as tfds

    features = {field: tfds.features.Text() for field in ("id", "title", "text")}
    records = [functools.partial(_passage_records, shard) for shard in shards]
    write_dataset(folder, name, "passages", features, {"train": records}, beam_options)


def _passage_records(shard: Callable[[], Iterable[Passage]]) -> Iterator[dict]:
    return ({"id": p.id, "title": p.title, "text": p.text} for p in shard())


def read_passages(records: Records, rows: Sequence[int]) -> list[Passage]:
    """Reads passages that `write_passages` wrote, by row; see `Records.get`."""
    return [Passage(*(_text(record, key) for key in ("id", "title", "text"))) for record in records.get(rows)]


def write_queries(folder: Path, name: str, queries: Mapping[str, Sequence[Query]]) -> None:
    """Writes the TFDS dataset NAME/queries.

    Args:
      folder: the collection's folder.
      name: the name of the dataset.
      queries: split -> its queries, in the order in which they are written.
    """
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    texts, grades = tfds.features.Sequence(text), tfds.features.Sequence(np.int32)
    features = {"id": text, "text": text, "passage_ids": texts, "grades": grades}
    features |= {"negatives": texts, "label": text, "missing_ids": texts, "missing_grades": grades}
    features |= {"is_passage": tfds.features.Scalar(np.int32)}
    records = {
        split: [
            functools.partial(map, _query_record, some[first : first + _QUERIES])
            for first in range(0, len(some), _QUERIES)
        ]
        for split, some in queries.items()
    }
    write_dataset(folder, name, "queries", features, records)


def _query_record(query: Query) -> dict:
    return {
        "id": query.id,
        "text": query.text,
        "passage_ids": list(query.positives),
        "grades": list(query.positives.values()),
        "negatives": list(query.negatives),
        "label": query.label,
        "missing_ids": list(query.missing),
        "missing_grades": list(query.missing.values()),
        "is_passage": int(query.is_passage),
    }


def _text(record: Mapping, key: str) -> str:
    return record[key].bytes_list.value[0].decode()


def _texts(record: Mapping, key: str) -> list[str]:
    return [text.decode() for text in record[key].bytes_list.value]


def _query(record: Mapping) -> Query:
    return Query(
        _text(record, "id"),
        _text(record, "text"),
        _grades(record, "passage_ids", "grades"),
        tuple(_texts(record, "negatives")),
        _text(record, "label"),
        _grades(record, "missing_ids", "missing_grades"),
        any(record["is_passage"].int64_list.value),
    )


def _grades(record: Mapping, ids: str, grades: str) -> dict[str, int]:
    return dict(zip(_texts(record, ids), record[grades].int64_list.value, strict=True))
