"""Residual-quantised docids: each codebook quantises what the codebooks before it left (RQ).

TIGER (Rajput et al. 2023, section 3.1) recommends items by such docids; RIPOR (Zeng et al. 2024, section 3.2)
brought them to retrieval, with tokens of their own for each position.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.checkpoints.weights import LazyArray, read_safetensors
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar, log
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.order import order
from retrieval_jax.docids import clustering
from retrieval_jax.docids.balanced import Clusters
from retrieval_jax.docids.balanced import fit as fit_balanced
from retrieval_jax.docids.kinds import (
    DocidKind,
    DocidRequest,
    DocidResult,
    check_dimensions,
    digits_needed,
    register_docid_kind,
)
from retrieval_jax.docids.table import DocidShape
from retrieval_jax.mesh.partitioning import all_devices

FILE = "codebooks.safetensors"


@gin.configurable("residual")
@dataclasses.dataclass(frozen=True)
class Settings:
    """How codebooks are fitted, and what becomes of passages with the same codes.

    Attributes:
      shared_codes: "token": if any passages have the same codes, every docid ends with the index of its
        passage among those with its codes (TIGER, section 3.1). "list": such passages share the docid, and a
        search that finds it lists them all.
      balanced: whether codes are to be used about equally often, so that fewer passages have the same ones:
        see balanced.py. Passages that come later are encoded in the same way.
    """

    shared_codes: str = "token"
    balanced: bool = False

    def __post_init__(self):
        if self.shared_codes not in ("token", "list"):
            raise UserError(f"residual.shared_codes: no way {self.shared_codes!r}: choose 'token' or 'list'")


@dataclasses.dataclass(frozen=True)
class Codebooks:
    """L codebooks of up to V vectors.

    Attributes:
      vectors_LxVxE: float32; of each level only the first `sizes_L` vectors are used, the rest is zero.
      sizes_L: int32, below V at a level whose residuals had fewer distinct vectors.
      prices_LxV: float32, what squared distances to the vectors are lessened by; None: the nearest is chosen.
    """

    vectors_LxVxE: np.ndarray
    sizes_L: np.ndarray
    prices_LxV: np.ndarray | None = None

    def encode(
        self, vectors: np.ndarray, rows: np.ndarray | None = None, mesh: Mesh | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantises vectors, in blocks that stream through the devices.

        Args:
          vectors: N×E of any float type, maybe mapped from a file.
          rows: int, the rows of `vectors` to quantise; None for all.
          mesh: the devices to compute on; None for all devices.

        Returns:
          (codes of the smallest unsigned type, rows×L; float64 L+1: the mean squared norm of the vectors,
          then of their residuals after each level).
        """
        mesh = mesh or all_devices()
        rows = np.arange(len(vectors)) if rows is None else rows
        levels, size, _ = self.vectors_LxVxE.shape
        codes = np.empty((len(rows), levels), np.min_scalar_type(size - 1))
        errors, first = np.zeros(levels + 1), 0
        codebooks, used = jnp.asarray(self.vectors_LxVxE), np.arange(size) < self.sizes_L[:, None]
        prices = np.zeros((levels, size), np.float32) if self.prices_LxV is None else self.prices_LxV
        with bar("encoding", len(rows)) as advance:
            for x, weight, count in clustering.blocks(vectors, rows, clustering.block_size(size), mesh):
                block_codes, sums = _encode(x, weight, codebooks, used, prices)
                codes[first : first + count] = np.asarray(block_codes)[:count]
                errors += np.asarray(sums, np.float64)
                first += count
                advance(count)
        return codes, errors / max(len(rows), 1)

    def write(self, folder: Path) -> None:
        """Writes the codebooks into a docid table's folder."""
        storage.write_arrays(folder / FILE, self)

    @classmethod
    def open(cls, folder: Path) -> "Codebooks":
        """Reads the codebooks of a docid table. Raises UserError where there are none that can be read."""
        return storage.read_arrays(folder / FILE, cls, "make the docids again without EXTENDS")


@jax.jit
def _encode(x_BxE, weight_B, books_LxVxE, used_LxV, prices_LxV) -> tuple[jax.Array, jax.Array]:
    """Returns (codes B×L, the sums of squared norms before the first and after each level, L+1)."""

    def level(x, book):
        codes, _ = clustering.nearest(x, *book)
        left = x - book[0][codes]
        return left, (codes, (weight_B * (left**2).sum(-1)).sum())

    _, (codes_LxB, errors_L) = jax.lax.scan(level, x_BxE, (books_LxVxE, used_LxV, prices_LxV))
    whole = (weight_B * (x_BxE**2).sum(-1)).sum()
    return codes_LxB.T, jnp.concatenate([whole[None], errors_L])


