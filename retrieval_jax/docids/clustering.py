"""k-means on a mesh of devices: large sets stream in blocks, many small sets are clustered at once by vmap.

All distances are float32 at the highest precision of products, relative to the centroids' mean. The same
seed, vectors and mesh give the same clusters.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.mesh.partitioning import all_devices, batch_sharding

BLOCK = 1 << 14  # rows of a large set that are on the devices at once
SMALL_SET_SIZES = (
    128,
    512,
    2048,
    8192,
)  # small sets are padded to these sizes, so that few programs are compiled
IN_MEMORY_BYTES = 1 << 30  # vectors of no more bytes than this stay in memory
MAX_FITTED_ROWS = 1_000_000  # centroids of more rows are fitted on a sample of them
SAMPLE_ROWS = 100_000
ITERATIONS = 50
TOLERANCE = 1e-4  # k-means ends with an update that lowers the error by a smaller share than this
_FARTHEST = 16  # an update gives new centroids to this many empty clusters, at most
NOISE = 1e-6  # squared distances below this share of the largest squared norm are rounding errors


class _Sums(NamedTuple):
    """Sums over rows, by which centroids are updated. Points are relative to the centroids' mean."""

    points_KxE: jax.Array
    counts_K: jax.Array
    error: jax.Array  # sum of the squared distances to the nearest centroids
    largest: jax.Array  # the largest squared norm
    far_F: jax.Array  # squared distances of the farthest rows, largest first
    far_FxE: jax.Array


def _origin(centroids_KxE: jax.Array, used_K: jax.Array) -> jax.Array:
    """Returns the mean of the centroids: relative to it, squares do not round small differences away."""
    return jnp.where(used_K[:, None], centroids_KxE, 0).sum(0) / jnp.maximum(used_K.sum(), 1)


