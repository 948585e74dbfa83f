"""A softmax made in blocks, on one device and on meshes, against that of whole logits in float64."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.decoding.atomic import top_docids
from retrieval_jax.models.objectives import token_cross_entropy
from retrieval_jax.models.softmax import (
    Blocks,
    SoftmaxStats,
    blockwise_softmax_stats,
    candidate_logits,
    log_z_blocks,
    logits_of,
    softmax_stats,
    token_scores,
)


def examples(seed: int, N: int, E: int, V: int, spread: float = 1.0):
    rng = np.random.default_rng(seed)
    return spread * rng.normal(size=(N, E)), rng.normal(size=(E, V)), rng.integers(0, V, N)


def exact(x, kernel, targets, z_loss: float) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """(loss, its gradients of x and of the kernel, right answers) in float64."""
    logits = x @ kernel
    shifted = logits - logits.max(1, keepdims=True)
    log_z = np.log(np.exp(shifted).sum(1)) + logits.max(1)
    loss = (log_z - logits[np.arange(len(x)), targets] + z_loss * log_z**2).sum()
    of_logits = np.exp(logits - log_z[:, None]) * (1 + 2 * z_loss * log_z[:, None])
    of_logits[np.arange(len(x)), targets] -= 1
    return loss, of_logits @ kernel.T, x.T @ of_logits, logits.argmax(1) == targets


def blocked(x, kernel, targets, z_loss: float, max_logits_per_block: int):
    """The same of blockwise_softmax_stats."""

    def loss(x, kernel):
        softmax = blockwise_softmax_stats(x, kernel, jnp.array(targets), max_logits_per_block)
        return jnp.sum(token_cross_entropy(softmax, z_loss)), softmax

    arguments = jnp.array(x, jnp.float32), jnp.array(kernel, jnp.float32)
    (value, softmax), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arguments)
    return value, *gradients, softmax.target >= softmax.largest


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([1, 6, 7, 24, 127, 128]),
    st.sampled_from([1, 10, 100, 10**6]),
    st.sampled_from([0.0, 1e-3]),
)
def test_blocks_equal_the_whole(seed, N, E, V, max_logits_per_block, z_loss):
    x, kernel, targets = examples(seed, N, E, V)
    expected = exact(x, kernel, targets, z_loss)
    found = blocked(x, kernel, targets, z_loss, max_logits_per_block)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_a_size_without_divisors_is_cut_as_well_as_any_other(size: int, widest: int):
    """Blocks are as few as can be, but for evening out; every column is new in exactly one of them."""
    cut = Blocks.of(size, widest)
    ideal = -(-size // min(widest, size))
    assert cut.width <= widest
    assert cut.count <= ideal
    assert (cut.count - 1) * cut.width < size <= cut.count * cut.width


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20))
def test_blocks_hold_every_column_once(size: int, widest: int):
    cut, seen = Blocks.of(size, widest), []
    for number in range(cut.count):
        first, new_C = cut.at(jnp.int32(number))
        assert 0 <= first <= size - cut.width
        columns = np.arange(first, first + cut.width)
        seen += columns[new_C if new_C is not None else slice(None)].tolist()
    assert seen == [*range(size)]


def test_wikipedias_passages_on_64_devices_are_cut_into_few_blocks():
    """21,015,324 passages (DPR): 328,366 outputs a device, whose largest small divisor is 2."""
    outputs = -(-21_015_324 // 128) * 128 // 64
    assert Blocks.of(outputs, (1 << 28) // 4096) == (328_366, 54_728, 6)
    assert log_z_blocks(outputs * 64 - 8 * 3) == pytest.approx(outputs * 64 / 2048, abs=1)


@pytest.mark.parametrize("V", [8 * 2053, 16_384])
def test_candidates_are_scored_under_the_softmax_of_all(V: int):
    x, kernel, _ = (jnp.array(a, jnp.float32) for a in examples(0, 6, 4, V))
    tokens = jnp.array([0, 5, V - 1])
    logits, log_z = candidate_logits(x.reshape(2, 3, 4), kernel, tokens)
    whole = np.float64(x) @ np.float64(kernel)
    np.testing.assert_allclose(logits.reshape(6, 3), whole[:, tokens], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_z.reshape(6), np.log(np.exp(whole).sum(1)), rtol=1e-6)


@pytest.mark.parametrize("V", [40, 8 * 2053])
def test_one_token_each_is_scored_under_the_softmax_of_all(V: int):
    x, kernel, tokens = examples(1, 6, 4, V)
    whole = x @ kernel
    expected = whole[np.arange(6), tokens] - np.log(np.exp(whole).sum(1))
    x, kernel, tokens = (jnp.array(a, d) for a, d in ((x, "float32"), (kernel, "float32"), (tokens, "int32")))
    found = jax.jit(token_scores)(x.reshape(2, 3, 4), kernel, tokens.reshape(2, 3))
    np.testing.assert_allclose(found.reshape(6), expected, rtol=1e-5, atol=1e-5)
    text = jax.jit(token_scores).lower(x.reshape(2, 3, 4), kernel, tokens.reshape(2, 3)).as_text()
    assert (f"2x3x{V}x" in text) == (V == 40)  # a large softmax's logits are never held together


def test_large_logits_stay_finite():
    x, kernel, targets = examples(0, 3, 4, 24, spread=1e3)
    expected = exact(x, kernel, targets, 0.0)
    found = blocked(x, kernel, targets, 0.0, 10)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2, rtol=1e-4)


def test_no_array_of_all_logits_is_made():
    N, E, V = 16, 8, 4096
    x, kernel, targets = (jnp.array(a) for a in examples(0, N, E, V))

    def loss(x, kernel):
        softmax: SoftmaxStats = blockwise_softmax_stats(x, kernel, targets, N * 64)
        return jnp.sum(token_cross_entropy(softmax))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().as_text()
    assert f"[{N},{V}]" not in text
    assert f"[{N},64]" in text


def test_of_a_network_in_bfloat16_both_paths_are_float32():
    """The network's output is bfloat16; loss and gradients are those of its exact products in float64."""
    N, E, V = 16, 32, 4096
    x, kernel, targets = examples(0, N, E, V)
    x = jnp.array(x, jnp.bfloat16)
    kernel = jnp.array(kernel / np.sqrt(E), jnp.float32)
    expected = exact(np.asarray(x, np.float64), np.asarray(kernel, np.float64), targets, 1e-3)

    def loss(x, kernel, max_logits_per_block):
        if max_logits_per_block:
            softmax = blockwise_softmax_stats(x, kernel, jnp.array(targets), max_logits_per_block)
        else:
            softmax = softmax_stats(logits_of(x, kernel), jnp.array(targets))
        return jnp.sum(token_cross_entropy(softmax, 1e-3))

    for max_logits_per_block in (None, N * 64):
        value, (of_x, of_kernel) = jax.value_and_grad(loss, (0, 1))(x, kernel, max_logits_per_block)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        np.testing.assert_allclose(of_kernel, expected[2], atol=1e-5, rtol=1e-4)
        # The gradient that goes on into the network has the network's dtype: 8 significant bits.
        assert of_x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(of_x, np.float64), expected[1], atol=1e-5, rtol=2**-8)


