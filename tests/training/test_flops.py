"""FLOPs of traced functions, against XLA's own count where that counts in full, and against formulas."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from retrieval_jax.mesh import partitioning
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.ranking import margin_mse
from retrieval_jax.training.flops import jaxpr_flops, matmul_flops, model_flops
from retrieval_jax.training.slow_shapes import _work
from retrieval_jax.training.step import abstract_state, make_train_step

CONFIG = T5Config(256, 64, 2, 32, 96, 2, 3, dropout_rate=0.1, output_size=384, separate_target_embedding=True)
B, S, T = 8, 12, 5
DECODERS = [f"decoder_{name}" for name in ("input_tokens", "target_tokens", "loss_weights")]
SHAPES = {"encoder_input_tokens": (B, S)} | dict.fromkeys(DECODERS, (B, T))


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def layer(x, w):
    return jnp.dot(x, w)


def test_products_as_xla_counts_them():
    """Forward and gradient of a chain without loops; XLA adds the sum's and the square's few operations."""

    def loss(x, weights):
        return jnp.sum(functools.reduce(layer, weights, x) ** 2)

    arguments = array(96, 64), [array(64, 128), array(128, 64), array(64, 32)]
    for function in (loss, jax.grad(loss, argnums=1)):
        ours = matmul_flops(function, *arguments)
        xla = jax.jit(function).lower(*arguments).cost_analysis()["flops"]
        assert ours <= xla < 1.02 * ours
    assert matmul_flops(loss, *arguments) == 2 * 96 * (64 * 128 + 128 * 64 + 64 * 32)


def test_batch_dimensions_and_several_contracted_ones():
    def attend(q, k):
        return jnp.einsum("bthd,bshd->bhts", q, k)

    arguments = array(3, 5, 4, 16), array(3, 7, 4, 16)
    assert matmul_flops(attend, *arguments) == 2 * 3 * 4 * 5 * 7 * 16
    both = matmul_flops(lambda x, w: jnp.einsum("bij,ijk->bk", x, w), array(6, 5, 4), array(5, 4, 9))
    assert both == 2 * 6 * 5 * 4 * 9


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_of_n_is_n_times_its_body(remat: bool):
    """Also backwards, where rematerialisation computes the product again. XLA counts one body."""
    body = jax.checkpoint(layer) if remat else layer

    def unrolled(x, weights):
        for i in range(6):
            x = jnp.sin(body(x, weights[i]))
        return jnp.sum(x)

    def scanned(x, weights):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(body(x, w)), None), x, weights)[0])

    arguments = array(32, 64), array(6, 64, 64)
    one = 2 * 32 * 64 * 64
    assert matmul_flops(scanned, *arguments) == matmul_flops(unrolled, *arguments) == 6 * one
    backwards = jax.grad(scanned, argnums=1), jax.grad(unrolled, argnums=1)
    ours, theirs = (matmul_flops(f, *arguments) for f in backwards)
    assert ours in (theirs, theirs + one)  # the first layer's input needs no gradient, but the scan makes it
    assert jax.jit(scanned).lower(*arguments).cost_analysis()["flops"] < 2 * one


def test_recomputation_counts():
    def loss(x, w):
        return jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))

    arguments = array(32, 64), array(64, 64)
    one = 2 * 32 * 64 * 64
    assert matmul_flops(jax.grad(loss, argnums=1), *arguments) == (2 + 3) * one
    # Both products are computed again: the sines' derivatives need them.
    assert matmul_flops(jax.grad(jax.checkpoint(loss), argnums=1), *arguments) == (2 + 2 + 3) * one


def test_calls_branches_loops_and_shards():
    x, w = array(8, 16), array(16, 32)
    one = 2 * 8 * 16 * 32

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (product(x, w), (x, w)), lambda kept, t: (t @ kept[1].T, kept[0].T @ t))
    assert matmul_flops(product, x, w) == one
    assert matmul_flops(jax.grad(lambda x, w: jnp.sum(product(x, w)), argnums=(0, 1)), x, w) == 3 * one
    assert matmul_flops(jax.jit(layer), x, w) == one

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w + x @ w, lambda: x @ w)

    assert matmul_flops(branch, x, w) == 2 * one

    def loop(x, w):
        return jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y + x @ w, x @ w)

    assert matmul_flops(loop, x, w) == 2 * one
    assert matmul_flops(loop, x, w, trips=5) == 6 * one

    # From jax 0.12 on an abstract mesh's axes are explicit unless told; those of real meshes are not.
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.shard_map(
        layer, mesh=mesh, in_specs=(P("data"), P(None, "model")), out_specs=P("data", "model")
    )
    assert matmul_flops(sharded, x, w) == one
    copied = jax.shard_map(layer, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert matmul_flops(copied, x, w) == 2 * one  # `model`'s two devices do the same


def forward_by_hand(c: T5Config, candidates: int = 1) -> int:
    """2·M·N·K of each product of a T5 1.1 with B inputs of S tokens, and targets of T for each of them."""
    E, J = c.emb_dim, c.num_heads * c.head_dim
    encoder = 4 * B * S * E * J + 2 * B * S * S * J + 3 * B * S * E * c.mlp_dim
    rows = B * candidates
    own = 4 * rows * T * E * J + 2 * rows * T * T * J
    cross = 2 * rows * T * E * J + 2 * B * S * E * J + 2 * rows * T * S * J
    decoder = own + cross + 3 * rows * T * E * c.mlp_dim
    softmax = rows * T * E * c.output_size
    return 2 * (c.num_encoder_layers * encoder + c.num_decoder_layers * decoder + softmax)


def test_a_models_step_is_three_forward_passes_and_those_are_the_formulas():
    model = GenerativeRetriever(CONFIG, optax.sgd(0.1))
    assert model_flops(model, SHAPES) == 3 * forward_by_hand(CONFIG)

    mesh = partitioning.make_mesh()
    abstract = abstract_state(model, mesh, SHAPES)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in SHAPES.items()}
    step = make_train_step(model, mesh, abstract, seed=0).trace(abstract, batch)
    assert jaxpr_flops(step.jaxpr) == 3 * forward_by_hand(CONFIG)  # nothing is computed again here


def test_a_query_is_encoded_once_for_all_docids_that_it_ranks():
    """And its cross-attention's keys and values are made once."""
    shapes = {name: (*x[:1], 4, *x[1:]) if name in DECODERS else x for name, x in SHAPES.items()}
    shapes |= {"grade": (B, 4), "score": (B, 4, T)}
    model = GenerativeRetriever(CONFIG, objective=margin_mse)
    assert model_flops(model, shapes) == 3 * forward_by_hand(CONFIG, candidates=4)
    work = _work(CONFIG, shapes, partitioning.make_mesh(), partitioning.DEFAULT_RULES, microbatches=1)
    assert 2 * work.products() == forward_by_hand(CONFIG, candidates=4)


def test_a_dual_encoder_counts_both_towers_and_the_similarities():
    rows, S, P_, G, V = 4, 6, 10, 2, 48
    shapes = {
        "left_encoder_input_tokens": (rows, S),
        "right_encoder_input_tokens": (rows, G, P_),
        "passage": (rows, G),
        "grade": (rows, G),
    }
    c = T5Config(256, 64, 2, 32, 96, 2, 0)
    E, J = c.emb_dim, c.num_heads * c.head_dim

    def tower(count: int, length: int) -> int:
        tokens = count * length
        layers = 4 * tokens * E * J + 2 * tokens * length * J + 3 * tokens * E * c.mlp_dim
        return 2 * (c.num_encoder_layers * layers + count * E * V)

    # The scores of all candidates, and once more of the query's own.
    forward = tower(rows, S) + tower(rows * G, P_) + 2 * rows * (rows + 1) * G * V
    assert model_flops(DualEncoder(c, None, vector_dim=V), shapes) == 3 * forward
