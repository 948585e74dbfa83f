"""Residual-quantised docids: what one codebook leaves, the next one quantises (TIGER, RIPOR)."""

import dataclasses
import functools
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.order import order
from retrieval_jax.docids import clustering
from retrieval_jax.mesh.partitioning import all_devices

FILE = "codebooks.safetensors"


@gin.configurable("residual")
@dataclasses.dataclass(frozen=True)
class Settings:
    """What becomes of passages with the same codes.

    "token": if any have, every docid ends with the number within its codes (TIGER, Rajput et al. 2023,
    section 3.1); "list": they share the docid, and a search lists them all.
    """

    shared_codes: str = "token"

    def __post_init__(self):
        if self.shared_codes not in ("token", "list"):
            raise UserError(f"residual.shared_codes: no way {self.shared_codes!r}: choose 'token' or 'list'")


@dataclasses.dataclass(frozen=True)
class Codebooks:
    """One codebook a level: its first `sizes_L` vectors; the rest is padding of zeros.

    Attributes:
      vectors_LxVxE: float32.
      sizes_L: int32, below V where a level's residuals had fewer distinct vectors.
    """

    vectors_LxVxE: np.ndarray
    sizes_L: np.ndarray

    def encode(
        self, vectors: np.ndarray, rows: np.ndarray | None = None, mesh: Mesh | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes of the vectors (N×E, maybe memory-mapped) at `rows` (None: all), streaming.

        Returns:
          (codes N×L of the smallest unsigned type; float64 L+1: the mean squared norm of the vectors, then of
          what is left of them after each level).
        """
        mesh = mesh or all_devices()
        rows = np.arange(len(vectors)) if rows is None else rows
        levels, size, _ = self.vectors_LxVxE.shape
        codes = np.empty((len(rows), levels), np.min_scalar_type(size - 1))
        errors, first = np.zeros(levels + 1), 0
        books, used = jnp.asarray(self.vectors_LxVxE), np.arange(size) < self.sizes_L[:, None]
        with bar("encoding", len(rows)) as advance:
            for x, weight, count in clustering.blocks(vectors, rows, clustering.block_size(size), mesh):
                some, left = _encode(x, weight, books, used)
                codes[first : first + count] = np.asarray(some)[:count]
                errors += np.asarray(left, np.float64)
                first += count
                advance(count)
        return codes, errors / max(len(rows), 1)

    def write(self, folder: Path) -> None:
        storage.write_arrays(folder / FILE, self)

    @classmethod
    def open(cls, folder: Path) -> "Codebooks":
        """Raises UserError where the folder holds no readable codebooks."""
        return storage.read_arrays(folder / FILE, cls, "make the docids again without EXTENDS")


@jax.jit
def _encode(x_BxE, weight_B, books_LxVxE, used_LxV) -> tuple[jax.Array, jax.Array]:
    """(codes B×L, sums of squared norms L+1)."""

    def level(x, book):
        codes, _ = clustering.nearest(x, *book)
        left = x - book[0][codes]
        return left, (codes, (weight_B * (left**2).sum(-1)).sum())

    _, (codes_LxB, errors_L) = jax.lax.scan(level, x_BxE, (books_LxVxE, used_LxV))
    whole = (weight_B * (x_BxE**2).sum(-1)).sum()
    return codes_LxB.T, jnp.concatenate([whole[None], errors_L])


_subtract = jax.jit(lambda x, book: x - book[clustering.nearest(x, book, jnp.ones(len(book), bool))[0]])


def fit(vectors: np.ndarray, levels: int, size: int, seed: int, mesh: Mesh | None = None) -> Codebooks:
    """`levels` codebooks of up to `size` vectors: k-means of the vectors, then of what each level leaves.

    In memory are the vectors (N×E) that they are fitted on: all up to a million, a sample above.
    """
    mesh = mesh or all_devices()
    rows = np.arange(len(vectors))
    if len(rows) > clustering.WHOLE:
        rows = clustering.sample(rows, max(clustering.SAMPLE, 64 * size), seed)
    left = np.asarray(vectors[rows], np.float32)  # a copy
    books = np.zeros((levels, size, vectors.shape[1]), np.float32)
    sizes = np.zeros(levels, np.int32)
    with bar("codebooks", levels) as advance:
        for level in range(levels):
            note = functools.partial(advance, 0)
            book = clustering.fit(left, size, seed + level, mesh=mesh, note=note)
            books[level, : len(book)], sizes[level] = book, len(book)
            first = 0
            for x, _, count in clustering.blocks(left, np.arange(len(left)), clustering.BLOCK, mesh):
                left[first : first + count] = np.asarray(_subtract(x, book))[:count]
                first += count
            advance()
    return Codebooks(books, sizes)


def numbers(codes_NxL: np.ndarray, old_codes_OxL: np.ndarray, old_numbers_O: np.ndarray) -> np.ndarray:
    """int64 N: each passage's number among those with the same codes, going on from the old ones' numbers."""
    rows, shared = order(np.concatenate([old_codes_OxL, codes_NxL]))
    is_new, starts = rows >= len(old_codes_OxL), shared < codes_NxL.shape[1]
    first = np.flatnonzero(starts)
    group = np.cumsum(starts) - 1
    highest = np.maximum.reduceat(np.r_[old_numbers_O, np.full(len(codes_NxL), -1)][rows], first)
    place = np.cumsum(is_new)  # from 1, among all new ones
    place -= (place - is_new)[first][group]
    result = np.empty(len(codes_NxL), np.int64)
    result[rows[is_new] - len(old_codes_OxL)] = (highest[group] + place)[is_new]
    return result


def digits_needed(highest: int, base: int) -> int:
    """Digits that numbers up to `highest` take; none where 0 is the only number."""
    count = 0
    while base**count <= highest:
        count += 1
    return count


def tokens(codes_NxL: np.ndarray, numbers_N: np.ndarray, digits: int, size: int) -> np.ndarray:
    """Docids, N×(L + digits): codes, then the number's digits in base V, all of this length, without an end.

    Code v at position i is the token 2 + i·V + v (RIPOR, Zeng et al. 2024: embeddings E_i of its own for each
    position).
    """
    count, levels = codes_NxL.shape
    docids = np.empty((count, levels + digits), np.min_scalar_type(1 + (levels + digits) * size))
    for level in range(levels):
        docids[:, level] = codes_NxL[:, level].astype(np.int64) + 2 + level * size
    for digit in range(digits):
        position = levels + digit
        docids[:, position] = numbers_N // size ** (digits - 1 - digit) % size + 2 + position * size
    return docids


def codes(docids_NxL: np.ndarray, levels: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes N×levels, int64 numbers N) of docids that `tokens` made."""
    found = np.empty((len(docids_NxL), levels), np.min_scalar_type(size - 1))
    numbers_N = np.zeros(len(docids_NxL), np.int64)
    for position in range(docids_NxL.shape[1]):
        values = docids_NxL[:, position].astype(np.int64) - 2 - position * size
        if position < levels:
            found[:, position] = values
        else:
            numbers_N = numbers_N * size + values
    return found, numbers_N


def output_size(length: int, size: int) -> int:
    """Width of the softmax for docids of `length` tokens."""
    return round_up(2 + length * size, 128)
