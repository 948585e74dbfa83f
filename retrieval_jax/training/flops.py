"""Floating-point operations (FLOPs) of a traced function's matrix products, with loops counted in full.

XLA's own `cost_analysis()` counts a loop's body once, however often it runs.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from retrieval_jax.examples.features import array_dtype
from retrieval_jax.models.text_groups import TextGroups


def matmul_flops(function: Callable, *args, trips: int = 1) -> int:
    """Counts the FLOPs of all matrix products of a function, on all devices together. Nothing is computed.

    A product of M×K and K×N takes 2·M·N·K FLOPs, times its batch dimensions. Everything else takes little,
    and is left out, as in the devices' peak FLOP/s. Of the branches of a `lax.cond` the largest counts.

    Args:
      function: the function.
      *args: its arguments: arrays, or jax.ShapeDtypeStruct.
      trips: the number of iterations of a `lax.while_loop`, which is only known when it runs. A `lax.scan`
        counts by its length.

    Returns:
      The number of FLOPs.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args), trips)


def jaxpr_flops(jaxpr: Jaxpr | ClosedJaxpr, trips: int = 1) -> int:
    """Counts the FLOPs of a traced function; see `matmul_flops`."""
    return sum(_equation_flops(equation, trips) for equation in jaxpr.eqns)


def _equation_flops(equation: JaxprEqn, trips: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval
        return 2 * equation.outvars[0].aval.size * math.prod(left.shape[d] for d in contracted)
    inner = [jaxpr_flops(jaxpr, trips) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while":
        return trips * sum(inner)
    if name == "shard_map":  # its body is one shard's
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    return sum(inner)


def _inner(params: Mapping) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yields the functions that an equation calls, as jit, remat, custom derivatives and loops do."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item


def model_flops(model, shapes: Mapping[str, tuple], groups: TextGroups | None = None) -> int:
    """Counts the FLOPs of a training step as the model FLOPs utilisation (MFU) has them.

    They are three times those of the forward pass, as the backward pass takes two products for each of its
    one (Chowdhery et al. 2022, appendix B). What rematerialisation computes again does not count.

    Args:
      model: has T5X's model interface.
      shapes: name -> shape of the arrays of a global batch.
      groups: the lengths at which the texts of a batch are encoded, for a model with `text_arrays`.

    Returns:
      The number of FLOPs.
    """
    variables = jax.eval_shape(lambda: nn.unbox(model.get_initial_variables(jax.random.key(0), shapes)))
    batch = {name: jax.ShapeDtypeStruct(shape, array_dtype(name)) for name, shape in shapes.items()}
    loss_fn = functools.partial(model.loss_fn, dropout_rng=None, groups=groups) if groups else model.eval_fn
    return 3 * matmul_flops(loss_fn, variables["params"], batch)
