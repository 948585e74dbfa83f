"""A batch's negatives against float64 brute force: masks, blocks, gradients by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.models.negatives import NEG_INF, batch_negatives


def drawn(seed: int, B: int = 5, G: int = 2, K: int = 3, distinct: int = 9) -> tuple:
    """(queries, passages, known, passage): some padding, some queries that are none."""
    rng = np.random.default_rng(seed)
    known = np.where(rng.random((B, K)) < 0.4, -1, rng.integers(0, distinct, (B, K)))
    passage = np.where(rng.random(B * G) < 0.2, -1, rng.integers(0, distinct, B * G))
    return rng.normal(size=(B, 4)), rng.normal(size=(B * G, 4)), known, passage


def brute_force(queries, passages, known, passage, hardest: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(of each query, of each passage), one pair at a time."""
    of_queries, of_passages = [[] for _ in queries], [[] for _ in passages]
    for b, q in enumerate(queries):
        for m, p in enumerate(passages):
            if passage[m] >= 0 and any(known[b] >= 0) and passage[m] not in known[b]:
                of_queries[b].append(q @ p)
                of_passages[m].append(q @ p)

    def log_sum_exp(x: list[float]) -> float:
        return np.log(np.exp(x).sum()) if x else NEG_INF

    first = (lambda x: max(x, default=NEG_INF)) if hardest else log_sum_exp
    return np.array([*map(first, of_queries)]), np.array([*map(log_sum_exp, of_passages)])


def of_code(arguments, hardest: bool = False, max_logits_per_block: int = 1 << 26):
    queries, passages, known, passage = arguments
    vectors = jnp.float32(queries), jnp.float32(passages)
    return batch_negatives(*vectors, jnp.int32(known), jnp.int32(passage), hardest, max_logits_per_block)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    G=st.integers(1, 4),
    distinct=st.integers(1, 12),
    hardest=st.booleans(),
    at_once=st.sampled_from([1, 7, 10, 1000]),
)
def test_values_equal_brute_force(seed: int, G: int, distinct: int, hardest: bool, at_once: int):
    arguments = drawn(seed, G=G, distinct=distinct)
    got = of_code(arguments, hardest, at_once)
    of_queries, of_passages = brute_force(*arguments, hardest)
    np.testing.assert_allclose(got.of_queries, of_queries, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.of_passages, of_passages, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.largest, brute_force(*arguments, True)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("at_once", [10, 1000])
def test_gradients_equal_finite_differences(hardest: bool, at_once: int):
    queries, passages, known, passage = drawn(7)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=len(queries)), rng.normal(size=len(passages))

    def total(of_queries, of_passages):
        """Of what there is: nothing's log is left out."""
        parts = [
            (w * x)[np.asarray(x) > NEG_INF / 2]
            for w, x in zip(weights, (of_queries, of_passages), strict=True)
        ]
        return sum(part.sum() for part in parts)

    there = [np.asarray(x) > NEG_INF / 2 for x in brute_force(queries, passages, known, passage)]

    def loss(vectors):
        got = of_code((*vectors, known, passage), hardest, at_once)
        pairs = zip(weights, there, (got.of_queries, got.of_passages), strict=True)
        return sum(jnp.sum(jnp.where(ok, w * x, 0.0)) for w, ok, x in pairs)

    gradients = jax.grad(loss)((jnp.float32(queries), jnp.float32(passages)))
    for which, vectors in enumerate((queries, passages)):
        for index in np.ndindex(vectors.shape):
            values = []
            for sign in (1, -1):
                moved = [queries.copy(), passages.copy()]
                moved[which][index] += sign * 1e-5
                values.append(total(*brute_force(*moved, known, passage, hardest)))
            expected = (values[0] - values[1]) / 2e-5
            assert gradients[which][index] == pytest.approx(expected, abs=2e-3)


def test_scores_never_exist_whole():
    """65,536 queries and as many passages: the compiled program's memory, and no array of their product."""
    B, E = 1 << 16, 64
    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((B, E), "float32"),) * 2 + (((B, 1), "int32"), ((B,), "int32"))
    ]

    def loss(queries, passages, known, passage):
        got = batch_negatives(queries, passages, known, passage)
        return jnp.sum(got.of_queries) + jnp.sum(got.of_passages)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30 + 16 * B * E * 4  # of 16 GiB for the whole
