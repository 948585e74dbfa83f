"""What a training step is: the state it changes, how that state lies on the mesh, and the jitted step."""

from collections.abc import Callable, Mapping

import flax
import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.checkpoints.weights import LazyArray, to_devices
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Positive
from retrieval_jax.mesh import partitioning
from retrieval_jax.training.optimizers import EPSILON


@flax.struct.dataclass
class TrainState:
    """What a step changes: parameters, the optimiser's state, and the number of steps taken (int32)."""

    params: dict
    optimizer: optax.OptState
    step: jax.Array


def abstract_state(model, mesh: Mesh, shapes: Mapping[str, tuple]) -> TrainState:
    """Shapes, dtypes and shardings of a model's state: what restoring, compiling and making it need.

    `shapes` are those of a batch's arrays.
    """
    boxed = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes)["params"])
    state = jax.eval_shape(lambda: _init(model, shapes, 0))
    params = partitioning.params_shardings(mesh, boxed)
    optimizer = partitioning.like_params(mesh, state.optimizer, state.params, params)
    shardings = TrainState(params, optimizer, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, shardings
    )


def initial_state(
    model,
    abstract: TrainState,
    shapes: Mapping[str, tuple],
    seed: int,
    pretrained_params: Mapping[str, LazyArray] | None = None,
) -> TrainState:
    """The state before the first step, made where it lies on the mesh: no host ever holds all of it.

    Parameters are `pretrained_params`, by name (with slashes), and otherwise random.
    """
    pretrained_params, like = pretrained_params or {}, flatten_dict(abstract.params, sep="/")
    read = {name: to_devices(array, like[name]) for name, array in pretrained_params.items()}

    def begin(read: dict[str, jax.Array]) -> TrainState:
        params = flatten_dict(_init(model, shapes, seed).params, sep="/")
        for name, x in read.items():
            if pretrained_params[name].valid_extent:  # and the rest of it random
                axis, count = pretrained_params[name].valid_extent
                x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < count, x, params[name])
            params[name] = x
        params = unflatten_dict(params, sep="/")
        return TrainState(params, model.optimizer_def.init(params), np.int32(0))

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(read)


def _init(model, shapes: Mapping[str, tuple], seed: int) -> TrainState:
    params = nn.unbox(model.get_initial_variables(jax.random.key(seed), shapes)["params"])
    return TrainState(params, model.optimizer_def.init(params), np.int32(0))


@gin.configurable(allowlist=["microbatches", "random_bits"])
def make_train_step(
    model,
    mesh: Mesh,
    abstract: TrainState,
    seed: int,
    microbatches: Positive = 1,
    random_bits: str = "threefry2x32",
    skips: bool = False,
) -> Callable:
    """The jitted step: (state, batch) -> (state, metrics); the old state's memory is given up.

    With `skips` it is (state, batch, limit) -> (state, metrics): where the loss is above the limit (float32
    scalar), or the loss or the gradient's norm is not finite, the parameters and the optimiser's state stay
    as they were and only the step is counted. The metric `skipped` is then 1, and otherwise 0.

    Args:
      model: its `loss_fn` gives the loss and metrics {name: (total, count)}, the loss's own among them.
      mesh, abstract: see `abstract_state`.
      seed: of the dropout, with the step.
      microbatches: equal parts of a batch whose gradients are added up, for less memory. The parts count by
        their tokens, so that the gradient is the whole batch's. A dual encoder's in-batch negatives are
        those of the part.
      random_bits: makes dropout's bits; "rbg" uses a TPU's or GPU's own generator, which is much faster
        there.
      skips: see above.

    Metrics are float32 means, the gradient's norm and the learning rate.
    """

    def gradients_of(params: dict, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[dict, dict]:
        (_, metrics), gradients = jax.value_and_grad(model.loss_fn, has_aux=True)(params, batch, key)
        return gradients, metrics

    def accumulated(params: dict, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[dict, dict]:
        # Part i takes rows i, i + microbatches, …: each device keeps its own rows.
        parts = {name: jnp.moveaxis(_parts(x, microbatches), 1, 0) for name, x in batch.items()}

        def add(total, part):
            batch, number = part
            gradients, metrics = gradients_of(params, batch, jax.random.fold_in(key, number))
            count = metrics["loss"][1]
            weighted = jax.tree.map(lambda g: g * count, gradients)
            return jax.tree.map(jnp.add, total, (weighted, metrics)), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients_of, params, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, metrics), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(microbatches)))
        return jax.tree.map(lambda g: g / jnp.maximum(metrics["loss"][1], 1e-9), gradients), metrics

    def train_step(
        state: TrainState, batch: Mapping[str, jax.Array], limit: jax.Array | None = None
    ) -> tuple[TrainState, dict]:
        # A function of the step alone, so a resumed run draws the same dropout.
        key = jax.random.fold_in(jax.random.key(seed, impl=random_bits), state.step)
        with partitioning.mesh_context(mesh):
            gradients, metrics = (accumulated if microbatches > 1 else gradients_of)(state.params, batch, key)
        updates, optimizer = model.optimizer_def.update(gradients, state.optimizer, state.params)
        told = {name: total / jnp.maximum(count, 1e-9) for name, (total, count) in metrics.items()}
        told |= {
            "gradient_norm": _norm(gradients),
            "learning_rate": optax.tree_utils.tree_get(optimizer, "learning_rate", 0.0),
        }
        changed = (optax.apply_updates(state.params, updates), optimizer)
        if skips:
            loss = told["loss"]
            applies = jnp.isfinite(loss) & jnp.isfinite(told["gradient_norm"]) & (loss <= limit)
            unchanged = (state.params, state.optimizer)
            changed = jax.tree.map(lambda new, old: jnp.where(applies, new, old), changed, unchanged)
            told["skipped"] = 1.0 - applies
        return TrainState(*changed, state.step + 1), told

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        train_step,
        in_shardings=(shardings, partitioning.batch_sharding(mesh), *[shardings.step] * skips),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def _norm(gradients: dict) -> jax.Array:
    """The gradients' Euclidean norm.

    Adafactor averages the same squares (with its epsilon) over each array's longest axis: asked for in that
    way they are one computation, and the norm, which guards every step, does not read the gradients again.
    """

    def squares(g: jax.Array) -> jax.Array:
        g = jnp.atleast_1d(g)
        longest = int(np.argsort(g.shape)[-1])
        return g.shape[longest] * jnp.sum(jnp.mean(jnp.square(g) + EPSILON, axis=longest))

    return jnp.sqrt(sum(map(squares, jax.tree.leaves(gradients))))


def _parts(x: jax.Array, count: int) -> jax.Array:
    """B×… as (B/count)×count×…"""
    if len(x) % count:
        raise UserError(
            f"make_train_step.microbatches: {count} does not divide the batch of {len(x)}: change one"
        )
    return x.reshape(len(x) // count, count, *x.shape[1:])
