"""How arrays are divided by the logical names of their axes, and an optimiser's state like its parameters."""

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh.partitioning import (
    Partitioner,
    all_devices,
    make_partitioner,
    params_shardings,
    specs_like_params,
)


def test_the_model_axis_divides_the_devices():
    devices = jax.devices()[:1] * 6  # a mesh may be described without as many devices
    assert all_devices(2, devices).shape == {"data": 3, "model": 2}
    assert all_devices(devices=devices).shape == {"data": 6, "model": 1}
    with pytest.raises(UserError, match=r"make_mesh\.model_parallelism: 4 does not divide 6 devices"):
        all_devices(4, devices)


def boxed(*names: str) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(jnp.zeros([2] * len(names)), names)


def test_parameters_lie_by_the_names_of_their_axes():
    mesh = all_devices(devices=jax.devices()[:1])
    params = {"embedding": boxed("vocab", "embed"), "both": boxed("mlp", "vocab"), "scale": boxed("embed")}
    specs = jax.tree.map(lambda sharding: sharding.spec, params_shardings(mesh, params))
    # Of `both`, the axis of the earlier rule has the mesh axis.
    assert specs == {"embedding": P("model", None), "both": P(None, "model"), "scale": P(None)}
    rules = (("vocab", ("model", "data")), ("mlp", None), ("embed", "data"))
    specs = jax.tree.map(lambda sharding: sharding.spec, params_shardings(mesh, params, rules))
    assert specs == {
        "embedding": P(("model", "data"), None),
        "both": P(None, ("model", "data")),
        "scale": P("data"),
    }


def test_gins_rules_reach_only_what_is_handed_them():
    """Placing parameters takes rules as an argument; the verbs' partitioner has those of gin."""
    mesh, params = all_devices(devices=jax.devices()[:1]), {"embedding": boxed("vocab", "embed")}
    with gin.unlock_config():
        gin.bind_parameter("axis_rules.rules", (("vocab", None), ("embed", "data")))
        gin.bind_parameter("make_mesh.model_parallelism", 1)
    try:
        mesh_of_gin, rules = make_partitioner()
    finally:
        gin.clear_config()
    assert dict(mesh_of_gin.shape) == {"data": len(jax.devices()), "model": 1}
    assert params_shardings(mesh, params)["embedding"].spec == P("model", None)
    assert params_shardings(mesh, params, rules)["embedding"].spec == P(None, "data")
    assert Partitioner(mesh_of_gin, rules).local == (mesh_of_gin, rules)  # of one process


def test_an_optimisers_state_lies_like_its_parameters():
    params = {"a": {"kernel": jnp.zeros((4, 8))}, "b": {"kernel": jnp.zeros((8, 4)), "scale": jnp.zeros(4)}}
    specs = {"a": {"kernel": P("data", "model")}, "b": {"kernel": P("model", None), "scale": P("model")}}

    def specs_by_shape(optimizer: optax.GradientTransformation, name: str) -> list[tuple[str, tuple, P]]:
        """(path, shape, spec) of the leaves of the state of the parameters called NAME."""
        state = jax.eval_shape(optimizer.init, params)
        found = jax.tree_util.tree_leaves_with_path(specs_like_params(state, params, specs))
        shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
        paths = [jax.tree_util.keystr(path) for path, _ in found]
        every = [(path, shape, spec) for path, shape, (_, spec) in zip(paths, shapes, found, strict=True)]
        return [some for some in every if name in some[0]]

    adam = optax.adam(1.0)
    for path, name in (("['a']['kernel']", P("data", "model")), ("['b']['scale']", P("model"))):
        assert [spec for *_, spec in specs_by_shape(adam, path)] == [name, name]  # both moments
    assert [spec for *_, spec in specs_by_shape(adam, "count")] == [P()]
    # Adafactor's moments over rows and over columns lack one axis of the parameter's.
    factored = {
        shape: spec
        for path, shape, spec in specs_by_shape(optax.adafactor(min_dim_size_to_factor=2), "['a']['kernel']")
    }
    assert factored[(4,)] == P("data")
    assert factored[(8,)] == P("model")
