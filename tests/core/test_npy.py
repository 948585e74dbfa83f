from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import npy


@pytest.mark.parametrize("dtype", ["<f4", np.int8, np.uint16, np.int64])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (0, 4)])
def test_pieces_are_one_array(dtype, shape, tmp_path: Path):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    with (tmp_path / "array.npy").open("wb") as file:
        npy.begin(file, dtype, shape)
        for first in range(0, len(array), 2):
            file.write(array[first : first + 2].tobytes())
    read = np.load(tmp_path / "array.npy", mmap_mode="r")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("shape", [(300_000, 3), (0, 4)])
def test_zeros_take_their_space_at_once_and_are_replaced(shape, tmp_path: Path):
    path = tmp_path / "array.npy"
    array = npy.zeros(path, np.uint16, shape)
    assert path.stat().st_blocks * 512 >= array.nbytes
    assert not array.any()
    array[1::2] = 7
    array.flush()
    read = np.load(path)
    assert (read.dtype, read.shape) == (np.uint16, shape)
    np.testing.assert_array_equal(read, array)