def relative_distances(x_BxE: jax.Array, centroids_KxE: jax.Array, used_K: jax.Array) -> jax.Array:
    """Computes squared distances to centroids, less the row's own squared norm, by one matrix product.

    Args:
      x_BxE: float32 rows.
      centroids_KxE: float32 centroids.
      used_K: bool, which centroids to consider.

    Returns:
      Float32 B×K; infinite for centroids that are not used. Norms are those relative to the centroids' mean.
    """
    origin = _origin(centroids_KxE, used_K)
    x, c = x_BxE - origin, centroids_KxE - origin
    dots = jnp.einsum("be,ke->bk", x, c, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(used_K, (c * c).sum(-1) - 2 * dots, jnp.inf)


def nearest(
    x_BxE: jax.Array, centroids_KxE: jax.Array, used_K: jax.Array, prices_K: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Finds the nearest centroid of each row, without an array of B×K×E.

    Args:
      x_BxE: float32 rows.
      centroids_KxE: float32 centroids.
      used_K: bool, which centroids to consider.
      prices_K: float32, what squared distances are lessened by; see balanced.py.

    Returns:
      (int32 B: index of the nearest centroid; float32 B: the squared distance to it, less its price).
    """
    scores = relative_distances(x_BxE, centroids_KxE, used_K) - prices_K
    norm_B = ((x_BxE - _origin(centroids_KxE, used_K)) ** 2).sum(-1)
    return scores.argmin(-1).astype(jnp.int32), jnp.maximum(scores.min(-1) + norm_B, 0)


def _seed(key: jax.Array, x_SxE: jax.Array, weight_S: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Chooses centroids by k-means++ (Arthur & Vassilvitskii 2007): (centroids K×E, bool K: which are used).

    Rows of weight 0 are padding. If there are fewer distinct rows than k, the last centroids are not used.
    """

    def pick(distances_S, key):
        chances = weight_S * distances_S
        row = jax.random.categorical(key, jnp.log(chances))
        point = x_SxE[row]
        return jnp.minimum(distances_S, ((x_SxE - point) ** 2).sum(-1)), (point, chances[row] > 0)

    infinite = jnp.full(len(x_SxE), jnp.finfo(jnp.float32).max)
    return jax.lax.scan(pick, infinite, jax.random.split(key, k))[1]


def _step(x_BxE: jax.Array, weight_B: jax.Array, centroids_KxE: jax.Array, used_K: jax.Array) -> _Sums:
    codes, distances = nearest(x_BxE, centroids_KxE, used_K)
    x = x_BxE - _origin(centroids_KxE, used_K)
    # Sums as a product of matrices, which repeats exactly on accelerators, unlike scattered additions.
    chosen_BxK = jax.nn.one_hot(codes, len(centroids_KxE)) * weight_B[:, None]
    points = jnp.einsum("bk,be->ke", chosen_BxK, x, precision=jax.lax.Precision.HIGHEST)
    far, rows = jax.lax.top_k(
        jnp.where(weight_B > 0, distances, -1), min(_FARTHEST, len(centroids_KxE), len(x))
    )
    largest = (weight_B * (x * x).sum(-1)).max()
    return _Sums(points, chosen_BxK.sum(0), (distances * weight_B).sum(), largest, far, x_BxE[rows])


def _add(a: _Sums, b: _Sums) -> _Sums:
    far, rows = jax.lax.top_k(jnp.concatenate([a.far_F, b.far_F]), len(a.far_F))
    return _Sums(
        *(one + other for one, other in zip(a[:3], b[:3], strict=True)),
        jnp.maximum(a.largest, b.largest),
        far,
        jnp.concatenate([a.far_FxE, b.far_FxE])[rows],
    )


def _update(
    centroids_KxE: jax.Array, used_K: jax.Array, sums: _Sums
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves centroids to their clusters' means, and empty clusters to the rows that are farthest from theirs.

    Returns:
      (centroids K×E; bool K: which are used; whether k-means has converged).
    """
    full = sums.counts_K > 0
    means = sums.points_KxE / jnp.maximum(sums.counts_K, 1)[:, None] + _origin(centroids_KxE, used_K)
    moved = jnp.where(full[:, None], means - centroids_KxE, 0)
    gain = (sums.counts_K * (moved**2).sum(-1)).sum()
    place = jnp.cumsum(~full) - 1  # which of the farthest rows an empty cluster takes
    far = sums.far_F[jnp.clip(place, 0, len(sums.far_F) - 1)]
    reseeded = ~full & (place < len(sums.far_F)) & (far > NOISE * sums.largest)
    points = sums.far_FxE[jnp.clip(place, 0, len(sums.far_F) - 1)]
    centroids = jnp.where(reseeded[:, None], points, centroids_KxE + moved)
    return centroids, full | reseeded, (gain <= TOLERANCE * sums.error) & ~reseeded.any()


@functools.partial(jax.jit, static_argnames="k")
def _cluster(seed, spans_Gx2, x_GxSxE, weight_GxS, k: int) -> tuple[jax.Array, jax.Array]:
    """Runs k-means on G padded sets of S rows at once: (centroids G×K×E, codes G×S)."""

    def one(span, x, weight):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), span[0]), span[1])

        def again(state):
            i, _, _, done = state
            return (i < ITERATIONS) & ~done

        def body(state):
            i, centroids, used, _ = state
            return i + 1, *_update(centroids, used, _step(x, weight, centroids, used))

        start = (0, *_seed(key, x, weight, k), False)
        _, centroids, used, _ = jax.lax.while_loop(again, body, start)
        return centroids, nearest(x, centroids, used)[0]

    return jax.vmap(one)(spans_Gx2, x_GxSxE, weight_GxS)


_first = functools.partial(jax.jit, static_argnames="k")(
    lambda seed, x, weight, k: _seed(jax.random.key(seed), x, weight, k)
)
_pass = jax.jit(_step)
_more = jax.jit(lambda sums, *args: _add(sums, _step(*args)))
_means = jax.jit(_update)
_nearest = jax.jit(nearest)


def blocks(
    vectors: np.ndarray, rows: np.ndarray, size: int, mesh: Mesh
) -> Iterator[tuple[jax.Array, jax.Array, int]]:
    """Yields vectors in blocks that lie on a mesh, divided over its `data` axis.

    Args:
      vectors: N×E of any float type, maybe mapped from a file.
      rows: int, the rows of `vectors` to yield, in their order.
      size: rows of a block, rounded up to a multiple of the mesh's `data` axis.
      mesh: the devices.

    Yields:
      (x_BxE: float32, the last block padded with 0; weight_B: float32, 1 for a row and 0 for padding; the
      number of rows).
    """
    size, place = round_up(size, mesh.shape["data"]), batch_sharding(mesh)
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        x = np.zeros((size, vectors.shape[1]), np.float32)
        x[: len(chunk)] = vectors[chunk]
        weight = (np.arange(size) < len(chunk)).astype(np.float32)
        yield jax.device_put(x, place), jax.device_put(weight, place), len(chunk)


def block_size(k: int) -> int:
    """Returns how many rows to process at once: their distances to k centroids take at most 256 MB."""
    return max(min(BLOCK, (1 << 26) // k), 1 << 10)


def stream(vectors: np.ndarray, rows: np.ndarray, k: int, mesh: Mesh) -> Callable[[], Iterable]:
    """Returns a function that gives the blocks of vectors again and again; few vectors stay on the devices.

    Args:
      vectors: see `blocks`.
      rows: see `blocks`.
      k: number of clusters, by which a block's size is chosen.
      mesh: the devices.
    """
    read = functools.partial(blocks, vectors, rows, block_size(k), mesh)
    if 4 * len(rows) * vectors.shape[1] > IN_MEMORY_BYTES:
        return read
    kept = list(read())
    return lambda: kept


def sample(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Returns `size` random rows, in their order; all rows if there are no more."""
    if len(rows) <= size:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False))]


