"""One mesh with axes `data` and `model`; arrays are placed by the logical names of their axes."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import flax.linen as nn
import gin
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Names, Positive

LOGICAL_AXES = ("batch", "vocab", "mlp", "heads", "joined_kv", "pawa", "embed", "layers", "relpos_buckets")
MESH_AXES = ("data", "model")
LogicalAxis = Annotated[str, Names("a logical axis", LOGICAL_AXES)]
MeshAxis = Annotated[str, Names("an axis of the mesh", MESH_AXES)]
Rules = Sequence[tuple[LogicalAxis, MeshAxis | tuple[MeshAxis, ...] | None]]


DEFAULT_RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("pawa", "model"),
    ("embed", None),
    ("layers", None),
    ("relpos_buckets", None),
)
"""T5X's default rules."""


class Partitioner(NamedTuple):
    """The devices to run on, and the rules by which parameters are divided over them.

    Attributes:
      mesh: the devices.
      rules: (logical axis, the mesh axis or axes that it is divided over, or None) pairs; see `axis_rules`.
    """

    mesh: Mesh
    rules: Rules = DEFAULT_RULES

    @property
    def local(self) -> "Partitioner":
        """The same for the devices of this process alone, which then works on its own."""
        return Partitioner(self.mesh.local_mesh, self.rules)


def all_devices(model_parallelism: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices as a mesh of data × model.

    Args:
      model_parallelism: the number of devices that share one copy of the weights.
      devices: the devices; None for all.

    Returns:
      The mesh, with the axes `data` and `model`.

    Raises:
      UserError: `model_parallelism` does not divide the number of devices.
    """
    devices = np.array(jax.devices() if devices is None else devices)
    if devices.size % model_parallelism:
        raise UserError(
            f"make_mesh.model_parallelism: {model_parallelism} does not divide {devices.size} devices: "
            "set one that does"
        )
    return Mesh(devices.reshape(-1, model_parallelism), MESH_AXES)


@gin.configurable
def make_mesh(model_parallelism: Positive = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that gin sets. Verbs call this, and hand the mesh to everything that computes on it.

    Args:
      model_parallelism: the number of devices that share one copy of the weights.
      devices: the devices; None for all.
    """
    return all_devices(model_parallelism, devices)


@gin.configurable
def axis_rules(rules: Rules = DEFAULT_RULES) -> Rules:
    """Gives the rules that gin sets, by which arrays are divided over a mesh. Only verbs call this.

    Args:
      rules: (logical axis, the mesh axis or axes that it is divided over, or None) pairs. If two axes of an
        array ask for the same mesh axis, the earlier rule has it. gin_configs/sharding/ has other rules.

    Returns:
      The rules, to be handed to all that divides parameters over a mesh.
    """
    return tuple(rules)


def make_partitioner() -> Partitioner:
    """Makes the partitioner that gin configures. Only verbs call this, and hand it to what loads a model."""
    return Partitioner(make_mesh(), axis_rules())


@contextlib.contextmanager
def mesh_context(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """A context in which traced functions may place arrays on the mesh by the names of logical axes."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(tuple(rules)):
        yield


def params_shardings(mesh: Mesh, boxed_params: dict, rules: Rules = DEFAULT_RULES) -> dict:
    """Gives a NamedSharding for each parameter.

    Args:
      mesh: the devices.
      boxed_params: parameters that are boxed with the logical names of their axes, as Flax's `init` gives
        them.
      rules: the mesh axes of each logical axis.

    Returns:
      A tree of the same structure.
    """
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_params), mesh, tuple(rules))


def like_params(mesh: Mesh, tree: object, params: dict, shardings: dict) -> object:
    """Returns shardings for an optimiser's state; see `specs_like_params`.

    Args:
      mesh: the devices.
      tree: the state, or its shapes.
      params: the parameters, or their shapes.
      shardings: the sharding of each parameter.
    """
    specs = specs_like_params(tree, params, jax.tree.map(lambda sharding: sharding.spec, shardings))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def specs_like_params(tree: object, params: dict, specs: dict) -> object:
    """Returns PartitionSpecs for an optimiser's state.

    A leaf with the name and shape of a parameter has the parameter's spec. A leaf that lacks one axis of a
    parameter (Adafactor's factored moments) has the spec without that axis. Other leaves (counts) are small,
    and are on every device.

    Args:
      tree: the state, or its shapes.
      params: the parameters, or their shapes.
      specs: the PartitionSpec of each parameter.
    """
    known = {
        jax.tree_util.keystr(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True
        )
    }

    def like(path, leaf) -> PartitionSpec:
        for i in range(len(path)):
            shape, spec = known.get(jax.tree_util.keystr(path[i:]), (None, None))
            if shape is None:
                continue
            if shape == leaf.shape:
                return spec
            axes = (*spec, *[None] * (len(shape) - len(spec)))
            for axis in range(len(shape)):
                if leaf.shape == shape[:axis] + shape[axis + 1 :]:
                    return PartitionSpec(*axes[:axis], *axes[axis + 1 :])
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(like, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, whose rows are divided over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))
