"""A collection on disk: TFDS records with random access (ArrayRecord), a vocabulary and a manifest.

    collection/manifest.json
    collection/ids.arrow                passage ids by row
    collection/copies.npy               passages whose text is an earlier one's; see copies.py
    collection/sentencepiece.model
    collection/NAME/passages/1.0.0/     split train: id, title, text
    collection/NAME/queries/1.0.0/      splits train, dev, test: id, text, passage_ids, grades,
                                        negatives, label, missing_ids, missing_grades, is_passage

Any TFDS program reads the records; here they are read without TensorFlow.
"""

import bisect
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data import copies, parallel
from retrieval_jax.data.collection import Passage, Query

VERSION = "1.0.0"
_PASSAGE = ("id", "title", "text")
_BATCH = 1024  # records read at once
_FEW = 8  # up to so many are read one after the other, which is then faster
_QUERIES = 1 << 17  # in a shard


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file of records to write: what a worker needs to do it."""

    path: Path
    features: object  # tfds.features.FeaturesDict
    records: Callable[[], Iterable[dict]]


def write_dataset(
    folder: Path,
    name: str,
    config: str,
    features: Mapping[str, object],
    splits: Mapping[str, Sequence[Callable[[], Iterable[dict]]]],
    beam_options: Sequence[str] = (),
) -> dict[str, int]:
    """Writes the TFDS dataset NAME/CONFIG, its records in the order in which they are given.

    Args:
      folder: the files go to folder/name/config/1.0.0, which must not exist.
      name: the name of the dataset.
      config: the name of its configuration.
      features: name -> tfds feature.
      splits: split -> one callable for each shard (a file), which returns the shard's records. Several shards
        are written by several processes, so their callables must be picklable; a single one is written in
        this process.
      beam_options: flags of a Beam runner that writes the shards instead of this machine.

    Returns:
      Split -> its number of records.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    target = folder / name / config / VERSION
    target.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    files = {
        split: [target / f"{name}-{split}.array_record-{i:05}-of-{len(some):05}" for i in range(len(some))]
        for split, some in splits.items()
    }
    shards = [
        _Shard(path, features, records)
        for split in splits
        for path, records in zip(files[split], splits[split], strict=True)
    ]
    several = len(shards) > len(splits)
    if several and beam_options:
        parallel.run_on_beam(_write_shard, shards, beam_options)
    elif several:
        parallel.map_jobs(_write_shard, shards, f"writing {config}")
    else:
        for shard in shards:
            _write_shard(shard)

    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(name, tfds.core.Version(VERSION), str(target), "", config_name=config),
        features=features,
        disable_shuffling=True,
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(target, dataset_name=name, filetype_suffix="array_record")
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[_count(path) for path in some],
            num_bytes=sum(map(paths.size, some)),
            filename_template=template,
        )
        for split, some in files.items()
    ]
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(target)
    return {split.name: split.num_examples for split in infos}


def _write_shard(shard: _Shard) -> None:
    """Writes one file completely or not at all, as TFDS would write it."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(shard.features.get_serialized_info())
    tmp = shard.path.with_name(f".{shard.path.name}")
    writer = ArrayRecordWriter(str(tmp), "group_size:1")  # each record can be read alone
    for record in shard.records():
        writer.write(serializer.serialize_example(shard.features.encode_example(record)))
    writer.close()
    tmp.rename(shard.path)


def _count(path: Path) -> int:
    """Returns the number of records in a file."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    return count