def kmeans(
    vectors: np.ndarray,
    k: int,
    seed: int,
    rows: np.ndarray | None = None,
    mesh: Mesh | None = None,
    report: Callable[[str], object] = lambda text: None,
) -> np.ndarray:
    """Clusters vectors: k-means++, then Lloyd's iterations.

    More than a million rows are clustered by a sample of 100,000 (as in Pradeep et al. 2023).

    Args:
      vectors: N×E of any float type, maybe mapped from a file.
      k: number of clusters.
      seed: seed of all random choices.
      rows: int, the rows of `vectors` to cluster; None for all.
      mesh: the devices to compute on; None for all devices.
      report: is called with the iteration, as text.

    Returns:
      Centroids, float32 K×E. K is below k if there are fewer distinct vectors.
    """
    mesh = mesh or all_devices()
    rows = np.arange(len(vectors)) if rows is None else rows
    k = min(k, len(rows))
    if len(rows) > MAX_FITTED_ROWS:
        rows = sample(rows, max(SAMPLE_ROWS, 64 * k), seed)
    few = sample(rows, max(BLOCK, 4 * k), seed)
    x, weight, _ = next(blocks(vectors, few, max(len(few), BLOCK), mesh))
    centroids, used = _first(np.uint32(seed), x, weight, k)
    read = stream(vectors, rows, k, mesh)

    def read_all() -> _Sums:
        sums = None
        for x, weight, _ in read():
            # Waits for the block before: no more than two are in memory.
            jax.block_until_ready(sums)
            state = (x, weight, centroids, used)
            sums = _pass(*state) if sums is None else _more(sums, *state)
        return sums

    for iteration in range(ITERATIONS):
        report(f"iteration {iteration + 1}")
        centroids, used, done = _means(centroids, used, read_all())
        if done:
            break
    return np.asarray(centroids)[np.asarray(read_all().counts_K) > 0]


def assign(
    vectors: np.ndarray,
    centroids_KxE: np.ndarray,
    rows: np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Assigns vectors to the nearest of K centroids, in blocks that stream through the devices.

    Args:
      vectors: N×E of any float type, maybe mapped from a file.
      centroids_KxE: float32 centroids.
      rows: int, the rows of `vectors` to assign; None for all.
      mesh: the devices to compute on; None for all devices.

    Returns:
      The centroid of each of `rows`, in the smallest unsigned type.
    """
    mesh = mesh or all_devices()
    rows = np.arange(len(vectors)) if rows is None else rows
    codes = np.empty(len(rows), np.min_scalar_type(len(centroids_KxE) - 1))
    used = np.ones(len(centroids_KxE), bool)
    first = 0
    for x, _, count in blocks(vectors, rows, block_size(len(used)), mesh):
        codes[first : first + count] = np.asarray(_nearest(x, centroids_KxE, used)[0])[:count]
        first += count
    return codes


def kmeans_many(
    vectors: np.ndarray, sets: list[np.ndarray], spans: list[tuple[int, int]], k: int, seed: int, mesh: Mesh
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Clusters many small sets of vectors, several at once.

    Args:
      vectors: N×E of any float type, in memory.
      sets: the rows of `vectors` in each set, at most SMALL_SET_SIZES[-1].
      spans: two numbers for each set, which together with the seed choose its random numbers.
      k: number of clusters of a set.
      seed: seed of all random choices.
      mesh: the devices to compute on, over whose `data` axis the sets are divided.

    Yields:
      (index of the set; its centroids, float32 k×E, some of which may have no rows; the centroid of each of
      its rows).
    """
    sizes = np.array(SMALL_SET_SIZES)[np.searchsorted(SMALL_SET_SIZES, [len(rows) for rows in sets])]
    place = batch_sharding(mesh)
    for size in np.unique(sizes):
        group = round_up(2 * BLOCK // size, mesh.shape["data"])
        members = np.flatnonzero(sizes == size)
        for first in range(0, len(members), group):
            chunk = members[first : first + group]
            rows, weight = np.zeros((group, size), np.int64), np.zeros((group, size), np.float32)
            keys = np.zeros((group, 2), np.uint32)
            for g, member in enumerate(chunk):
                count = len(sets[member])
                rows[g, :count], weight[g, :count], keys[g] = sets[member], 1, spans[member]
            x = np.asarray(vectors[rows], np.float32)
            args = (jax.device_put(value, place) for value in (keys, x, weight))
            centroids, codes = map(np.asarray, _cluster(np.uint32(seed), *args, k))
            for g, member in enumerate(chunk):
                yield member, centroids[g], codes[g, : len(sets[member])]