@jax.jit
def _subtract(x_BxE, book_KxE, prices_K) -> jax.Array:
    """Returns what a codebook leaves of vectors."""
    return x_BxE - book_KxE[clustering.nearest(x_BxE, book_KxE, jnp.ones(len(book_KxE), bool), prices_K)[0]]


def fit_codebooks(
    vectors: np.ndarray,
    levels: int,
    size: int,
    seed: int,
    mesh: Mesh | None = None,
    balanced: bool = False,
) -> Codebooks:
    """Fits codebooks: k-means of the vectors, then of the residuals that each level leaves.

    Up to a million vectors are all held in memory, as float32; of more, a sample.

    Args:
      vectors: N×E of any float type, maybe mapped from a file.
      levels: number of codebooks.
      size: number of vectors of a codebook, at most.
      seed: seed of the sample and of k-means.
      mesh: the devices to compute on; None for all devices.
      balanced: see `Settings`.
    """
    mesh = mesh or all_devices()
    rows = np.arange(len(vectors))
    if len(rows) > clustering.MAX_FITTED_ROWS:
        rows = clustering.sample(rows, max(clustering.SAMPLE_ROWS, 64 * size), seed)
    residuals = np.asarray(vectors[rows], np.float32)  # a copy
    codebooks = np.zeros((levels, size, vectors.shape[1]), np.float32)
    sizes, prices = np.zeros(levels, np.int32), np.zeros((levels, size), np.float32)
    fit = fit_balanced if balanced else _fit_nearest
    with bar("codebooks", levels) as advance:
        for level in range(levels):
            report = functools.partial(advance, 0)
            clusters = fit(residuals, size, (seed + level) % (1 << 32), mesh, report)
            sizes[level] = used = len(clusters.prices_K)
            codebooks[level, :used], prices[level, :used] = clusters
            first = 0
            blocks = clustering.blocks(residuals, np.arange(len(residuals)), clustering.BLOCK, mesh)
            for x, _, count in blocks:
                residuals[first : first + count] = np.asarray(_subtract(x, *clusters))[:count]
                first += count
            advance()
    return Codebooks(codebooks, sizes, prices if balanced else None)


def _fit_nearest(vectors: np.ndarray, size: int, seed: int, mesh: Mesh, report: Callable) -> Clusters:
    centroids_KxE = clustering.kmeans(vectors, size, seed, mesh=mesh, report=report)
    return Clusters(centroids_KxE, np.zeros(len(centroids_KxE), np.float32))


def collision_indices(
    codes_NxL: np.ndarray, old_codes_OxL: np.ndarray, old_indices_O: np.ndarray
) -> np.ndarray:
    """Numbers the passages that have the same codes (int64 N), going on from the indices of old passages.

    Args:
      codes_NxL: codes of the new passages.
      old_codes_OxL: codes of passages whose indices stay.
      old_indices_O: int64, those indices.
    """
    rows, shared = order(np.concatenate([old_codes_OxL, codes_NxL]))
    is_new, starts = rows >= len(old_codes_OxL), shared < codes_NxL.shape[1]
    first = np.flatnonzero(starts)
    group = np.cumsum(starts) - 1
    highest = np.maximum.reduceat(np.r_[old_indices_O, np.full(len(codes_NxL), -1)][rows], first)
    place = np.cumsum(is_new)  # from 1, among all new ones
    place -= (place - is_new)[first][group]
    result = np.empty(len(codes_NxL), np.int64)
    result[rows[is_new] - len(old_codes_OxL)] = (highest[group] + place)[is_new]
    return result


def tokens(codes_NxL: np.ndarray, index_N: np.ndarray, digits: int, size: int) -> np.ndarray:
    """Writes docids: the codes, then the digits of the collision index in base V, without an end.

    Code v at position i is the token 2 + i·V + v: each position has embeddings E_i of its own (RIPOR, Zeng et
    al. 2024).

    Args:
      codes_NxL: codes below V.
      index_N: int64, see `collision_indices`.
      digits: number of digits of the index; all docids have L + digits tokens.
      size: V, number of vectors of a codebook.

    Returns:
      N×(L + digits) of the smallest unsigned type.
    """
    count, levels = codes_NxL.shape
    docids = np.empty((count, levels + digits), np.min_scalar_type(1 + (levels + digits) * size))
    for level in range(levels):
        docids[:, level] = codes_NxL[:, level].astype(np.int64) + 2 + level * size
    for digit in range(digits):
        position = levels + digit
        docids[:, position] = index_N // size ** (digits - 1 - digit) % size + 2 + position * size
    return docids


