"""Lazy arrays: weights on disk that are read when they are needed, from safetensors files or by TensorStore.

A model of 11B parameters has 44 GB of weights. From every format each device gets its own shard, which is
read for that device alone, so no host ever holds more than its devices do.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError

Index = tuple[slice, ...]
Ranges = tuple[tuple[int, int], ...]
SHARD_BYTES = 5 << 30  # of a file, as in Hugging Face's folders


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that has not been read yet.

    Attributes:
      shape: the array's shape.
      dtype: its NumPy dtype, also one of ml_dtypes.
      read_slice: reads the part of the array that a tuple of slices, one an axis, selects.
      valid_ranges: (axis, ((start, stop), …)) where entries outside of these ranges along an axis are zeros
        that stand for missing ones, as `resized` and `placed` leave them. None where no entry is missing.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_slice: Callable[[Index], np.ndarray]
    valid_ranges: tuple[int, Ranges] | None = None

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> "LazyArray":
        """Wraps an array that is in memory."""
        return cls(array.shape, array.dtype, lambda index: array[index])

    @property
    def nbytes(self) -> int:
        """The size of the whole array in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads the whole array."""
        return np.asarray(self.read_slice((slice(None),) * len(self.shape)))

    def transposed(self) -> "LazyArray":
        """Returns the transposed matrix."""
        ranges = self.valid_ranges and (1 - self.valid_ranges[0], self.valid_ranges[1])
        return LazyArray(self.shape[::-1], self.dtype, lambda index: self.read_slice(index[::-1]).T, ranges)

    def scaled(self, factor: float) -> "LazyArray":
        """Returns the array times a number."""
        return dataclasses.replace(
            self, read_slice=lambda index: self.read_slice(index) * self.dtype.type(factor)
        )

    def reshaped(self, *shape: int) -> "LazyArray":
        """Returns the array in another shape. Reading any part of it reads the whole array."""
        return LazyArray(shape, self.dtype, lambda index: self.read().reshape(shape)[index])

    def slice_layer(self, number: int, axis: int) -> "LazyArray":
        """Returns one layer of an array that has the layers along `axis`."""

        def read(index: Index) -> np.ndarray:
            return self.read_slice((*index[:axis], slice(number, number + 1), *index[axis:])).squeeze(axis)

        return LazyArray(self.shape[:axis] + self.shape[axis + 1 :], self.dtype, read)

    def resized(self, axis: int, size: int) -> "LazyArray":
        """Returns the first `size` entries along `axis`, padded with zeros where there are fewer."""
        own = self.shape[axis]

        def read(index: Index) -> np.ndarray:
            start, stop, _ = index[axis].indices(size)
            inside = slice(min(start, own), min(stop, own))
            part = self.read_slice((*index[:axis], inside, *index[axis + 1 :]))
            missing = [(0, 0)] * len(self.shape)
            missing[axis] = (0, stop - start - (inside.stop - inside.start))
            return np.pad(part, missing)

        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        return LazyArray(shape, self.dtype, read, (axis, ((0, own),)) if own < size else None)


def stacked(layers: Sequence[LazyArray], axis: int) -> LazyArray:
    """Stacks arrays of one shape along a new axis."""
    first = layers[0]

    def read(index: Index) -> np.ndarray:
        rest = index[:axis] + index[axis + 1 :]
        return np.stack([layer.read_slice(rest) for layer in layers[index[axis]]], axis)

    return LazyArray((*first.shape[:axis], len(layers), *first.shape[axis:]), first.dtype, read)


def mean(arrays: Sequence[LazyArray]) -> LazyArray:
    """Averages arrays of one shape, in float32, which the result is, too."""
    shape = arrays[0].shape

    def read(index: Index) -> np.ndarray:
        total = sum(np.asarray(array.read_slice(index), np.float32) for array in arrays)
        return (total / len(arrays)).astype(np.float32)

    return LazyArray(shape, np.dtype(np.float32), read)


def placed(parts: Mapping[int, LazyArray], rows: int) -> LazyArray:
    """Puts matrices of one width into a taller one, whose other rows are missing.

    Args:
      parts: {the row that a matrix begins at: the matrix}; they do not overlap, and all lie in the result.
      rows: number of rows of the result.
    """
    first = next(iter(parts.values()))

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        left, right, _ = index[1].indices(first.shape[1])
        result = np.zeros((stop - start, right - left), first.dtype)
        for begin, part in parts.items():
            low, high = max(start, begin), min(stop, begin + part.shape[0])
            if low < high:
                result[low - start : high - start] = part.read_slice(
                    (slice(low - begin, high - begin), slice(left, right))
                )
        return result

    ranges: list[tuple[int, int]] = []
    for begin, part in sorted(parts.items()):
        joins = ranges and ranges[-1][1] == begin
        ranges.append((ranges.pop()[0] if joins else begin, begin + part.shape[0]))
    return LazyArray((rows, first.shape[1]), first.dtype, read, (0, tuple(ranges)))


def lazy_arrays(params: Mapping) -> dict[str, LazyArray]:
    """Wraps a model's parameters, by name; each is fetched from the devices when it is read."""
    return {
        name: LazyArray(x.shape, np.dtype(x.dtype), lambda index, x=x: np.asarray(x)[index])
        for name, x in flatten_dict(params, sep="/").items()
    }


