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
