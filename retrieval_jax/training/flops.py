"""Floating-point operations of a traced function: what its matrix products take, loops counted in full.

XLA's own `cost_analysis()` counts a loop's body once, however often it runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def matmul_flops(function: Callable, *args, trips: int = 1) -> int:
    """FLOPs of all matrix products of `function(*args)`, of all devices together; nothing is computed.

    A product of M×K and K×N takes 2·M·N·K, times its batch dimensions. Everything else is left out: it is
    little, and is not what peak FLOP/s are of. Of several branches the largest counts.

    Args:
      args: arrays, or jax.ShapeDtypeStruct.
      trips: how often a loop runs whose end is only found while it runs (`lax.while_loop`). Loops of a known
        length count by it.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args), trips)


def jaxpr_flops(jaxpr: Jaxpr | ClosedJaxpr, trips: int = 1) -> int:
    """See `matmul_flops`."""
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
    """The functions that an equation calls: those of jit, remat, custom derivatives, loops and branches."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item


def model_flops(model, shapes: Mapping[str, tuple]) -> int:
    """FLOPs of one training step on a batch of these shapes, as convention counts them for MFU.

    Three times the forward pass's: the backward pass takes two products for each of its one (Chowdhery et al.
    2022, appendix B). What rematerialisation computes again does not count.
    """
    variables = jax.eval_shape(lambda: nn.unbox(model.get_initial_variables(jax.random.key(0), shapes)))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    return 3 * matmul_flops(model.eval_fn, variables["params"], batch)
