"""Arrays that are read in parts: any part is NumPy's, whatever they are made of."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.checkpoints.weights import (
    LazyArray,
    placed,
    read_safetensors,
    stacked,
    write_safetensors,
)
from retrieval_jax.core.errors import UserError

RNG = np.random.default_rng(0)
ARRAY = RNG.standard_normal((3, 5, 4)).astype(np.float32)


def slices(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[slice, ...]:
    firsts = [draw(st.integers(0, n - 1)) for n in shape]
    parts = [slice(a, draw(st.integers(a + 1, n))) for a, n in zip(firsts, shape, strict=True)]
    return tuple(slice(None) if draw(st.booleans()) else part for part in parts)


@st.composite
def derived(draw: st.DrawFn) -> tuple[LazyArray, np.ndarray, tuple[slice, ...]]:
    """A lazy array, the same by NumPy, and a part of it."""
    axis, size = draw(st.integers(0, 2)), draw(st.integers(1, 8))
    lazy, array = LazyArray.from_numpy(ARRAY), ARRAY
    how = draw(st.sampled_from(["itself", "transposed", "reshaped", "layer", "resized", "stacked", "placed"]))
    if how == "transposed":
        lazy, array = lazy.slice_layer(1, 0).transposed(), array[1].T
    elif how == "reshaped":
        lazy, array = lazy.reshaped(15, 4), array.reshape(15, 4)
    elif how == "layer":
        lazy, array = lazy.slice_layer(2, axis), array.take(2, axis)
    elif how == "resized":
        lazy = lazy.resized(axis, size)
        array = array.take(range(min(size, array.shape[axis])), axis)
        missing = [(0, 0)] * 3
        missing[axis] = (0, size - array.shape[axis])
        array = np.pad(array, missing)
    elif how == "stacked":
        lazy, array = stacked([lazy, LazyArray.from_numpy(-array)], axis), np.stack([array, -array], axis)
    elif how == "placed":
        lazy = placed(
            {
                9: lazy.slice_layer(0, 0),
                1: lazy.slice_layer(1, 0).scaled(-2),
                6: lazy.slice_layer(2, 0).resized(0, 3),
            },
            16,
        )
        assert lazy.valid_ranges == (0, ((1, 14),))
        array = np.pad(np.concatenate([-2 * ARRAY[1], ARRAY[2, :3], ARRAY[0]]), ((1, 2), (0, 0)))
        if axis:
            lazy, array = lazy.transposed(), array.T
            assert lazy.valid_ranges == (1, ((1, 14),))
    return lazy, array, slices(draw, array.shape)


@given(derived())
@settings(deadline=None, max_examples=200)
def test_any_part_is_numpys(drawn):
    lazy, array, part = drawn
    assert lazy.shape == array.shape
    np.testing.assert_array_equal(lazy.read_slice(part), array[part])
    np.testing.assert_array_equal(lazy.read(), array)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32])
def test_safetensors_in_one_file_or_several(tmp_path, dtype):
    arrays = {name: (8 * ARRAY[i]).astype(dtype) for i, name in enumerate(["a/b", "c", "d"])}
    arrays["e"] = arrays["c"].T  # not contiguous
    arrays["f"] = np.asarray(3, dtype)
    lazy = {name: LazyArray.from_numpy(array) for name, array in arrays.items()}
    for shard_bytes, files in ((1 << 20, 1), (3 * arrays["c"].nbytes, 2), (1, 5)):
        folder = tmp_path / str(files)
        folder.mkdir()
        write_safetensors(folder, "weights", lazy, shard_bytes)
        assert len(list(folder.glob("*.safetensors"))) == files
        again = read_safetensors(folder, "weights")
        assert again.keys() == arrays.keys()
        for name, array in arrays.items():
            assert again[name].dtype == dtype
            np.testing.assert_array_equal(again[name].read(), array)
            assert again[name].shape == array.shape
            if array.shape:
                np.testing.assert_array_equal(again[name].read_slice((slice(1, 3), slice(2))), array[1:3, :2])


def test_files_are_as_others_may_read_them(tmp_path):
    write_safetensors(tmp_path, "weights", {"a": LazyArray.from_numpy(ARRAY)})
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_torn_file_is_named(tmp_path):
    write_safetensors(tmp_path, "weights", {"a": LazyArray.from_numpy(ARRAY)})
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"weights\.safetensors: cannot be read .*fetch it again"):
        read_safetensors(tmp_path, "weights")


def test_an_index_names_no_file_elsewhere(tmp_path):
    for folder in ("secret", "fetched"):
        (tmp_path / folder).mkdir()
    write_safetensors(tmp_path / "secret", "weights", {"a": LazyArray.from_numpy(ARRAY)})
    for name in ("../secret/weights.safetensors", str(tmp_path / "secret" / "weights.safetensors")):
        index = json.dumps({"weight_map": {"a": name}})
        (tmp_path / "fetched" / "weights.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match=r"index\.json: names '.*', which is not in its folder"):
            read_safetensors(tmp_path / "fetched", "weights")


ON_EIGHT = """
import json
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from retrieval_jax.checkpoints.weights import LazyArray, to_devices
array = np.arange(32 * 6, dtype=np.float32).reshape(32, 6)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
told = {}
for spec in (P("data", "model"), P("model"), P()):
    read = []
    def reading(index):
        read.append(array[index].shape)
        return array[index]
    like = jax.ShapeDtypeStruct(array.shape, np.dtype("bfloat16"), sharding=NamedSharding(mesh, spec))
    placed = to_devices(LazyArray(array.shape, array.dtype, reading), like)
    assert placed.dtype == "bfloat16" and (np.asarray(placed) == array.astype("bfloat16")).all()
    told[str(spec)] = read
print(json.dumps(told))
"""


def test_devices_are_given_their_parts():
    """Each part is read once, however many devices hold it, and none is read whole that lies in parts."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    both, one, none = json.loads(done.stdout).values()
    assert sorted(both) == [[8, 3]] * 8
    assert sorted(one) == [[16, 6]] * 2  # four devices each
    assert none == [[32, 6]]
