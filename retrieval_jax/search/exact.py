"""Exact search by vectors: the largest dot products, over all devices of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.mesh.partitioning import all_devices

_SCORES = 1 << 27  # float32 dot products that are held at once, by each device


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def top_vectors(
    queries_BxE: jax.Array, vectors_NxE: jax.Array, count: jax.Array, k: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """(rows B×k, dot products B×k) of the nearest of the first `count` (≥ k) vectors, best first.

    The vectors' rows lie over all of a mesh; each device finds its best k.
    """
    everywhere, apart = PartitionSpec(), PartitionSpec(mesh.axis_names)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(everywhere, apart, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    def search(queries_BxE, vectors_MxE, count):
        M = len(vectors_MxE)
        rows_M = jax.lax.axis_index(mesh.axis_names) * M + jnp.arange(M)

        def some(query_E):
            # A TPU's default precision rounds to 8 bits and a GPU's to 11: ranks would be of rounded vectors,
            # and other searches' recall is measured by these ranks.
            scores_M = jnp.dot(vectors_MxE, query_E, precision=jax.lax.Precision.HIGHEST)
            scores_M = jnp.where(rows_M < count, scores_M, -jnp.inf)
            scores, best = jax.lax.top_k(scores_M, min(k, M))
            return rows_M[best], scores

        at_once = max(_SCORES // M, 1)
        rows, scores = jax.lax.map(some, queries_BxE, batch_size=min(at_once, len(queries_BxE)))
        rows, scores = (jax.lax.all_gather(x, mesh.axis_names, axis=1, tiled=True) for x in (rows, scores))
        scores, best = jax.lax.top_k(scores, k)
        return jnp.take_along_axis(rows, best, axis=1), scores

    return search(queries_BxE, vectors_NxE, count)


class ExactSearch:
    """The nearest of all vectors by dot product, on all devices of a mesh (None: on one)."""

    def __init__(self, vectors_NxE: np.ndarray, mesh: Mesh | None = None):
        self.mesh = mesh or all_devices(devices=jax.local_devices()[:1])
        self.count, self.dimensions = vectors_NxE.shape
        shape = (-(-self.count // self.mesh.size) * self.mesh.size, self.dimensions)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            rows = vectors_NxE[index]  # of a mapped file, only these are read
            missing = len(range(*index[0].indices(shape[0]))) - len(rows)
            return np.pad(rows, ((0, missing), (0, 0))) if missing else np.asarray(rows)

        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        self.vectors = jax.make_array_from_callback(shape, sharding, shard)

    def __call__(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows B×k, dot products B×k), best first; k is at most the number of vectors."""
        rows, scores = top_vectors(queries_BxE, self.vectors, self.count, k, self.mesh)
        return np.asarray(rows), np.asarray(scores)
