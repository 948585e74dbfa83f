"""Plans against NumPy in float64: the lexical scores of all passages, sorted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.decoding import planning
from retrieval_jax.decoding.planning import build_sets, plan, score_all, score_rows
from retrieval_jax.mesh.multihost import make_global_arrays
from retrieval_jax.mesh.partitioning import make_mesh

TOKENS, SET, SCALE = 50, 6, 0.25
PLAN = jax.jit(plan, static_argnums=(2, 3))


def random_sets(seed, passages, with_impacts=False, dtype=np.uint16):
    """(tokens, impacts or None): sets of up to SET tokens, of which some are 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TOKENS, (passages, SET)).astype(dtype)
    return tokens, rng.integers(0, 256, (passages, SET)).astype(np.uint8) if with_impacts else None


def random_weights(seed, queries):
    """Multiples of 1/8, mostly 0, so that sums are exact and many passages tie; token 0 weighs nothing."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 16, (queries, TOKENS)) * (rng.random((queries, TOKENS)) < 0.2) / 8
    weights[:, 0] = 100
    return weights.astype(np.float32)


def exact_scores(weights, tokens, impacts):
    """Lexical scores B×P in float64."""
    weights = np.where(np.arange(TOKENS) == 0, 0.0, weights.astype(np.float64))
    factors = 1.0 if impacts is None else impacts.astype(np.float64) * SCALE
    return (weights[:, tokens] * factors).sum(axis=-1)


def exact_plan(scores, n):
    """(rows, scores) of the best n passages; of equal ones the lower row comes first."""
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :n]
    missing = ((0, 0), (0, max(0, n - scores.shape[1])))
    best = np.pad(np.take_along_axis(scores, rows, axis=1), missing, constant_values=-np.inf)
    return np.pad(rows, missing, constant_values=-1), best


@given(
    passages=st.integers(1, 40),
    with_impacts=st.booleans(),
    n=st.sampled_from([1, 5, 40]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([np.uint16, np.uint32]),  # of vocabularies of up to 65,536 tokens, and larger ones
)
@settings(deadline=None, max_examples=40)
def test_the_plan_has_the_passages_of_largest_score(passages, with_impacts, n, seed, dtype):
    tokens, impacts = random_sets(seed, passages, with_impacts, dtype)
    weights = random_weights(seed, queries=3)
    found = PLAN(weights, build_sets(tokens, impacts, SCALE if with_impacts else 1.0), n)
    rows, scores = exact_plan(exact_scores(weights, tokens, impacts), n)
    np.testing.assert_array_equal(found.row_Bxn, rows)
    np.testing.assert_array_equal(found.score_Bxn, scores)


@pytest.mark.parametrize("with_impacts", [False, True])
def test_blocks_and_devices_make_no_difference(monkeypatch, with_impacts):
    """Several blocks on each device, with padding in between, as one block on one device.

    tests/search/test_planned.py calls it in a process that has eight devices.
    """
    tokens, impacts = random_sets(1, passages=3000, with_impacts=with_impacts)
    weights, mesh = random_weights(2, queries=8), make_mesh(devices=jax.devices())
    scores = exact_scores(weights, tokens, impacts)
    monkeypatch.setattr(planning, "BLOCK", 128)
    sets = build_sets(tokens, impacts, SCALE if with_impacts else 1.0, shards=mesh.shape["data"])
    assert len(sets.tokens_PxM) // mesh.shape["data"] > planning.BLOCK
    placed = planning.place_sets(sets, functools.partial(make_global_arrays, mesh))
    queries = make_global_arrays(mesh, weights, "data")
    for n in (7, 1000):
        rows, best = exact_plan(scores, n)
        found = PLAN(queries, placed, n, mesh)
        np.testing.assert_array_equal(found.row_Bxn, rows)
        np.testing.assert_array_equal(found.score_Bxn, best)
    some = np.random.default_rng(3).integers(-1, 3000, (8, 5)).astype(np.int32)
    expected = np.where(some < 0, 0.0, np.take_along_axis(scores, np.maximum(some, 0), axis=1))
    scored = jax.jit(score_rows, static_argnums=3)(
        queries, placed, make_global_arrays(mesh, some, "data"), mesh
    )
    np.testing.assert_array_equal(scored, expected)
    np.testing.assert_array_equal(score_rows(jnp.asarray(weights), sets, some), expected)
    np.testing.assert_array_equal(score_all(jnp.asarray(weights), sets)[:, :3000], scores)


def test_sets_of_a_similar_collection_do_not_compile_again():
    weights, compiled, earlier = random_weights(0, queries=2), [], None
    for passages in (2000, 1990, 2005):
        tokens, impacts = random_sets(passages, passages)
        earlier = build_sets(tokens, impacts, reuse_shapes_of=earlier)
        found = PLAN(weights, earlier, 9)
        np.testing.assert_array_equal(found.row_Bxn, exact_plan(exact_scores(weights, tokens, impacts), 9)[0])
        compiled.append(PLAN._cache_size())
    assert len(set(compiled)) == 1


def test_a_padded_size_is_made_of_equal_blocks():
    for count in (1, 63, 1000, 70_000, 8_841_823):
        for shards in (1, 8, 48):
            rows = planning.padded_rows(count, shards)
            assert rows >= count
            local = rows // shards
            blocks = -(-local // planning.BLOCK)
            assert local * shards == rows
            assert local % (blocks * planning.GROUP) == 0
            assert rows < 1.02 * count + 128 * shards * planning.GROUP
