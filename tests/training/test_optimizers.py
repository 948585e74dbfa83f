"""Schedules and rates by name."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retrieval_jax.errors import UserError
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
