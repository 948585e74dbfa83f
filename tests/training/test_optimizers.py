"""Schedules, rates by name, and Adafactor against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.training.optimizers import adafactor, adamw, learning_rate


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", {0: 0, 5: 0.5, 10: 1, 60: 1}),
        ("linear", {0: 0, 5: 0.5, 10: 1, 60: 0.5, 110: 0}),
        ("rsqrt", {0: 0, 10: 1, 40: 0.5, 90: 1 / 3}),
    ],
)
def test_learning_rate(decay: str, expected: dict[int, float]):
    schedule = learning_rate(1.0, steps=110, warmup=10, decay=decay)
    for step, value in expected.items():
        assert schedule(step) == pytest.approx(value, abs=1e-6)


def test_unknown_decay_is_refused():
    with pytest.raises(UserError, match="linaer"):
        learning_rate(1.0, steps=10, decay="linaer")


@pytest.mark.parametrize("make", [adamw, adafactor])
def test_multipliers_scale_the_named_parameters(make):
    params = {
        "token_embedder": {"embedding": jnp.ones((4, 3))},
        "decoder": {"logits_dense": {"kernel": jnp.ones((3, 4))}, "wo": {"kernel": jnp.ones((3, 4))}},
    }
    gradients = {
        "token_embedder": {"embedding": 0.1 * jnp.ones((4, 3))},
        "decoder": {
            "logits_dense": {"kernel": 0.1 * jnp.ones((3, 4))},
            "wo": {"kernel": 0.1 * jnp.ones((3, 4))},
        },
    }
    optimizer = make(optax.constant_schedule(1e-3), {"embedding": 100.0, "logits_dense": 10.0})
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    plain = np.asarray(updates["decoder"]["wo"]["kernel"])
    assert (plain < 0).all()
    np.testing.assert_allclose(updates["decoder"]["logits_dense"]["kernel"], 10 * plain, rtol=1e-5)
    np.testing.assert_allclose(updates["token_embedder"]["embedding"], 100 * plain[0, 0], rtol=1e-5)


def adafactor_by_definition(params: np.ndarray, gradients: list[np.ndarray], rate: float) -> np.ndarray:
    """Shazeer and Stern 2018, algorithms 4 and 5, for one matrix or vector, in float64."""
    row, column, whole = 0.0, 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        decay = 1 - t**-0.8
        square = gradient**2 + 1e-30
        if params.ndim == 2 and min(params.shape) >= 128:
            row = decay * row + (1 - decay) * square.mean(1)
            column = decay * column + (1 - decay) * square.mean(0)
            update = gradient / np.sqrt(np.outer(row, column) / row.mean())
        else:
            whole = decay * whole + (1 - decay) * square
            update = gradient / np.sqrt(whole)
        update /= max(1.0, np.sqrt((update**2).mean()))
        params = params - rate * max(1e-3, np.sqrt((params**2).mean())) * update
    return params


def test_adafactor_equals_its_definition_layer_by_layer_in_a_scanned_stack():
    rng = np.random.default_rng(0)
    layers, steps = 3, 4
    shapes = {"wi": (128, 160), "narrow": (128, 5), "scale": (128,)}
    # Layers of very different sizes: a norm over all of a stack would show.
    sizes = 10.0 ** np.arange(-1, layers - 1)
    params = {name: [size * rng.normal(size=shape) for size in sizes] for name, shape in shapes.items()}
    gradients = {
        name: [[size * rng.normal(size=shape) * 10**t for size in sizes] for t in range(steps)]
        for name, shape in shapes.items()
    }

    def tree(leaves: dict[str, list[np.ndarray]]) -> dict:
        """Scanned: the layers on the first axis."""
        stack = {name: jnp.array(np.stack(some), jnp.float32) for name, some in leaves.items()}
        return {"encoder": {"encoder": stack, "alone": {"kernel": jnp.array(leaves["wi"][0], jnp.float32)}}}

    optimizer, now = adafactor(optax.constant_schedule(1e-2)), tree(params)
    state = optimizer.init(now)
    for t in range(steps):
        updates, state = optimizer.update(tree({n: g[t] for n, g in gradients.items()}), state, now)
        now = optax.apply_updates(now, updates)
    for name in shapes:
        for layer in range(layers):
            some = [g[layer] for g in gradients[name]]
            expected = adafactor_by_definition(params[name][layer], some, 1e-2)
            found = now["encoder"]["encoder"][name][layer]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * sizes[layer])
    expected = adafactor_by_definition(params["wi"][0], [g[0] for g in gradients["wi"]], 1e-2)
    np.testing.assert_allclose(now["encoder"]["alone"]["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_adam_keeps_its_first_moment_in_bfloat16_where_told():
    params = {"kernel": jnp.ones((8, 8))}
    state = adamw(optax.constant_schedule(1e-3), momentum_dtype="bfloat16").init(params)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (8, 8)]
    assert sorted(map(str, dtypes)) == ["bfloat16", "float32"]


def test_the_outputs_of_a_parameter_share_a_second_moment_where_told():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 4, 7)) * (rng.random((5, 1, 7)) < 0.3)  # few columns a step
    params = {"logits_dense": {"kernel": jnp.zeros((4, 7))}, "wo": {"kernel": jnp.zeros((4, 7))}}
    optimizer = adamw(optax.constant_schedule(1e-2), b2=0.98, shared_moments=("logits_dense",))
    plain = adamw(optax.constant_schedule(1e-2), b2=0.98)
    state, other = optimizer.init(params), plain.init(params)
    first, second = np.zeros((4, 7)), np.zeros((4, 1))
    for t, gradient in enumerate(gradients, start=1):
        tree = jax.tree.map(lambda _, g=gradient: jnp.asarray(g, jnp.float32), params)
        updates, state = optimizer.update(tree, state, params)
        expected, other = plain.update(tree, other, params)
        first = 0.9 * first + 0.1 * gradient
        second = 0.98 * second + 0.02 * (gradient**2).sum(axis=1, keepdims=True)
        by_definition = -1e-2 * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.98**t)) + 1e-8)
        np.testing.assert_allclose(updates["logits_dense"]["kernel"], by_definition, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(updates["wo"]["kernel"], expected["wo"]["kernel"], rtol=1e-5, atol=1e-9)


def test_a_linear_decay_needs_steps():
    with pytest.raises(UserError, match=r"learning_rate\.steps: None"):
        learning_rate(1.0, steps=None, decay="linear")
    assert learning_rate(2.0, steps=None)(5) == 2
