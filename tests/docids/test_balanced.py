"""Balanced clusters against Sinkhorn's iteration in NumPy's float64; collapsed vectors; several devices."""

import dataclasses
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_jax.docids import balanced, clustering, residual
from retrieval_jax.docids.balanced import Clusters
from retrieval_jax.docids.residual import Codebooks, Settings
from retrieval_jax.mesh.partitioning import make_mesh


def collapsing(count: int, seed: int = 0, dimensions: int = 8) -> np.ndarray:
    """Nineteen of twenty vectors are close together, the others far away and apart: k-means serves these."""
    rng = np.random.default_rng(seed)
    vectors, far = 0.05 * rng.normal(size=(count, dimensions)), rng.random(count) < 0.05
    vectors[far] = 3 * rng.normal(size=(far.sum(), dimensions))
    return vectors.astype(np.float32)


def sinkhorn(distances_NxK: np.ndarray, temperature: float, passes: int) -> np.ndarray:
    """Scales exp(-distance / temperature) to rows of 1 and columns of N / K in turns: the column factors."""
    kernel, column = np.exp(-distances_NxK / temperature), np.ones(distances_NxK.shape[1])
    for _ in range(passes):
        row = 1 / (kernel @ column)
        column = len(kernel) / len(column) / (row @ kernel)
    return column


@pytest.mark.parametrize("temperature", [3.0, 0.5])
def test_prices_are_sinkhorns_column_factors(temperature: float, monkeypatch: pytest.MonkeyPatch):
    """Also in several blocks, the last of which is not full."""
    rng = np.random.default_rng(0)
    x, centroids = rng.normal(size=(2500, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    distances = ((x[:, None].astype(np.float64) - centroids) ** 2).sum(-1)
    expected = temperature * np.log(sinkhorn(distances, temperature, 7))
    monkeypatch.setattr(clustering, "BLOCK", 1 << 10)
    read = clustering.stream(x, np.arange(len(x)), 6, make_mesh())
    start = Clusters(jnp.asarray(centroids), jnp.zeros(6, jnp.float32))
    prices = np.asarray(balanced.balance(read, start, temperature, 7).prices_K)
    np.testing.assert_allclose(prices, expected - expected.mean(), rtol=1e-4, atol=1e-4)
    codes, _ = clustering.nearest(x, centroids, np.ones(6, bool), prices)
    np.testing.assert_array_equal(codes, (distances - prices).argmin(1))


def fit_in_float64(x, start, temperatures) -> tuple[np.ndarray, np.ndarray]:
    """Returns (centroids, prices) of the last round that is about as even as any."""
    centroids, prices, most = start.astype(np.float64), np.zeros(len(start)), 0
    for temperature in temperatures:
        distances = ((x[:, None].astype(np.float64) - centroids) ** 2).sum(-1)
        prices = prices + temperature * np.log(
            sinkhorn(distances - prices, temperature, balanced.PASSES)
        )  # of distances that have the prices so far in them: the factors are those to add
        prices -= prices.mean()
        codes = (distances - prices).argmin(1)
        most = max(most, perplexity(codes))
        if perplexity(codes) >= balanced.BALANCED * most:
            kept = centroids, prices
        centroids = np.stack([x[codes == code].mean(0, np.float64) for code in range(len(start))])
    return kept


def test_the_fit_is_that_in_float64(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    x = (rng.choice([0, 4], (1500, 3), p=[0.7, 0.3]) + rng.normal(size=(1500, 3))).astype(np.float32)
    monkeypatch.setattr(clustering, "BLOCK", 1 << 10)
    start, temperatures = balanced._start(x, 6, 0, make_mesh(), lambda text: None)
    expected, expected_prices = fit_in_float64(x, start, temperatures)
    found = balanced.fit(x, 6, 0, make_mesh())
    np.testing.assert_allclose(found.centroids_KxE, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.prices_K, expected_prices, rtol=1e-3, atol=1e-3)


def perplexity(codes: np.ndarray) -> float:
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(np.exp(-(share @ np.log(share))))


@pytest.mark.parametrize("seed", [0, 1])
def test_vectors_that_collapse_get_codes_that_are_used_about_equally_often(seed: int):
    """Three levels of 32 codes: k-means uses about 3 of them, and 4,000 vectors get about 210 codes."""
    vectors, usage, distinct = collapsing(4000), {}, {}
    for name in (False, True):
        codes, _ = residual.fit_codebooks(vectors, 3, 32, seed, balanced=name).encode(vectors)
        usage[name] = [perplexity(codes[:, level]) for level in range(3)]
        distinct[name] = len(np.unique(codes, axis=0))
    assert max(usage[False]) < 8
    assert min(usage[True]) > 16, usage
    assert distinct[True] > 10 * distinct[False], distinct


def test_ordinary_vectors_are_quantised_about_as_well():
    vectors = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    errors = [residual.fit_codebooks(vectors, 2, 16, 0, balanced=name).encode(vectors)[1] for name in (0, 1)]
    assert errors[1][-1] < 1.05 * errors[0][-1]


def test_few_distinct_vectors_and_the_same_seed():
    vectors = collapsing(400)[np.arange(2000) % 3]
    books = residual.fit_codebooks(vectors, 2, 16, 0, balanced=True)
    assert books.sizes_L[0] == 3
    assert books.encode(vectors)[1][-1] < 1e-9
    again, books = (residual.fit_codebooks(collapsing(400), 2, 8, 5, balanced=True) for _ in range(2))
    for field in ("vectors_LxVxE", "sizes_L", "prices_LxV"):
        np.testing.assert_array_equal(getattr(again, field), getattr(books, field))


def test_prices_are_kept_with_the_codebooks(tmp_path):
    vectors = collapsing(1000)
    books = residual.fit_codebooks(vectors, 2, 8, 0, balanced=True)
    books.write(tmp_path)
    opened = Codebooks.open(tmp_path)
    np.testing.assert_array_equal(opened.encode(vectors[::7])[0], books.encode(vectors)[0][::7])
    nearest = dataclasses.replace(opened, prices_LxV=None).encode(vectors)[0]
    assert (nearest != books.encode(vectors)[0]).any()
    kind = residual.Residual(2, 8)
    assert kind.recipe(Settings()) == {"settings": {"shared_codes": "token"}}  # earlier tables are up to date
    assert kind.recipe(Settings(balanced=True))["settings"]["balanced"]


_SHARDED = """
import sys, numpy as np, jax
from retrieval_jax.docids import residual
assert jax.device_count() == 8
np.save(sys.argv[2], residual.fit_codebooks(np.load(sys.argv[1]), 1, 8, 0, balanced=True).vectors_LxVxE)
"""


def test_eight_devices_equal_one(tmp_path):
    vectors = collapsing(2000)
    np.save(tmp_path / "vectors.npy", vectors)
    devices = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _SHARDED, str(tmp_path / "vectors.npy"), str(tmp_path / "eight.npy")]
    subprocess.run(command, check=True, env=os.environ | devices)
    one = residual.fit_codebooks(vectors, 1, 8, 0, balanced=True)
    np.testing.assert_allclose(np.load(tmp_path / "eight.npy"), one.vectors_LxVxE, rtol=1e-3, atol=1e-3)