def test_of_a_million_docids_in_bfloat16_the_best_hundred_are_in_order():
    E, V = 16, 1 << 20
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(1, 1, E)), jnp.bfloat16)
    kernel = jnp.array(rng.normal(size=(E, V)) / np.sqrt(E), jnp.float32)
    exactly = (np.asarray(x, np.float64) @ np.asarray(kernel, np.float64))[0, 0]
    best = np.argsort(-exactly, kind="stable")[:100]
    log_z = np.log(np.exp(exactly - exactly.max()).sum()) + exactly.max()

    tokens, scores = jax.jit(top_docids, static_argnums=2)(logits_of(x, kernel)[:, 0], jnp.ones(V, bool), 100)
    np.testing.assert_array_equal(tokens[0], best)
    np.testing.assert_allclose(scores[0], exactly[best] - log_z, atol=1e-5)

    logits, found_log_z = jax.jit(candidate_logits)(x, kernel, jnp.array(best))
    np.testing.assert_allclose(logits[0, 0], exactly[best], atol=1e-5)
    np.testing.assert_allclose(found_log_z[0, 0], log_z, atol=1e-5)


MESHES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from test_softmax import blocked, examples, exact
from retrieval_jax.models.softmax import blockwise_softmax_stats
from retrieval_jax.models.objectives import token_cross_entropy
from retrieval_jax.mesh import partitioning
import gin
x, kernel, targets = examples(3, 16, 8, 104)  # 13 outputs a device, in blocks of 4: the last one overlaps
expected = exact(x, kernel, targets, 1e-3)
for rules in ([("vocab", "model")], [("vocab", ("model", "data"))], [("vocab", None)], [("vocab", "data")]):
    for parallelism in (1, 2, 8):
        gin.clear_config()
        with gin.unlock_config():
            gin.bind_parameter("axis_rules.rules", [("batch", "data"), *rules])
        mesh = partitioning.make_mesh(parallelism)

        def loss(x, kernel):
            softmax = blockwise_softmax_stats(x, kernel, jnp.array(targets), 64)
            return jnp.sum(token_cross_entropy(softmax, 1e-3)), softmax

        def run(x, kernel):
            with partitioning.mesh_context(mesh, partitioning.axis_rules()):
                return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)

        place = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, rules[0][1]))
        compiled = jax.jit(run, in_shardings=place, out_shardings=((None, None), place))
        compiled = compiled.lower(jnp.array(x, jnp.float32), jnp.array(kernel, jnp.float32)).compile()
        (value, softmax), gradients = compiled(jnp.array(x, jnp.float32), jnp.array(kernel, jnp.float32))
        found = value, *gradients, softmax.target >= softmax.largest
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=str((rules, parallelism)))
        # The kernel, which is far larger than the tokens, is never gathered.
        shards = kernel.shape[1] * 8 // gradients[1].addressable_shards[0].data.size
        assert shards == {"model": parallelism, "data": 8 // parallelism, None: 1}.get(rules[0][1], 8)
        if shards > 1:
            assert "f32[8,104]" not in compiled.as_text(), (rules, parallelism)
print("equal")
"""


def test_meshes_give_the_same_and_gather_no_kernel():
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", MESHES, str(Path(__file__).parent)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "equal\n", result.stderr
