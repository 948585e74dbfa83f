"""Exact vector search: all dot products, computed over the devices of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.mesh.partitioning import all_devices

_SCORES = 1 << 27  # float32 dot products that each device holds at once


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def top_vectors(
    queries_BxE: jax.Array, vectors_NxE: jax.Array, count: jax.Array, k: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Finds the vectors with the largest dot products with each query.

    Each device finds the best k of its own rows; the candidates are gathered, and the best k of them kept.

    Args:
      queries_BxE: float32, the queries' vectors, the same on every device.
      vectors_NxE: float32, the vectors, their rows sharded over all axes of the mesh.
      count: int, the number of vectors; later rows are padding. At least k.
      k: the number of rows to find.
      mesh: the mesh that holds the vectors.

    Returns:
      rows_BxK (int32) and their dot products (float32, B×K), best first. Of equal dot products the lower row
      comes first.
    """
    replicated, sharded = PartitionSpec(), PartitionSpec(mesh.axis_names)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(replicated, sharded, replicated),
        out_specs=replicated,
        check_vma=False,
    )
    def search(queries_BxE, vectors_MxE, count):
        M = len(vectors_MxE)
        rows_M = jax.lax.axis_index(mesh.axis_names) * M + jnp.arange(M)

        def top_of_shard(query_E):
            # The default precision rounds to 8 bits on a TPU and to 11 on a GPU: the ranks would be those of
            # rounded vectors, and the recall of approximate searches is measured against these ranks.
            scores_M = jnp.dot(vectors_MxE, query_E, precision=jax.lax.Precision.HIGHEST)
            scores_M = jnp.where(rows_M < count, scores_M, -jnp.inf)
            scores, best = jax.lax.top_k(scores_M, min(k, M))
            return rows_M[best], scores

        batch_size = min(max(_SCORES // M, 1), len(queries_BxE))
        rows, scores = jax.lax.map(top_of_shard, queries_BxE, batch_size=batch_size)
        rows, scores = (jax.lax.all_gather(x, mesh.axis_names, axis=1, tiled=True) for x in (rows, scores))
        scores, best = jax.lax.top_k(scores, k)
        return jnp.take_along_axis(rows, best, axis=1), scores

    return search(queries_BxE, vectors_NxE, count)


class ExactSearch:
    """Vectors that are spread over the devices of a mesh, to be searched by dot product.

    Args:
      vectors_NxE: float32, the vectors, which may be a file mapped into memory: each device reads its rows.
      mesh: the mesh; None for one device.
    """

    def __init__(self, vectors_NxE: np.ndarray, mesh: Mesh | None = None):
        self.mesh = mesh or all_devices(devices=jax.local_devices()[:1])
        self.count, self.dimensions = vectors_NxE.shape
        shape = (-(-self.count // self.mesh.size) * self.mesh.size, self.dimensions)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            rows = vectors_NxE[index]  # only these are read from a mapped file
            missing = len(range(*index[0].indices(shape[0]))) - len(rows)
            return np.pad(rows, ((0, missing), (0, 0))) if missing else np.asarray(rows)

        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        self.vectors = jax.make_array_from_callback(shape, sharding, shard)

    def __call__(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the vectors with the largest dot products with each query.

        Args:
          queries_BxE: float32, the queries' vectors.
          k: the number of vectors to find, at most as many as there are.

        Returns:
          Rows (int32, B×k) and their dot products (float32, B×k), best first; see `top_vectors`.
        """
        rows, scores = top_vectors(queries_BxE, self.vectors, self.count, k, self.mesh)
        return np.asarray(rows), np.asarray(scores)
