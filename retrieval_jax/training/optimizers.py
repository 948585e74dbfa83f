"""Optimisers that gin configures: optax's AdamW and Adafactor, learning-rate schedules and multipliers."""

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from retrieval_jax.checkpoints.parameter_names import LastName
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Dtype, NonNegative, PositiveFloat
from retrieval_jax.models.layers import STACK_AXIS
from retrieval_jax.models.stacks import is_stacked

EPSILON = 1e-30  # what Adafactor adds to a gradient's squares
Multipliers = Mapping[Annotated[str, LastName], float]


@gin.configurable
def learning_rate(
    peak: PositiveFloat, steps: NonNegative | None, warmup: NonNegative = 0, decay: str = "constant"
) -> optax.Schedule:
    """Makes a learning-rate schedule with a linear warm-up.

    Args:
      peak: the highest rate, which is reached after the warm-up.
      steps: the step at which a linear decay reaches 0; None only for other decays.
      warmup: number of steps of the warm-up from 0.
      decay: what follows: "constant", "linear" to 0, or "rsqrt", in proportion to 1/sqrt(step).

    Returns:
      An optax schedule.

    Raises:
      UserError: there is no such decay, or a linear one without steps.
    """
    if decay == "linear":
        if steps is None:
            raise UserError("learning_rate.steps: None, and a linear decay ends with them: --STEPS=1000")
        after = optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
    elif decay == "rsqrt":
        start = max(warmup, 1)

        def after(step):
            return peak * (start / (jnp.maximum(step, 0) + start)) ** 0.5

    elif decay == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise UserError(f"learning_rate.decay: no decay {decay!r}: constant, linear or rsqrt")
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


@gin.configurable
def adamw(
    schedule: optax.Schedule,
    multipliers: Multipliers | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    momentum_dtype: Dtype | None = None,
    shared_moments: Sequence[Annotated[str, LastName]] = (),
) -> optax.GradientTransformation:
    """Makes AdamW (Loshchilov and Hutter 2019).

    A model that is trained from scratch for only minutes needs a much higher rate for the embedding and the
    output softmax than for the layers between them: multipliers = {"embedding": 50, "logits_dense": 10}, say.

    Args:
      schedule: the learning rate.
      multipliers: factors on the learning rate by the last or the last but one part of a parameter's name;
        the name must be that of a parameter of some network of this project.
      b1: the decay rate of the first moment.
      b2: the decay rate of the second moment.
      weight_decay: the decoupled weight decay.
      momentum_dtype: dtype of the first moment; "bfloat16" halves its memory. The second moment is always
        float32: bfloat16 would round its small changes away.
      shared_moments: parameters, named as in `multipliers`, whose outputs (the last axis) have one second
        moment together, the sum of theirs; see `_scale_by_adam`.

    Returns:
      The optimiser.
    """
    adam = optax.chain(
        _scale_by_adam(b1, b2, momentum_dtype, shared_moments), optax.add_decayed_weights(weight_decay)
    )
    return optax.chain(adam, _scale_by_name(multipliers or {}), _scale_by_rate(schedule))


def _scale_by_adam(
    b1: float, b2: float, momentum_dtype: str | None, shared: Sequence[str]
) -> optax.GradientTransformation:
    """Makes Adam's scaling, with one second moment for all outputs of the parameters in `shared`.

    A docid of one token is the target of one example in N, so that its column of the softmax has one large
    gradient in N / B steps. With a second moment of its own, which forgets in between, Adam takes full steps
    along the tiny gradients by which all other examples push the column away, and the columns of the last few
    batches outgrow all others: where N / B is well above 1 / (1 - b2), the loss stays at chance. Divided by
    the root of the moment's sum over the columns, gradients keep their sizes beside one another, and what a
    column moves by one example does not depend on N.
    """
    plain = optax.scale_by_adam(b1, b2, mu_dtype=momentum_dtype)
    if not shared:
        return plain

    def squared(path, g: jax.Array) -> jax.Array:
        square = jnp.square(g)
        return jnp.sum(square, axis=-1) if set(shared).intersection(_names(path)) else square

    def init(params) -> optax.ScaleByAdamState:
        moments = jax.tree_util.tree_map_with_path(squared, params)
        return plain.init(params)._replace(nu=jax.tree.map(jnp.zeros_like, moments))

    def update(updates, state: optax.ScaleByAdamState, _=None):
        count = optax.safe_increment(state.count)
        squares = jax.tree_util.tree_map_with_path(squared, updates)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(squares, state.nu, b2, 1)
        first, second = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        scaled = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v if v.shape == m.shape else v[..., None]) + 1e-8), first, second
        )
        return scaled, optax.ScaleByAdamState(count, optax.tree.cast(mu, momentum_dtype), nu)

    return optax.GradientTransformation(init, update)


@gin.configurable
def adafactor(
    schedule: optax.Schedule, multipliers: Multipliers | None = None, decay_rate: float = 0.8
) -> optax.GradientTransformation:
    """Makes Adafactor (Shazeer and Stern 2018, algorithm 5) as T5X configures it.

    Second moments are factored where an array has two axes of at least 128 elements. The root mean square of
    an update is clipped at 1, and multiplied by that of the parameter (at least 1e-3). There is no momentum.
    In a scanned stack each layer counts as an array of its own, as in a stack that is not scanned.

    Args:
      schedule: the learning rate.
      multipliers: see `adamw`.
      decay_rate: the exponent of the second moment's decay.

    Returns:
      The optimiser.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, epsilon=EPSILON),
        optax.stateless(_clip_rms),
        optax.stateless(_scale_by_parameter_rms),
        _scale_by_name(multipliers or {}),
        _scale_by_rate(schedule),
    )


def _clip_rms(updates, _=None):
    return jax.tree_util.tree_map_with_path(lambda path, u: u / jnp.maximum(1.0, _rms(path, u)), updates)


def _scale_by_parameter_rms(updates, params):
    return jax.tree_util.tree_map_with_path(
        lambda path, u, p: u * jnp.maximum(1e-3, _rms(path, p)), updates, params
    )


def _rms(path, x: jax.Array) -> jax.Array:
    """Gives the root mean square of an array, or of each layer's part of it, in a shape that broadcasts."""
    stacked = is_stacked(tuple(str(getattr(key, "key", key)) for key in path))
    axes = tuple(axis for axis in range(x.ndim) if not (stacked and axis == STACK_AXIS))
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


class RateState(NamedTuple):
    """The number of steps taken (int32), and the learning rate of the last one, for the learning curve."""

    count: jax.Array
    learning_rate: jax.Array


def _scale_by_rate(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Multiplies by minus the schedule's rate, and keeps the rate in the state."""

    def init(_) -> RateState:
        return RateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state: RateState, _=None):
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        scaled = jax.tree.map(lambda x: -rate.astype(x.dtype) * x, updates)
        return scaled, RateState(optax.safe_increment(state.count), rate)

    return optax.GradientTransformation(init, update)


def _scale_by_name(multipliers: Multipliers) -> optax.GradientTransformation:
    """Multiplies each parameter's update by the factor of its name (see `adamw`)."""

    def scale(updates, _=None):
        def one(path, update):
            return update * next((multipliers[name] for name in _names(path) if name in multipliers), 1.0)

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(scale)


def _names(path: tuple) -> list[str]:
    """Gives the last two parts of a parameter's name."""
    return [str(getattr(key, "key", key)) for key in path[-2:]]