def codes(docids_NxL: np.ndarray, levels: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads docids that `tokens` wrote.

    Args:
      docids_NxL: the docids.
      levels: number of codebooks.
      size: V, number of vectors of a codebook.

    Returns:
      (codes N×levels of the smallest unsigned type; int64 N: the collision indices).
    """
    found = np.empty((len(docids_NxL), levels), np.min_scalar_type(size - 1))
    index_N = np.zeros(len(docids_NxL), np.int64)
    for position in range(docids_NxL.shape[1]):
        values = docids_NxL[:, position].astype(np.int64) - 2 - position * size
        if position < levels:
            found[:, position] = values
        else:
            index_N = index_N * size + values
    return found, index_N


def output_size(length: int, size: int) -> int:
    """Returns the size of the softmax for docids of `length` tokens."""
    return round_up(2 + length * size, 128)


@register_docid_kind
class Residual(DocidKind):
    """L codes of codebooks of V vectors: "rq_8x256" is L = 8, V = 256."""

    name = "rq_LxV"
    pattern = r"rq_([1-9]\d*)x([2-9]|[1-9]\d+)"
    settings = Settings
    needs_vectors = True

    def __init__(self, levels: int, size: int):
        self.levels, self.size = levels, size
        self.name = f"rq_{levels}x{size}"

    def recipe(self, settings: Settings) -> dict:
        """See DocidKind. Of codes that are not balanced it is as it was before there were balanced ones."""
        values = dataclasses.asdict(settings)
        return {"settings": values if settings.balanced else {"shared_codes": settings.shared_codes}}

    def build(self, request: DocidRequest) -> DocidResult:
        """See DocidKind."""
        books = (request.vectors, self.levels, self.size, request.seed, request.mesh)
        codebooks = fit_codebooks(*books, balanced=request.settings.balanced)
        codes_NxL, errors = codebooks.encode(request.vectors, request.rows, request.mesh)
        index_N = collision_indices(codes_NxL, codes_NxL[:0], np.zeros(0, np.int64))
        highest = int(index_N.max()) if request.settings.shared_codes == "token" else 0
        return self._result(codebooks, codes_NxL, index_N, errors, digits_needed(highest, self.size))

    def extend(self, request: DocidRequest) -> DocidResult:
        """See DocidKind. New passages get codes of the previous codebooks, and the next collision indices."""
        codebooks, table = Codebooks.open(request.previous.folder), request.previous.table
        check_dimensions(request, codebooks.vectors_LxVxE)
        codes_NxL, errors = codebooks.encode(request.vectors, request.rows, request.mesh)
        index_N = collision_indices(codes_NxL, *codes(table.tokens_NxL, self.levels, self.size))
        result = self._result(codebooks, codes_NxL, index_N, errors, table.length - self.levels)
        collisions = result.facts["collisions"]
        if collisions and request.settings.shared_codes == "token":
            log(f"{collisions} new passages share a docid: the docids of the extended table are too short")
        return result

    def _result(self, codebooks, codes_NxL, index_N, errors, digits: int) -> DocidResult:
        """Makes docids of codes and as many digits of the index; larger indices share the last docid."""
        last = self.size**digits - 1
        tokens_NxL = tokens(codes_NxL, np.minimum(index_N, last), digits, self.size)
        facts = {
            "codes": codebooks.sizes_L.tolist(),
            "reconstruction_error": (errors[1:] / max(errors[0], 1e-30)).tolist(),
            "collisions": int((index_N > last).sum()),
        }
        size = output_size(tokens_NxL.shape[1], self.size)
        return DocidResult(tokens_NxL, size, facts, codebooks.write)

    def centroids(self, folder: Path) -> dict[int, LazyArray]:
        """See DocidKind. A codebook's vectors, of which each host reads its devices' part."""
        file = read_safetensors(folder, FILE.removesuffix(".safetensors"))
        sizes, vectors_LxVxE = file["sizes_L"].read(), file["vectors_LxVxE"]
        return {
            2 + level * self.size: vectors_LxVxE.slice_layer(level, 0).resized(0, int(used))
            for level, used in enumerate(sizes)
        }

    def shape(self, passages: int, vocab_size: int) -> DocidShape:
        """See DocidKind. Where collisions get a token, one digit is taken to be enough."""
        length = self.levels + (self.settings().shared_codes == "token")
        return DocidShape(length, output_size(length, self.size), tokens_per_position=self.size)
