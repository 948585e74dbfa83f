"""NumPy's .npy files, written piece by piece: the arrays are larger than memory."""

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt


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
