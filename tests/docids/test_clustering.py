"""k-means against plain NumPy; duplicates, empty clusters, streaming, several devices."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.docids import clustering, semantic
from retrieval_jax.mesh.partitioning import make_mesh


def blobs(clusters: int, each: int, dimensions: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(vectors in far-apart clusters, shuffled; the number of each one's cluster)."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat(np.arange(clusters), each))
    centres = 20 * rng.normal(size=(clusters, dimensions))
    return (centres[label] + rng.normal(size=(len(label), dimensions))).astype(np.float32), label


def error(vectors: np.ndarray, centroids: np.ndarray) -> float:
    """The mean squared distance to the nearest centroid, in float64 and by the definition."""
    differences = vectors[:, None].astype(np.float64) - centroids[None]
    return float((differences**2).sum(-1).min(-1).mean())


def lloyd(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Plain k-means in float64: k-means++, then means until nothing changes."""
    rng, x = np.random.default_rng(seed), vectors.astype(np.float64)
    centroids = [x[rng.integers(len(x))]]
    while len(centroids) < k:
        nearest = ((x[:, None] - np.array(centroids)) ** 2).sum(-1).min(-1)
        centroids.append(x[rng.choice(len(x), p=nearest / nearest.sum())])
    centroids = np.array(centroids)
    while True:
        codes = ((x[:, None] - centroids) ** 2).sum(-1).argmin(-1)
        means = np.array([x[codes == c].mean(0) if (codes == c).any() else centroids[c] for c in range(k)])
        if np.allclose(means, centroids):
            return centroids
        centroids = means


@given(st.integers(1, 8), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_nearest_is_the_nearest(many: int, seed: int):
    rng = np.random.default_rng(seed)
    # Far from 0, where squares of whole coordinates would have no digits left for the differences.
    x, centroids = (1000 + rng.normal(size=(n, 4)).astype(np.float32) for n in (64, 8))
    used = rng.permutation(8) < many
    codes, distances = map(np.asarray, clustering._nearest(x, centroids, used))
    expected = ((x[:, None].astype(np.float64) - centroids[used]) ** 2).sum(-1).min(-1)
    chosen = ((x.astype(np.float64) - centroids[codes]) ** 2).sum(-1)
    assert used[codes].all()
    np.testing.assert_allclose(chosen, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(distances, expected, rtol=1e-3, atol=1e-3)


def test_fit_is_as_good_as_plain_k_means():
    vectors = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32)
    ours = [error(vectors, clustering.kmeans(vectors, 10, seed)) for seed in range(4)]
    plain = [error(vectors, lloyd(vectors, 10, seed)) for seed in range(4)]
    assert min(ours) < 1.01 * min(plain)
    assert max(ours) < 1.03 * max(plain)


def test_fit_is_as_good_as_scikit_learn():
    from sklearn.cluster import KMeans  # takes a second

    vectors = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32)
    theirs = KMeans(10, n_init=4, random_state=0).fit(vectors).inertia_ / len(vectors)
    assert min(error(vectors, clustering.kmeans(vectors, 10, seed)) for seed in range(4)) < 1.01 * theirs


def test_clusters_far_apart_are_found():
    vectors, label = blobs(3, 500)
    codes = clustering.assign(vectors, clustering.kmeans(vectors, 3, 1))
    assert codes.dtype == np.uint8
    assert len(set(zip(label, codes, strict=True))) == 3  # a code a cluster


