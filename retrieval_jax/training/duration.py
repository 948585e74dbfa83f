"""How long a training takes on this machine: an estimate, before anything is compiled.

A step's time is that of its matrix products, at a part of the speed that one large product reaches here; of
the optimiser, which reads and writes each parameter and its moments; and of the embeddings, which are read
and added to. What is not a step is taken to be the same for all trainings.
"""

import math
import statistics
import time
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from retrieval_jax.training.flops import model_flops

# Fitted to networks 256 wide on 2 CPU cores: within a fifth of what three trainings
# with layers took. On an accelerator it is a guess.
EFFICIENCY = 0.68  # the part of a large product's speed that a training step reaches
OPTIMIZER_FLOPS = 400  # of a product, in the time of a parameter's update
EMBEDDING_FLOPS = 800  # of a product, in the time of a number of a token's embedding
# Seconds of compiling, evaluating and saving: 11, 22 and 22 in the trainings of `demo` on 2 CPU cores.
BESIDE_STEPS = 18
_M, _K, _N, _TIMES = 2048, 256, 4096, 10  # the product that is measured, and how often


def product_speed() -> float:
    """Measures the FLOP/s of a float32 matrix product on the first device, as fast as it is at present."""
    x, y = jnp.ones((_M, _K)), jnp.ones((_K, _N))
    multiply = jax.jit(jnp.dot)
    multiply(x, y).block_until_ready()
    seconds = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        multiply(x, y).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * _M * _K * _N / statistics.median(seconds)


def training_seconds(model, shapes: Mapping[str, tuple], steps: int, speed: float, devices: int = 1) -> float:
    """Estimates the seconds of so many steps (see `step_seconds`), and of what is done beside them."""
    return BESIDE_STEPS + steps * step_seconds(model, shapes, speed, devices)


def step_seconds(model, shapes: Mapping[str, tuple], speed: float, devices: int = 1) -> float:
    """Estimates the seconds of a training step.

    Args:
      model: has T5X's model interface.
      shapes: name -> shape of the arrays of a global batch.
      speed: a device's FLOP/s; see `product_speed`.
      devices: how many devices share a step.

    Returns:
      The seconds.
    """
    variables = jax.eval_shape(lambda: nn.unbox(model.get_initial_variables(jax.random.key(0), shapes)))
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    tokens = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("encoder_input_tokens"))
    flops = model_flops(model, shapes) + OPTIMIZER_FLOPS * parameters
    flops += EMBEDDING_FLOPS * tokens * model.config.emb_dim
    return flops / (EFFICIENCY * speed * devices)