class Records:
    """Random access to the records of a split that `write_dataset` wrote, from any thread.

    TFDS's own data source starts threads for each read and supports every feature. It takes about a
    millisecond for a record, and this class some twenty microseconds.

    Args:
      folder: the folder of the dataset, local or remote.
      name: the name of the dataset.
      config: the name of its configuration.
      split: the split.
    """

    def __init__(self, folder: Path, name: str, config: str, split: str):
        import tensorflow_datasets as tfds

        info = tfds.builder_from_directory(folder / name / config / VERSION).info.splits[split]
        self._files = info.filepaths
        self._ends = [*itertools.accumulate(info.shard_lengths)]
        self._readers: dict[int, object] = {}
        self._lock = threading.Lock()  # of the readers' positions

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def get(self, rows: Sequence[int]) -> list[Mapping]:
        """Reads the records at these rows.

        Args:
          rows: rows in any order; they may repeat.

        Returns:
          For each row the features by name, as TensorFlow's protocol buffers.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        places: dict[int, list[int]] = {}  # file -> which of `rows` are in it
        for place, row in enumerate(rows):
            places.setdefault(bisect.bisect_right(self._ends, row), []).append(place)
        found = [b""] * len(rows)
        with self._lock:
            for file, some in places.items():
                first = self._ends[file - 1] if file else 0
                records = self._read(file, [rows[place] - first for place in some])
                for place, record in zip(some, records, strict=True):
                    found[place] = record
        return [tf_example_pb2.Example.FromString(record).features.feature for record in found]

    def open_all(self) -> None:
        """Opens every file, so that they can be read after their folder is replaced."""
        with self._lock:
            for file in range(len(self._files)):
                self._reader(file)

    def _reader(self, file: int) -> object:
        from array_record.python.array_record_module import ArrayRecordReader

        if file not in self._readers:
            options = "readahead_buffer_size:0,max_parallelism:0"
            path = paths.ensure_local(self._files[file])  # this reader knows no buckets
            self._readers[file] = ArrayRecordReader(str(path), options)
        return self._readers[file]

    def _read(self, file: int, positions: list[int]) -> list[bytes]:
        reader = self._reader(file)
        if len(positions) > _FEW:
            return reader.read(positions)
        records = []
        for position in positions:
            reader.seek(position)
            records.append(reader.read())
        return records


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

    features = {key: tfds.features.Text() for key in _PASSAGE}
    records = [functools.partial(_passage_records, shard) for shard in shards]
    write_dataset(folder, name, "passages", features, {"train": records}, beam_options)


def _passage_records(shard: Callable[[], Iterable[Passage]]) -> Iterator[dict]:
    return ({"id": p.id, "title": p.title, "text": p.text} for p in shard())


def mark_passages(folder: Path, name: str, ids: pa.Array, queries: Sequence[Query]) -> list[Query]:
    """Finds the queries that are passages themselves (`Query.is_passage`). The passages are written already.

    Args:
      folder: the collection's folder.
      name: the name of the dataset.
      ids: the ids of the passages, by row.
      queries: the queries.

    Returns:
      The queries, in their order.
    """
    row_of_query = arrow_ids.find_rows(ids, [query.id for query in queries]).tolist()
    there = [i for i, q in enumerate(queries) if row_of_query[i] >= 0 and q.id not in q.relevant]
    rows = [row_of_query[i] for i in there]
    records, marked = Records(folder, name, "passages", "train") if there else None, [*queries]
    for first in range(0, len(there), _BATCH):
        some = records.get(rows[first : first + _BATCH])
        for i, record in zip(there[first : first + _BATCH], some, strict=True):
            passage = Passage(*(_text(record, key) for key in _PASSAGE))
            if copies.same_text(queries[i], passage):
                marked[i] = dataclasses.replace(queries[i], is_passage=True)
    return marked


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


class Collection:
    """A finished `collection` folder, opened for reading.

    Args:
      folder: the folder, local or remote.

    Attributes:
      name: the name of its dataset.
      fingerprint: a digest of all passages, queries and judgements and their order.
      passage_count: the number of passages.
      query_counts: split -> its number of queries.
      vocabulary_path: the file of its SentencePiece model.

    Raises:
      UserError: the folder is not finished, or was made by another version of this package.
    """

    def __init__(self, folder: str | Path):
        self.folder = paths.as_path(folder)
        manifest = storage.read_manifest(folder, "import")
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self.passage_count: int = manifest["passages"]
        self.query_counts: dict[str, int] = manifest["queries"]
        self.vocabulary_path = self.folder / "sentencepiece.model"
        self._opened: dict[str, Records] = {}  # split -> its queries, after `open_all`

    @functools.cached_property
    def ids(self) -> pa.LargeStringArray:
        """The passage ids by row, mapped into memory."""
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
        return [Passage(*(_text(record, key) for key in _PASSAGE)) for record in self._passages.get(rows)]

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
