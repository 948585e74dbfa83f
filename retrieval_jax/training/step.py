"""The training step: the state that it changes, how that state lies on a mesh, and the jitted function."""

import functools
from collections.abc import Callable, Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.checkpoints.weights import LazyArray, to_devices
from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.text_groups import TextGroups
from retrieval_jax.training.optimizers import EPSILON


@flax.struct.dataclass
class TrainState:
    """What a training step changes.

    Attributes:
      params: the parameters.
      optimizer: the optimiser's state.
      step: int32, the number of steps taken.
    """

    params: dict
    optimizer: optax.OptState
    step: jax.Array


def abstract_state(
    model,
    mesh: Mesh,
    shapes: Mapping[str, tuple],
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> TrainState:
    """Gives the shapes, dtypes and shardings of a model's state, which restoring and compiling need.

    Args:
      model: has T5X's model interface, and an optimiser.
      mesh: the devices that the state lies on.
      shapes: name -> shape of the arrays of a global batch.
      rules: the mesh axes of each logical axis.

    Returns:
      A TrainState of jax.ShapeDtypeStruct.
    """
    boxed = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes)["params"])
    state = jax.eval_shape(lambda: _init(model, shapes, 0))
    params = partitioning.params_shardings(mesh, boxed, rules)
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
    """Makes the state before the first step where it lies on the mesh: no host ever holds all of it.

    Args:
      model: has T5X's model interface, and an optimiser.
      abstract: shapes and shardings, as `abstract_state` gives them.
      shapes: name -> shape of the arrays of a global batch.
      seed: of the random parameters.
      pretrained_params: parameters by name, with slashes; all others are random.

    Returns:
      The state, on the mesh.
    """
    pretrained_params, like = pretrained_params or {}, flatten_dict(abstract.params, sep="/")
    read = {name: to_devices(array, like[name]) for name, array in pretrained_params.items()}

    def begin(read: dict[str, jax.Array]) -> TrainState:
        params = flatten_dict(_init(model, shapes, seed).params, sep="/")
        for name, x in read.items():
            if pretrained_params[name].valid_ranges:  # and the rest of it random
                axis, ranges = pretrained_params[name].valid_ranges
                number = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
                is_given = functools.reduce(
                    jnp.logical_or, ((start <= number) & (number < stop) for start, stop in ranges)
                )
                x = jnp.where(is_given, x, params[name])
            params[name] = x
        params = unflatten_dict(params, sep="/")
        return TrainState(params, model.optimizer_def.init(params), np.int32(0))

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(read)


def _init(model, shapes: Mapping[str, tuple], seed: int) -> TrainState:
    params = nn.unbox(model.get_initial_variables(jax.random.key(seed), shapes)["params"])
    return TrainState(params, model.optimizer_def.init(params), np.int32(0))


def make_train_step(
    model,
    mesh: Mesh,
    abstract: TrainState,
    seed: int = 0,
    *,
    microbatches: int = 1,
    random_bits: str = "threefry2x32",
    can_skip: bool = False,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    groups: TextGroups | None = None,
) -> Callable:
    """Makes the jitted training step.

    Args:
      model: its `loss_fn` gives the loss and metrics {name: (total, count)}, the loss among them.
      mesh: the devices that the step runs on.
      abstract: the state that the step changes, as `abstract_state` gives it.
      seed: of dropout, together with the number of the step.
      microbatches: number of equal parts of a batch whose gradients are accumulated, for less memory. A part
        counts by its tokens, so that the gradient is that of the whole batch. The in-batch negatives of a
        dual encoder, and the means of FLOPS regularisers, are those of the part.
      random_bits: the generator of dropout's random bits: "threefry2x32", or "rbg", which uses the own
        generator of a TPU or GPU and is much faster there.
      can_skip: whether the step may leave out its update; see below.
      rules: the mesh axes of each logical axis.
      groups: the lengths at which the texts of a batch are encoded, for a model with `text_arrays`.

    Returns:
      (state, batch) -> (state, metrics). The memory of the old state is donated. Metrics are float32 means
      over the batch, with `gradient_norm` and `learning_rate`.

      With `can_skip`: (state, batch, limit) -> (state, metrics), where `limit` is a float32 scalar. If the
      loss is above the limit, or the loss or the norm of the gradient is not finite, parameters and optimiser
      state stay as they were and only the step is counted. The metric `skipped` is then 1, else 0.
    """
    loss_fn = functools.partial(model.loss_fn, groups=groups) if groups else model.loss_fn
    gradients_of = _gradients(loss_fn, microbatches)

    def train_step(
        state: TrainState, batch: Mapping[str, jax.Array], limit: jax.Array | None = None
    ) -> tuple[TrainState, dict]:
        # A function of the step alone, so that a resumed run draws the same dropout.
        key = jax.random.fold_in(jax.random.key(seed, impl=random_bits), state.step)
        if getattr(model, "reads_step", False):  # one for each example, as microbatches need
            examples = len(next(iter(batch.values())))
            batch = {**batch, "step": jnp.full(examples, state.step)}
        with partitioning.mesh_context(mesh, rules):
            gradients, totals = gradients_of(state.params, batch, key)
        updates, optimizer = model.optimizer_def.update(gradients, state.optimizer, state.params)
        metrics = {name: total / jnp.maximum(count, 1e-9) for name, (total, count) in totals.items()}
        metrics |= {
            "gradient_norm": _norm(gradients),
            "learning_rate": optax.tree_utils.tree_get(optimizer, "learning_rate", 0.0),
        }
        changed = (optax.apply_updates(state.params, updates), optimizer)
        if can_skip:
            loss = metrics["loss"]
            applies = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"]) & (loss <= limit)
            unchanged = (state.params, state.optimizer)
            changed = jax.tree.map(lambda new, old: jnp.where(applies, new, old), changed, unchanged)
            metrics["skipped"] = 1.0 - applies
        return TrainState(*changed, state.step + 1), metrics

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        train_step,
        in_shardings=(shardings, partitioning.batch_sharding(mesh), *[shardings.step] * can_skip),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def _gradients(loss_fn: Callable, microbatches: int) -> Callable:
    """Makes (params, batch, key) -> (gradients, metrics), accumulated over the parts of a batch."""

    def gradients_of(params: dict, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[dict, dict]:
        (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
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

    return accumulated if microbatches > 1 else gradients_of


def _norm(gradients: dict) -> jax.Array:
    """Gives the Euclidean norm of the gradients.

    Adafactor averages the same squares (with its epsilon) over each array's longest axis: asked for in that
    way they are one computation, and the norm, which guards every step, does not read the gradients again.
    """

    def squares(g: jax.Array) -> jax.Array:
        g = jnp.atleast_1d(g)
        longest = int(np.argsort(g.shape)[-1])
        return g.shape[longest] * jnp.sum(jnp.mean(jnp.square(g) + EPSILON, axis=longest))

    return jnp.sqrt(sum(map(squares, jax.tree.leaves(gradients))))


def _parts(x: jax.Array, count: int) -> jax.Array:
    """Reshapes B×… to (B/count)×count×…."""
    if len(x) % count:
        raise UserError(f"train.microbatches: {count} does not divide the batch of {len(x)}: change one")
    return x.reshape(len(x) // count, count, *x.shape[1:])