def to_devices(array: LazyArray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Places an array on devices, with the dtype and the sharding of `like`. Each shard is read once."""

    @functools.cache
    def part(*bounds: tuple[int | None, int | None]) -> np.ndarray:
        read = array.read_slice(tuple(slice(*some) for some in bounds))
        return np.asarray(read).astype(like.dtype, copy=False)

    def of_device(index: Index) -> np.ndarray:
        return part(*((some.start, some.stop) for some in index))

    return jax.make_array_from_callback(array.shape, like.sharding, of_device)


def read_tensorstore(spec: dict) -> LazyArray:
    """Opens the array of a TensorStore specification."""
    store = tensorstore.open(spec, open=True, read=True).result()
    return LazyArray(tuple(store.shape), store.dtype.numpy_dtype, lambda index: store[index].read().result())


def read_ocdbt(folder: Path, prefix: str = "") -> dict[str, LazyArray]:
    """Opens the zarr arrays of an OCDBT database, the format that Orbax writes.

    Args:
      folder: the database.
      prefix: only arrays whose keys begin with it are opened.

    Returns:
      {name: array}, names without the prefix and with slashes in place of dots.
    """
    base = {"driver": "ocdbt", "base": kvstore(folder)}
    arrays = {}
    for key in tensorstore.KvStore.open(base).result().list().result():
        name, _, last = key.decode().rpartition("/")
        if name.startswith(prefix) and last in (".zarray", "zarr.json"):
            driver = "zarr" if last == ".zarray" else "zarr3"
            spec = {"driver": driver, "kvstore": {**base, "path": f"{name}/"}}
            arrays[name.removeprefix(prefix).replace(".", "/")] = read_tensorstore(spec)
    return arrays


def kvstore(folder: Path) -> str:
    """Returns TensorStore's address of a folder."""
    text = str(folder)
    return (text if paths.is_remote(text) else f"file://{quote(str(Path(text).resolve()))}") + "/"


def read_safetensors(folder: Path, stem: str) -> dict[str, LazyArray]:
    """Opens the arrays of folder/STEM.safetensors, or of the shards in STEM.safetensors.index.json.

    Raises:
      UserError: a file cannot be read.
    """
    index = folder / f"{stem}.safetensors.index.json"
    files = [folder / f"{stem}.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors files ({error}): fetch it again") from None
        files = [paths.join_inside(folder, name, index) for name in names]
    arrays: dict[str, LazyArray] = {}
    for path in files:
        try:
            file = safe_open(paths.ensure_local(path), framework="numpy")
            arrays |= {name: _lazy(file, name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}): fetch it again") from None
    return arrays


def _lazy(file: safe_open, name: str) -> LazyArray:
    shape = tuple(file.get_slice(name).get_shape())
    if not shape:
        scalar = file.get_tensor(name)
        return LazyArray((), scalar.dtype, lambda _: scalar)
    dtype = file.get_slice(name)[tuple(slice(0, 0) for _ in shape)].dtype
    return LazyArray(shape, dtype, lambda index: file.get_slice(name)[index])


def write_safetensors(
    folder: Path, stem: str, arrays: Mapping[str, LazyArray], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes arrays to folder/STEM.safetensors, or to shards and an index; `read_safetensors` reads both.

    No more than the arrays of one file are in memory at a time.

    Args:
      folder: an existing folder.
      stem: the name of the files.
      arrays: the arrays by name.
      shard_bytes: the size of a file, in bytes, above which the next one is begun.
    """
    shards: list[dict[str, LazyArray]] = [{}]
    room = shard_bytes
    for name, array in sorted(arrays.items()):
        if shards[-1] and array.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = array
        room -= array.nbytes
    files = [f"{stem}.safetensors"]
    if len(shards) > 1:
        files = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
            "weight_map": {name: path for path, shard in zip(files, shards, strict=True) for name in shard},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for path, shard in zip(files, shards, strict=True):
        # "pt" is what transformers looks for, whoever wrote the file.
        whole = {name: np.asarray(array.read(), order="C") for name, array in shard.items()}
        save_file(whole, folder / path, metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        (folder / path).chmod(0o666 & ~umask)  # it is written for its owner alone
