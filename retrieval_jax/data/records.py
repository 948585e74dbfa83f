"""Datasets of TFDS records (ArrayRecord): written by several processes, read by row without TensorFlow."""

import bisect
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from retrieval_jax.core import paths
from retrieval_jax.data import parallel

VERSION = "1.0.0"
_FEW = 8  # up to so many are read one after the other, which is then faster


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
