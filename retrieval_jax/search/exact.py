"""Exact vector search: all dot products, computed block by block over the devices of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import all_devices

_SCORES = 1 << 27  # float32 dot products that each device holds at once
_RESIDENT_FRACTION = 0.6  # of a device's memory that vectors may fill for good

Best = tuple[jax.Array, jax.Array]
"""rows_BxK (int32) and their dot products (float32, B×K), best first."""


@functools.partial(jax.jit, static_argnames="mesh")
def top_vectors(
    queries_BxE: jax.Array,
    block: tuple[jax.Array, ...],
    first: jax.Array,
    count: jax.Array,
    best: Best,
    mesh: Mesh,
) -> Best:
    """Finds the vectors with the largest dot products with each query, in a block and in those before it.

    Each device finds the best k of its own rows; the candidates are gathered, and the best k of them and of
    `best` are kept.

    Args:
      queries_BxE: float32, the queries' vectors, the same on every device.
      block: the vectors R×E (float32, bfloat16 or int8), their rows divided over all axes of the mesh; and of
        int8 vectors the scales (float32, R) by which they are multiplied, divided likewise.
      first: int, the row of the block's first vector.
      count: int, the number of all vectors; later rows are padding.
      best: the best of the blocks with lower rows; scores of -inf stand for nothing found.
      mesh: the mesh that holds the block.

    Returns:
      The best rows up to this block. Of equal dot products the lower row comes first.
    """
    replicated, sharded = PartitionSpec(), PartitionSpec(mesh.axis_names)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(replicated, sharded, replicated, replicated, replicated),
        out_specs=replicated,
        check_vma=False,
    )
    def search(queries_BxE, block, first, count, best):
        vectors_MxE, *scales_M = block
        vectors_MxE = vectors_MxE.astype(jnp.float32)
        M, k = len(vectors_MxE), best[0].shape[1]
        rows_M = first + jax.lax.axis_index(mesh.axis_names) * M + jnp.arange(M)

        def top_of_shard(query_E):
            # The default precision rounds to 8 bits on a TPU and to 11 on a GPU: the ranks would be those of
            # rounded vectors, and the recall of approximate searches is measured against these ranks.
            scores_M = jnp.dot(vectors_MxE, query_E, precision=jax.lax.Precision.HIGHEST)
            for scale_M in scales_M:
                scores_M *= scale_M
            scores_M = jnp.where(rows_M < count, scores_M, -jnp.inf)
            scores, places = jax.lax.top_k(scores_M, min(k, M))
            return rows_M[places], scores

        batch_size = min(max(_SCORES // M, 1), len(queries_BxE))
        found = jax.lax.map(top_of_shard, queries_BxE, batch_size=batch_size)
        found = (jax.lax.all_gather(x, mesh.axis_names, axis=1, tiled=True) for x in found)
        rows, scores = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
        scores, places = jax.lax.top_k(scores, k)  # of equal ones the first: the one with the lower row
        return jnp.take_along_axis(rows, places, axis=1), scores

    return search(queries_BxE, block, first, count, best)


class ExactSearch:
    """Vectors that are searched by dot product on the devices of a mesh, which may be of several processes.

    The vectors lie on the devices, in blocks that are divided over them. Where their memory does not hold all
    (a device reads a file that is mapped into memory as it is, if it is the host's own processor), each
    search moves one block after the other to the devices.

    Args:
      vectors_NxE: float32, bfloat16 or int8, the vectors, which may be a file mapped into memory: each device
        reads its rows.
      mesh: the mesh; None for one device.
      scales_N: float32, by which int8 vectors are multiplied.
    """

    def __init__(self, vectors_NxE: np.ndarray, mesh: Mesh | None = None, scales_N: np.ndarray | None = None):
        self.mesh = mesh or all_devices(devices=jax.local_devices()[:1])
        self.count, self.dimensions = vectors_NxE.shape
        self.arrays = (vectors_NxE,) if scales_N is None else (vectors_NxE, scales_N)
        elements = _elements(self.mesh, vectors_NxE.dtype)
        most = max(elements // max(self.dimensions, 1), 1) * self.mesh.size
        blocks = -(-self.count // most)
        rows = max(-(-self.count // (blocks * self.mesh.size)), 1)
        # An array that begins at a multiple of 64 bytes need not be copied for a processor.
        self.rows = (rows if blocks == 1 else -(-rows // 64) * 64) * self.mesh.size
        each = sum(array.nbytes for array in self.arrays) / self.mesh.size
        self.resident = each < _RESIDENT_FRACTION * _memory(self.mesh)
        self._kept: dict[int, tuple[jax.Array, ...]] = {}

    def __call__(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the vectors with the largest dot products with each query.

        Args:
          queries_BxE: float32, the queries' vectors.
          k: the number of vectors to find, at most as many as there are.

        Returns:
          Rows (int32, B×k) and their dot products (float32, B×k), best first; see `top_vectors`.
        """
        shape = len(queries_BxE), k
        nothing = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
        queries, best = multihost.make_global_arrays(self.mesh, (np.asarray(queries_BxE), nothing))
        for first in range(0, self.count, self.rows):
            block = self._block(first)
            if not self.resident:  # no more than two blocks are on the devices
                jax.block_until_ready(best)
            best = top_vectors(queries, block, first, self.count, best, self.mesh)
        rows, scores = best
        return np.asarray(rows), np.asarray(scores)

    def _block(self, first: int) -> tuple[jax.Array, ...]:
        if first in self._kept:
            return self._kept[first]
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))

        def place(array: np.ndarray) -> jax.Array:
            shape = (self.rows, *array.shape[1:])

            def shard(index: tuple[slice, ...]) -> np.ndarray:
                begin, end, _ = index[0].indices(self.rows)
                rows = array[first + begin : first + end]  # only these are read from a mapped file
                missing = end - begin - len(rows)
                return np.pad(rows, [(0, missing), *[(0, 0)] * (array.ndim - 1)]) if missing else rows

            return jax.make_array_from_callback(shape, sharding, shard)

        block = tuple(map(place, self.arrays))
        if self.resident:
            self._kept[first] = block
        return block


def _elements(mesh: Mesh, dtype: np.dtype) -> int:
    """Returns the number of elements of the vectors in a block, on each device.

    On a processor scores should stay in its cache, and so should vectors that are converted: memory for a
    larger block would be asked of the system each time, which takes three times as long as the products.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return 1 << 26
    return 1 << (24 if dtype == np.float32 else 22)


def _memory(mesh: Mesh) -> float:
    """Returns the bytes of memory of each device; for a processor, which maps files, infinity."""
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("bytes_limit", float("inf"))
