"""The vectors of a searcher on disk, as float32, bfloat16 or int8.

    vectors.npy          N×E: float32; bfloat16 as uint16, whose bits they are; or int8
    vector_scales.npy    float32 by row, for int8: the number by which a row is multiplied

Each int8 vector has its own scale, its largest absolute value / 127: no vector depends on the others, so that
a collection's vectors are converted in one pass. One scale for each dimension has no better recall.
"""

from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np

from retrieval_jax.core import npy
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.core.values import Names

DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
"""Name -> the type in the file."""
VectorDtype = Annotated[str, Names("a dtype of vectors", tuple(DTYPES))]
VECTORS, SCALES = "vectors.npy", "vector_scales.npy"
_BLOCK = 1 << 14  # rows that are converted at once


def write(folder: Path, vectors_NxE: np.ndarray, dtype: str) -> None:
    """Writes vectors in another dtype, a block of rows at a time.

    Args:
      folder: an empty folder.
      vectors_NxE: float32, finite, maybe mapped from a file.
      dtype: "bfloat16" or "int8" (float32 needs no copy of what is on disk).
    """
    N = len(vectors_NxE)
    with (folder / VECTORS).open("wb") as file, bar(f"vectors as {dtype}", N) as advance:
        npy.begin(file, DTYPES[dtype], vectors_NxE.shape)
        scales = []
        for first in range(0, N, _BLOCK):
            block_BxE = np.asarray(vectors_NxE[first : first + _BLOCK])
            if dtype == "int8":
                block_BxE, scale_B = to_int8(block_BxE)
                scales.append(scale_B)
            else:
                block_BxE = block_BxE.astype(ml_dtypes.bfloat16)
            file.write(block_BxE.tobytes())
            advance(len(block_BxE))
    if dtype == "int8":
        np.save(folder / SCALES, np.concatenate(scales))


def to_int8(vectors_NxE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds vectors to int8.

    Args:
      vectors_NxE: float32.

    Returns:
      int8 N×E, and float32 N: the scale of each row, by which it is multiplied.
    """
    scale_N = np.abs(vectors_NxE).max(axis=1) / np.float32(127)
    scale_N = np.where(scale_N > 0, scale_N, 1).astype(np.float32)
    return np.rint(vectors_NxE / scale_N[:, None]).astype(np.int8), scale_N


def read(folder: Path, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Maps vectors into memory.

    Args:
      folder: a local folder.
      dtype: the dtype that its manifest says.

    Returns:
      The vectors (float32, bfloat16 or int8, N×E), and for int8 the scales (float32, N).

    Raises:
      UserError: the files cannot be read, or do not hold what the manifest says.
    """
    hint = "delete the folder, then `retrieval-jax index`"
    try:
        vectors = np.load(folder / VECTORS, mmap_mode="r")
        scales = np.load(folder / SCALES) if dtype == "int8" else None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error}): {hint}") from None
    if vectors.dtype != DTYPES[dtype]:
        raise UserError(f"{folder / VECTORS}: holds {vectors.dtype}, and the manifest says {dtype}: {hint}")
    return (vectors.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else vectors), scales
