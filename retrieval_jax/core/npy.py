"""NumPy's .npy files, written piece by piece: the arrays are larger than memory."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

_AT_ONCE = 1 << 24  # bytes


def begin(file: BinaryIO, dtype: npt.DTypeLike, shape: Sequence[int]) -> None:
    """Writes the header of an .npy file, after which the array's bytes follow in C order.

    `np.lib.format.open_memmap` makes such a file, too, but in a memory map a full disk is no error: it ends
    the process by a signal.

    Args:
      file: the file, empty and open for writing.
      dtype: of the array.
      shape: of the array.
    """
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    np.lib.format.write_array_header_1_0(file, header)


def zeros(path: Path, dtype: npt.DTypeLike, shape: Sequence[int]) -> np.memmap:
    """Writes an .npy file of zeros, which are to be replaced in any order.

    Each byte is written, so that a full disk is an error here: a file with holes, as
    `np.lib.format.open_memmap` makes it, would take its space when the array is filled.

    Args:
      path: the file.
      dtype: of the array.
      shape: of the array.

    Returns:
      The array, mapped for reading and writing.

    Raises:
      OSError: the disk is full.
    """
    missing, nothing = math.prod(shape) * np.dtype(dtype).itemsize, bytes(_AT_ONCE)
    with path.open("wb") as file:
        begin(file, dtype, shape)
        while missing:
            missing -= file.write(memoryview(nothing)[:missing])
    return np.load(path, mmap_mode="r+")
