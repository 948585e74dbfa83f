"""T5X's checkpoints, read and written without T5X: the legacy format (msgpack and zarr) and the Orbax format.

A legacy checkpoint is a folder with a msgpack file, `checkpoint`. It holds a tree whose leaves are arrays, or
name zarr arrays in the same folder. An Orbax checkpoint has its arrays in state/, an OCDBT database. From
both formats, `read` returns the parameters by T5X's names, an array a layer, also where T5X scans layers.
Both are read from disks and from buckets (gs://…).
"""

import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict

from retrieval_jax.checkpoints.weights import LazyArray, kvstore, read_ocdbt, read_tensorstore
from retrieval_jax.core.errors import UserError, first_line
from retrieval_jax.models.dual_encoder_network import split_tower
from retrieval_jax.models.stacks import STACKS

T5X_STACK_AXIS = 1  # of the layers in a scanned stack's arrays
BIAS = "relpos_bias/rel_embedding"
INLINE = 1 << 16  # bytes up to which an array is written into the msgpack file
LEGACY_VERSION = 3


def is_checkpoint(path: Path) -> bool:
    """Whether a path is the msgpack file of a legacy checkpoint, or a folder of either format."""
    if path.is_file():
        # A map of one or two entries whose first key is 'version' or 'optimizer'.
        with path.open("rb") as file:
            return bool(re.match(rb"[\x81\x82](\xa7version|\xa9optimizer)", file.read(12)))
    return (path / "checkpoint").is_file() or (path / "state").is_dir()


def newest(folder: Path) -> Path | None:
    """Finds the checkpoint_N with the greatest N in T5X's MODEL_DIR; None where there is none."""
    steps = {
        int(p.name.removeprefix("checkpoint_")): p
        for p in folder.glob("checkpoint_*")
        if p.name[11:].isdigit()
    }
    return steps[max(steps)] if steps else None


def read(path: Path) -> dict[str, LazyArray]:
    """Opens the parameters of a checkpoint.

    Returns:
      {"encoder/layers_0/mlp/wi_0/kernel": lazy array, …}.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    try:
        orbax = (path / "state").is_dir()
        arrays = read_ocdbt(path / "state", "target.") if orbax else _read_legacy(path)
    except Exception as error:  # msgpack's, TensorStore's and Flax's have no common kind
        raise UserError(
            f"{path}: not a whole checkpoint of T5X's ({first_line(error)}): fetch it again"
        ) from None
    try:
        return unscanned(arrays, T5X_STACK_AXIS)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_legacy(path: Path) -> dict[str, LazyArray]:
    folder, file = (path.parent, path) if path.is_file() else (path, path / "checkpoint")
    tree = msgpack_restore(file.read_bytes())
    target = tree["optimizer"]["target"] if "optimizer" in tree else tree["target"]

    def is_leaf(_, value: object) -> bool:
        return not isinstance(value, Mapping) or "driver" in value

    arrays = {}
    for name, leaf in flatten_dict(target, sep="/", is_leaf=is_leaf).items():
        if isinstance(leaf, Mapping):
            # Wherever it was written: they lie beside the file. Early versions have the path outside.
            where = leaf["path"] if "path" in leaf else leaf["kvstore"]["path"]
            beside = folder / str(where).rstrip("/").rpartition("/")[2]
            array = read_tensorstore({"driver": leaf["driver"], "kvstore": kvstore(beside)})
        else:
            array = LazyArray.from_numpy(np.asarray(leaf))
        arrays[name] = _bfloat16(array)
    return arrays


def _bfloat16(array: LazyArray) -> LazyArray:
    """Reads uint16 as bfloat16: version 2 wrote its bits so, and no parameter is an integer."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    if array.dtype != np.uint16:
        return array
    return LazyArray(array.shape, bfloat16, lambda index: array.read_slice(index).view(bfloat16))


def unscanned(arrays: Mapping[str, LazyArray], axis: int) -> dict[str, LazyArray]:
    """Splits the arrays of scanned stacks, which hold all layers along an axis, into an array a layer.

    T5X's scanned network has an axis of heads, where this one has a single axis of heads times head size. It
    also has a bias of distances in every layer. T5 has one for all layers, and so have checkpoints that were
    converted from a T5.

    Args:
      arrays: the parameters by name; those of stacks that are not scanned are returned as they are.
      axis: the axis of the layers.

    Raises:
      UserError: the layers have different biases of distances.
    """
    separate = {}
    for name, array in arrays.items():
        tower, bare = split_tower(name)
        stack, _, rest = bare.partition("/")
        inner, _, rest = rest.partition("/")
        if STACKS.get(stack) != inner:
            separate[name] = _matrix(name, array)
            continue
        if rest == BIAS:
            biases = array.read()
            if (biases != biases.take([0], axis)).any():
                raise UserError(f"{name}: the layers' differ, and T5 has one for all: train with one")
            separate[f"{tower}{stack}/{rest}"] = array.slice_layer(0, axis)
            continue
        for i in range(array.shape[axis]):
            layer = f"{tower}{stack}/layers_{i}/{rest}"
            separate[layer] = _matrix(layer, array.slice_layer(i, axis))
    return separate


def _matrix(name: str, array: LazyArray) -> LazyArray:
    if (
        len(array.shape) != 3
        or not name.endswith("/kernel")
        or not re.search("/(query|key|value|out)/", name)
    ):
        return array
    a, b, c = array.shape
    return array.reshaped(a * b, c) if "/out/" in name else array.reshaped(a, b * c)


def write(folder: Path, arrays: Mapping[str, LazyArray], step: int) -> None:
    """Writes a legacy checkpoint.

    T5X restores it for inference, or with `RestoreCheckpointConfig.fallback_to_scratch`: it holds no state of
    an optimizer.

    Args:
      folder: an existing folder, which T5X expects to be called checkpoint_STEP.
      arrays: the parameters by T5X's names, an array a layer.
      step: the number of training steps.
    """
    target: dict[str, object] = {}
    for name, array in arrays.items():
        if array.nbytes <= INLINE:
            target[name] = array.read()
            continue
        beside = f"target.{name.replace('/', '.')}"
        metadata = {"shape": list(array.shape), "chunks": list(array.shape)}
        metadata["compressor"] = {"id": "gzip", "level": 1}
        spec = {"driver": "zarr", "kvstore": kvstore(folder / beside), "metadata": metadata}
        dtype = tensorstore.dtype(array.dtype)
        store = tensorstore.open(spec, dtype=dtype, shape=array.shape, create=True).result()
        store.write(array.read()).result()
        place = {"driver": "file", "path": f"{beside}/"}
        target[name] = {"driver": "zarr", "kvstore": place, "metadata": metadata, "dtype": dtype.name}
    state = {"step": np.int32(step)}
    optimizer = {"target": unflatten_dict(target, sep="/"), "state": state}
    tree = {"version": LEGACY_VERSION, "optimizer": optimizer}
    (folder / "checkpoint").write_bytes(msgpack_serialize(tree))