def test_the_same_seed_repeats_exactly():
    vectors = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    first, again, other = (clustering.kmeans(vectors, 7, seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_fewer_distinct_vectors_than_clusters(distinct: int):
    points = np.random.default_rng(distinct).normal(size=(distinct, 6)).astype(np.float32)
    vectors = points[np.arange(1000) % distinct]
    centroids = clustering.kmeans(vectors, 8, 0)
    assert len(centroids) == distinct
    assert error(vectors, centroids) < 1e-10


def test_k_means_pp_takes_distinct_rows_and_never_padding():
    vectors = np.repeat(np.arange(5, dtype=np.float32), 4)[:, None]
    weight = (vectors[:, 0] < 4).astype(np.float32)
    for seed in range(20):
        centroids, used = clustering._first(np.uint32(seed), vectors, weight, 6)
        assert sorted(np.asarray(centroids)[used][:, 0].tolist()) == [0, 1, 2, 3]
        assert used.tolist() == [True] * 4 + [False] * 2


def test_an_empty_cluster_is_seeded_again_with_the_farthest_row():
    x = np.array([[0, 0], [0, 1], [5, 5], [9, 9]], np.float32)
    start = np.array([[0, 0], [1, 1], [100, 100]], np.float32)  # nothing is near the last
    sums = clustering._pass(x, np.ones(4, np.float32), start, np.ones(3, bool))
    centroids, used, done = clustering._means(start, np.ones(3, bool), sums)
    np.testing.assert_allclose(centroids[2], [9, 9], atol=1e-5)
    assert used.all()
    assert not done


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_an_update_moves_centroids_to_the_means(seed: int):
    rng = np.random.default_rng(seed)
    x, centroids = (rng.normal(size=(n, 3)).astype(np.float32) for n in (40, 4))
    weight = (rng.random(40) < 0.8).astype(np.float32)
    used = np.ones(4, bool)
    codes, distances = map(np.asarray, clustering._nearest(x, centroids, used))
    sums = clustering._pass(x, weight, centroids, used)
    in_two = clustering._pass(x[:20], weight[:20], centroids, used)
    in_two = clustering._more(in_two, x[20:], weight[20:], centroids, used)
    for one, both in zip(sums, in_two, strict=True):
        np.testing.assert_allclose(both, one, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sums.error, distances @ weight, rtol=1e-4)
    np.testing.assert_allclose(sums.far_F, np.sort(distances[weight > 0])[::-1][:4], rtol=1e-4)
    means = np.asarray(clustering._means(centroids, used, sums)[0])
    for c in range(4):
        rows = (codes == c) & (weight > 0)
        if rows.any():
            np.testing.assert_allclose(means[c], x[rows].mean(0), atol=1e-4)


def test_streaming_equals_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(40_000, 4)).astype(np.float32)
    kept = clustering.kmeans(vectors, 5, 3)
    np.save(tmp_path / "vectors.npy", vectors)
    monkeypatch.setattr(clustering, "IN_MEMORY_BYTES", 0)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert np.array_equal(clustering.kmeans(mapped, 5, 3), kept)
    expected = ((vectors[:, None] - kept) ** 2).sum(-1).argmin(-1)
    assert (clustering.assign(mapped, kept) == expected).mean() > 0.9999  # but for ties


def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch):
    vectors, _ = blobs(4, 1000)
    monkeypatch.setattr(clustering, "MAX_FITTED_ROWS", 3000)
    monkeypatch.setattr(clustering, "SAMPLE_ROWS", 500)
    rows = clustering.sample(np.arange(10, 4000), 500, 0)
    assert len(set(rows.tolist())) == 500
    assert (np.diff(rows) > 0).all()
    assert rows.min() >= 10
    assert error(vectors, clustering.kmeans(vectors, 4, 0)) < 1.1 * 8


def test_many_small_sets_are_each_clustered():
    vectors, label = blobs(6, 100)
    sets = [np.flatnonzero(label < 3), np.flatnonzero(label >= 3), np.flatnonzero(label == 0)[:40]]
    spans = [(0, 300), (300, 600), (0, 40)]
    found = {which: rest for which, *rest in clustering.kmeans_many(vectors, sets, spans, 3, 0, make_mesh())}
    assert sorted(found) == [0, 1, 2]
    for which, (centroids, codes) in found.items():
        x = vectors[sets[which]]
        assert centroids.shape == (3, 8)
        assert np.array_equal(codes, ((x[:, None] - centroids) ** 2).sum(-1).argmin(-1))
    for which in (0, 1):
        assert len(set(zip(label[sets[which]], found[which][1], strict=True))) == 3


_SHARDED = """
import sys, numpy as np, jax
from retrieval_jax.docids import clustering, semantic
assert jax.device_count() == 8
vectors = np.load(sys.argv[1])
tree, leaves = semantic.grow(vectors[:1200], semantic.Settings(5, 300), 0)
np.savez(sys.argv[2], centroids=clustering.kmeans(vectors, 6, 0), leaves=leaves)
"""


def test_eight_devices_equal_one(tmp_path):
    vectors, _ = blobs(6, 3000)
    np.save(tmp_path / "vectors.npy", vectors)
    devices = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _SHARDED, str(tmp_path / "vectors.npy"), str(tmp_path / "eight.npz")]
    subprocess.run(command, check=True, env=os.environ | devices)
    eight = np.load(tmp_path / "eight.npz")
    np.testing.assert_allclose(eight["centroids"], clustering.kmeans(vectors, 6, 0), rtol=1e-4, atol=1e-4)
    assert np.array_equal(eight["leaves"], semantic.grow(vectors[:1200], semantic.Settings(5, 300), 0)[1])


def test_more_clusters_than_vectors_are_as_many_as_these():
    vectors = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    centroids = clustering.kmeans(vectors, 1_000_000, 0)
    assert error(vectors, centroids) < 1e-10
    assert len(centroids) == 20
