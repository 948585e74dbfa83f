"""Balanced clusters: k-means whose clusters have about equally many vectors, by Sinkhorn's iteration.

k-means gives a few far vectors clusters of their own, and most vectors share the others. The assignment here
solves optimal transport with equal shares for all clusters and an entropy term (Cuturi 2013), as
self-labelling (Asano et al. 2020) and SwAV (Caron et al. 2020, section 3.1) do for images and RepCONC (Zhan
et al. 2022) for codes of passages. A cluster gets a price: a vector belongs to the cluster with the smallest
squared distance less the price. So K numbers are all that blocks, devices and later vectors need to share.

The weight of the entropy falls from round to round (epsilon-scaling, Schmitzer 2019), because in the end a
vector belongs to one cluster; centroids move between rounds, as in k-means. A low weight keeps prices from
following centroids that move far, so the last round is not always even: the rounds are compared.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.docids import clustering

HIGHEST = 1.0  # the first weight of the entropy, relative to the mean squared distance to the nearest one
LOWEST = 0.05  # the last one, relative to the distance that one vector of ten does not exceed: dense vectors'
QUANTILE = 0.1
ROUNDS = 20
PASSES = 5  # Sinkhorn's iterations in a round; prices go on from the round before
BALANCED = 0.95  # the last round is kept whose clusters are this even, relative to the most even ones
_LEAST = 1e-30  # of a cluster's share, whose logarithm is taken


class Clusters(NamedTuple):
    """Clusters of vectors.

    Attributes:
      centroids_KxE: float32.
      prices_K: float32, what a vector's squared distance to each centroid is lessened by; their mean is 0.
    """

    centroids_KxE: np.ndarray | jax.Array
    prices_K: np.ndarray | jax.Array


@jax.jit
def _shares(x_BxE, weight_B, clusters: Clusters, temperature) -> jax.Array:
    """Sums, for each cluster, the softmax over clusters of (price - squared distance) / temperature: K."""
    used = jnp.ones(len(clusters.prices_K), bool)
    scores_BxK = clustering.relative_distances(x_BxE, clusters.centroids_KxE, used)
    shares_BxK = jax.nn.softmax((clusters.prices_K - scores_BxK) / temperature, axis=-1)
    return (weight_B[:, None] * shares_BxK).sum(0)


@jax.jit
def _priced(clusters: Clusters, shares_K: jax.Array, temperature) -> Clusters:
    """Scales the clusters' shares to equal ones, which is to change their prices (Sinkhorn's column step)."""
    step_K = temperature * (jnp.log(shares_K.mean()) - jnp.log(jnp.maximum(shares_K, _LEAST)))
    prices_K = clusters.prices_K + step_K
    return clusters._replace(prices_K=prices_K - prices_K.mean())


@jax.jit
def _sums(x_BxE, weight_B, clusters: Clusters) -> tuple[jax.Array, jax.Array]:
    """Sums the vectors of each cluster, relative to their centroid: (K×E; how many they are, K)."""
    used = jnp.ones(len(clusters.prices_K), bool)
    code_B, _ = clustering.nearest(x_BxE, clusters.centroids_KxE, used, clusters.prices_K)
    chosen_BxK = jax.nn.one_hot(code_B, len(used)) * weight_B[:, None]
    left_BxE = x_BxE - clusters.centroids_KxE[code_B]
    sums_KxE = jnp.einsum("bk,be->ke", chosen_BxK, left_BxE, precision=jax.lax.Precision.HIGHEST)
    return sums_KxE, chosen_BxK.sum(0)


@jax.jit
def _moved(clusters: Clusters, sums_KxE: jax.Array, count_K: jax.Array) -> Clusters:
    """Moves centroids to their clusters' means; empty ones stay."""
    centroids_KxE = clusters.centroids_KxE + sums_KxE / jnp.maximum(count_K, 1)[:, None]
    return clusters._replace(centroids_KxE=centroids_KxE)


_add = jax.jit(functools.partial(jax.tree.map, jnp.add))


def _over(read: Callable, function: Callable, *args: object) -> object:
    """Adds up what a function gives for each block."""
    total = None
    for x, weight, _ in read():
        jax.block_until_ready(total)  # no more than two blocks are in memory
        part = function(x, weight, *args)
        total = part if total is None else _add(total, part)
    return jax.block_until_ready(total)  # simulated devices must not get ahead of one another


def balance(read: Callable, clusters: Clusters, temperature: float, passes: int) -> Clusters:
    """Runs Sinkhorn and Knopp's iteration: rows to 1, then columns to equal shares.

    Args:
      read: gives the vectors in blocks, once a pass; see `clustering.stream`.
      clusters: the centroids, and the prices to go on from.
      temperature: the weight of the entropy, in units of squared distances.
      passes: number of iterations.
    """
    for _ in range(passes):
        clusters = _priced(clusters, _over(read, _shares, clusters, temperature), temperature)
    return clusters


def fit(
    vectors: np.ndarray,
    k: int,
    seed: int,
    mesh: Mesh,
    report: Callable[[str], object] = lambda text: None,
) -> Clusters:
    """Clusters vectors so that clusters are about equally large: Lloyd's iterations with Sinkhorn's prices.

    Args:
      vectors: N×E of any float type, maybe mapped from a file.
      k: number of clusters.
      seed: seed of all random choices.
      mesh: the devices to compute on.
      report: is called with the iteration, as text.

    Returns:
      NumPy arrays of K clusters; K is below k if there are fewer distinct vectors.
    """
    start, temperatures = _start(vectors, k, seed, mesh, report)
    clusters = kept = Clusters(jnp.asarray(start), jnp.zeros(len(start), jnp.float32))
    read = clustering.stream(vectors, np.arange(len(vectors)), k, mesh)
    most = 0.0
    for number, temperature in enumerate(temperatures):
        report(f"round {number + 1}")
        clusters = balance(read, clusters, temperature, PASSES)
        sums_KxE, count_K = _over(read, _sums, clusters)
        even = _perplexity(np.asarray(count_K, np.float64))
        most = max(most, even)
        if even >= BALANCED * most:
            kept = clusters
        clusters = _moved(clusters, sums_KxE, count_K)
    return Clusters(*map(np.asarray, kept))


def _start(vectors: np.ndarray, k: int, seed: int, mesh: Mesh, report: Callable) -> tuple:
    """Returns (the first centroids K×E, the temperature of each round: none if all vectors are centroids)."""
    rows = clustering.sample(np.arange(len(vectors)), max(clustering.BLOCK, 4 * k), seed)
    some = np.asarray(vectors[rows], np.float32)
    start = np.unique(some, axis=0)
    if len(start) > k:  # where vectors are dense, so are the centroids, which those of k-means++ are not
        start = np.random.default_rng(seed).permutation(start)[:k]
    else:
        start = clustering.kmeans(vectors, k, seed, mesh=mesh, report=report)
    _, distances = clustering.nearest(some, start, np.ones(len(start), bool))
    distances = np.asarray(distances)
    distances = distances[distances > clustering.NOISE * some.var(0).sum()]  # the others are centroids
    if not len(distances):
        return start, []
    lowest = LOWEST * np.quantile(distances, QUANTILE)
    return start, np.geomspace(HIGHEST * distances.mean(), lowest, ROUNDS).tolist()


def _perplexity(count_K: np.ndarray) -> float:
    """Returns how many equally large clusters would be as diverse."""
    share = count_K[count_K > 0] / count_K.sum()
    return float(np.exp(-(share @ np.log(share))))
