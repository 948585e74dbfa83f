"""The output softmax: its float32 logits, and the cross-entropy where they are too many for the memory.

Letters in shapes: N tokens (of any batch), E embedding, V outputs of the softmax, C outputs of a block, S
candidate tokens, B queries, K beams.

Whatever the dtype of the network, this layer reads its input as float32, multiplies it by the float32 kernel
and adds up in float32, as T5X does: bfloat16 has 8 significant bits, so that of 40 neighbouring logits about
half are equal. Every logit of this module is made by `logits_of`, so that training (with or without
`max_logits_per_block`), search and scoring have the same numbers.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

LOG_Z_GROUPS = 8  # see `log_z`
LOG_Z_BLOCK = 2048  # outputs of a block, of all groups together
NEG_INF = -1e30  # stands for log 0; finite, so that no gradient is NaN


def logits_of(x: jax.Array, kernel_ExV: jax.Array) -> jax.Array:
    """Computes logits.

    In training the product has JAX's default precision, as in T5X: a TPU rounds its float32 inputs to 8
    significant bits and a GPU to 11, a CPU does not. Sums and results are float32 on all of them. Search and
    scoring, whose results are called exact, use `exact_products`.

    Args:
      x: …×E, of any dtype.
      kernel_ExV: float32.

    Returns:
      Float32 …×V.
    """
    return jnp.dot(x.astype(jnp.float32), kernel_ExV, preferred_element_type=jnp.float32)


def exact_products() -> AbstractContextManager:
    """Gives a context in which products of float32 arrays do not round; a TPU takes six times as long."""
    return jax.default_matmul_precision("highest")


def candidate_logits(
    x_BxKxE: jax.Array, kernel_ExV: jax.Array, tokens_S: jax.Array, with_log_z: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the logits of candidate tokens, and what normalises them.

    Args:
      x_BxKxE: of any dtype.
      kernel_ExV: float32.
      tokens_S: int32, the candidates.
      with_log_z: whether the log-sum-exp is computed, for which the logits of all tokens are needed.

    Returns:
      (float32 logits B×K×S of the candidates, float32 log-sum-exp B×K of all V logits or None).
    """
    V = kernel_ExV.shape[1]
    blocks = log_z_blocks(V)
    if 2 * len(tokens_S) > V or (with_log_z and blocks == 1):
        logits_BxKxV = logits_of(x_BxKxE, kernel_ExV)
        return logits_BxKxV[..., tokens_S], jax.nn.logsumexp(logits_BxKxV, axis=-1) if with_log_z else None
    return (
        logits_of(x_BxKxE, kernel_ExV[:, tokens_S]),
        log_z(x_BxKxE, kernel_ExV, blocks) if with_log_z else None,
    )


def token_scores(
    x_BxKxE: jax.Array, kernel_ExV: jax.Array, tokens_BxK: jax.Array, with_log_z: bool = True
) -> jax.Array:
    """Computes the score of one token each, without holding all logits of a large softmax.

    Args:
      x_BxKxE: of any dtype.
      kernel_ExV: float32.
      tokens_BxK: int32.
      with_log_z: whether the scores are log-probabilities; otherwise they are logits.

    Returns:
      Float32 B×K.
    """
    blocks = log_z_blocks(kernel_ExV.shape[1])
    if with_log_z and blocks == 1:
        log_probs_BxKxV = jax.nn.log_softmax(logits_of(x_BxKxE, kernel_ExV))
        return jnp.take_along_axis(log_probs_BxKxV, tokens_BxK[..., None], axis=-1)[..., 0]
    own_BxK = jnp.einsum("bke,ebk->bk", x_BxKxE.astype(jnp.float32), kernel_ExV[:, tokens_BxK])
    return own_BxK - log_z(x_BxKxE, kernel_ExV, blocks) if with_log_z else own_BxK


def log_z_blocks(size: int) -> int:
    """Gives the number of blocks, of about 2,048 outputs each, that `log_z` cuts a softmax of `size` into."""
    return max(round(size / LOG_Z_BLOCK), 1) if size % LOG_Z_GROUPS == 0 else 1


def log_z(x_BxKxE: jax.Array, kernel_ExV: jax.Array, blocks: int) -> jax.Array:
    """Computes the log-sum-exp of all logits x · kernel, which are never in memory together.

    A block takes a part of each of eight groups of outputs, so that a kernel that is sharded over its outputs
    is multiplied where it lies; the groups are added up at the end.

    Args:
      x_BxKxE: of any dtype.
      kernel_ExV: float32.
      blocks: see `log_z_blocks`.

    Returns:
      Float32 B×K.
    """
    E, V = kernel_ExV.shape
    cut = Blocks.of(V // LOG_Z_GROUPS, -(-V // LOG_Z_GROUPS // blocks))
    groups_ExGxH = kernel_ExV.reshape(E, LOG_Z_GROUPS, cut.size)
    shape = (*x_BxKxE.shape[:2], LOG_Z_GROUPS)

    def add(carry, number):
        largest_BxKxG, total_BxKxG = carry
        first, new_C = cut.at(number)
        part = jax.lax.dynamic_slice_in_dim(groups_ExGxH, first, cut.width, axis=2).reshape(E, -1)
        logits_BxKxGxC = logits_of(x_BxKxE.reshape(-1, E), part).reshape(*shape, -1)
        logits_BxKxGxC = masked(new_C, logits_BxKxGxC, -jnp.inf)
        largest = jnp.maximum(largest_BxKxG, jnp.max(logits_BxKxGxC, axis=-1))
        total_BxKxG *= jnp.exp(largest_BxKxG - largest)
        total_BxKxG += jnp.sum(jnp.exp(logits_BxKxGxC - largest[..., None]), axis=-1)
        return (largest, total_BxKxG), None

    start = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32))
    (largest_BxKxG, total_BxKxG), _ = jax.lax.scan(add, start, jnp.arange(cut.count))
    return jax.nn.logsumexp(largest_BxKxG + jnp.log(total_BxKxG), axis=-1)


class Blocks(NamedTuple):
    """A cut of `size` columns into `count` blocks of equal `width`; the last one overlaps the one before.

    Blocks need not divide the columns: a number without divisors is cut as well as any other.
    """

    size: int
    width: int
    count: int

    @classmethod
    def of(cls, size: int, widest: int) -> "Blocks":
        """Cuts columns into the fewest blocks that are no wider than `widest` (at least 1)."""
        width = -(-size // -(-size // min(max(widest, 1), size)))  # blocks of about the same width
        return cls(size, width, -(-size // width))

    def at(self, number: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Gives a block by its number.

        Returns:
          (its first column; bool `width`, the columns which are in no block before it, or None where blocks
          do not overlap).
        """
        begin = number * self.width
        if self.count * self.width == self.size:
            return begin, None
        first = jnp.minimum(begin, self.size - self.width)
        return first, first + jnp.arange(self.width) >= begin


def masked(new_C: jax.Array | None, x: jax.Array, other: float) -> jax.Array:
    """Gives x …×C with `other` in the columns that are not new; see `Blocks.at`."""
    return x if new_C is None else jnp.where(new_C, x, other)


class SoftmaxStats(NamedTuple):
    """The numbers of each token's softmax that a cross-entropy needs. Each is float32, of the tokens' shape.

    Attributes:
      target: the logit of the token's target.
      log_z: the log-sum-exp of all its logits.
      largest: the largest of its logits; has no gradient.
    """

    target: jax.Array
    log_z: jax.Array
    largest: jax.Array


def softmax_stats(logits: jax.Array, targets: jax.Array) -> SoftmaxStats:
    """Computes the stats of whole logits.

    Args:
      logits: float32 …×V.
      targets: int32 ….
    """
    # By comparing, not by a gather: logits that lie over several devices then stay where they are.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return SoftmaxStats(target, jax.nn.logsumexp(logits, axis=-1), largest)


def blockwise_softmax_stats(
    x_NxE: jax.Array, kernel_ExV: jax.Array, targets_N: jax.Array, max_logits_per_block: int
) -> SoftmaxStats:
    """Computes the stats of the logits x · kernel, without ever holding all of them, nor their gradients.

    Logits are computed a block of outputs at a time, and computed again for the gradient: this takes one
    matrix product more than holding them does. On a mesh (see `mesh_context`) each device computes the logits
    of its own part of the kernel, which stays where it lies. Where outputs lie over `data` too, the tokens,
    which are few, are gathered. Three numbers a token are summed over devices, and N×E for the gradient.

    Args:
      x_NxE: of any dtype; its gradient has the same.
      kernel_ExV: float32.
      targets_N: int32.
      max_logits_per_block: about how many logits a device holds at a time.

    Returns:
      The stats, each N.
    """
    return SoftmaxStats(*_blockwise_stats(max_logits_per_block, _Places.here(), x_NxE, kernel_ExV, targets_N))


def mesh_axes(name: str) -> tuple[str, ...]:
    """Gives the axes of the mesh over which a logical axis lies; () without a mesh. See `mesh_context`."""
    if jax.sharding.get_abstract_mesh().empty:
        return ()
    found = nn.logical_to_mesh_axes((name,))[0]
    return (found,) if isinstance(found, str) else tuple(found or ())


def on_shards(function: Callable, in_specs, out_specs) -> Callable:
    """Maps a function over the devices of the mesh, if there is one; otherwise gives the function itself.

    Args:
      function: is called on each device with its shards.
      in_specs: see `jax.shard_map`.
      out_specs: see `jax.shard_map`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Places(NamedTuple):
    """The mesh axes over which outputs (V) and tokens (N) lie; () for both on one device."""

    over_V: tuple[str, ...]
    over_N: tuple[str, ...]

    @classmethod
    def here(cls) -> "_Places":
        over_V = mesh_axes("vocab")
        return cls(over_V, tuple(axis for axis in mesh_axes("batch") if axis not in over_V))

    @property
    def specs(self) -> tuple[P, P, P]:
        """The shardings of x_NxE, of kernel_ExV, and of one number a token."""
        return P(self.over_N), P(None, self.over_V), P(self.over_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise_stats(max_logits_per_block: int, places: _Places, x_NxE, kernel_ExV, targets_N):
    return _forward(max_logits_per_block, places, x_NxE, kernel_ExV, targets_N)[0]


def _forward(max_logits_per_block: int, places: _Places, x_NxE, kernel_ExV, targets_N):
    def of_shard(x_NxE, kernel_ExV, targets_N):
        targets_N = _own(targets_N, kernel_ExV, places)
        shape = (len(x_NxE),)

        def add(carry, number):
            largest_N, total_N, target_N = carry
            first, new_C = cut.at(number)
            logits_NxC, chosen_NxC, _ = _block(x_NxE, kernel_ExV, targets_N, first, cut.width)
            chosen_NxC = masked(new_C, chosen_NxC, False)
            logits_NxC = masked(new_C, logits_NxC, -jnp.inf)
            larger_N = jnp.maximum(largest_N, jnp.max(logits_NxC, axis=1))
            total_N *= jnp.exp(largest_N - larger_N)
            total_N += jnp.sum(jnp.exp(logits_NxC - larger_N[:, None]), axis=1)
            return (
                larger_N,
                total_N,
                target_N + jnp.sum(jnp.where(chosen_NxC, logits_NxC, 0.0), axis=1),
            ), None

        cut = Blocks.of(kernel_ExV.shape[1], max_logits_per_block // len(x_NxE))
        start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape))
        (largest_N, total_N, target_N), _ = jax.lax.scan(add, start, jnp.arange(cut.count))
        if places.over_V:
            own_N = largest_N
            largest_N = jax.lax.pmax(own_N, places.over_V)
            total_N = jax.lax.psum(total_N * jnp.exp(own_N - largest_N), places.over_V)
            target_N = jax.lax.psum(target_N, places.over_V)
        return target_N, largest_N + jnp.log(total_N), largest_N

    result = on_shards(of_shard, places.specs, P(places.over_N))(x_NxE, kernel_ExV, targets_N)
    return result, (x_NxE, kernel_ExV, targets_N, result[1])


def _backward(max_logits_per_block: int, places: _Places, residuals, gradients):
    x_NxE, kernel_ExV, targets_N, log_z_N = residuals

    def of_shard(x_NxE, kernel_ExV, targets_N, log_z_N, grad_target_N, grad_log_z_N):
        targets_N = _own(targets_N, kernel_ExV, places)

        def add(carry, number):
            grad_x_NxE, grad_kernel_ExV = carry
            first, new_C = cut.at(number)
            logits_NxC, chosen_NxC, part_ExC = _block(x_NxE, kernel_ExV, targets_N, first, cut.width)
            grad_logits_NxC = grad_log_z_N[:, None] * jnp.exp(logits_NxC - log_z_N[:, None])
            grad_logits_NxC += jnp.where(chosen_NxC, grad_target_N[:, None], 0.0)
            # Columns of two blocks are the same in both: what is added up counts them once.
            grad_x_NxE += jnp.dot(masked(new_C, grad_logits_NxC, 0.0), part_ExC.T)
            grad_part_ExC = jnp.dot(x_NxE.astype(jnp.float32).T, grad_logits_NxC)
            return (
                grad_x_NxE,
                jax.lax.dynamic_update_slice_in_dim(grad_kernel_ExV, grad_part_ExC, first, axis=1),
            ), None

        cut = Blocks.of(kernel_ExV.shape[1], max_logits_per_block // len(x_NxE))
        start = (jnp.zeros(x_NxE.shape), jnp.zeros(kernel_ExV.shape))
        (grad_x_NxE, grad_kernel_ExV), _ = jax.lax.scan(add, start, jnp.arange(cut.count))
        if places.over_V:
            grad_x_NxE = jax.lax.psum(grad_x_NxE, places.over_V)
        if places.over_N:
            grad_kernel_ExV = jax.lax.psum(grad_kernel_ExV, places.over_N)
        return grad_x_NxE.astype(x_NxE.dtype), grad_kernel_ExV

    tokens = P(places.over_N)
    of_shards = on_shards(of_shard, (*places.specs, tokens, tokens, tokens), places.specs[:2])
    grad_x_NxE, grad_kernel_ExV = of_shards(x_NxE, kernel_ExV, targets_N, log_z_N, *gradients[:2])
    return grad_x_NxE, grad_kernel_ExV, None


_blockwise_stats.defvjp(_forward, _backward)


def _own(targets_N, kernel_ExV, places: _Places):
    """Counts targets from the start of this device's outputs; those of other devices fall outside."""
    return targets_N - jax.lax.axis_index(places.over_V) * kernel_ExV.shape[1] if places.over_V else targets_N


def _block(x_NxE, kernel_ExV, targets_N, first, width: int):
    """Computes (logits of `width` outputs, which of them are targets, their part of the kernel)."""
    part_ExC = jax.lax.dynamic_slice_in_dim(kernel_ExV, first, width, axis=1)
    logits_NxC = logits_of(x_NxE, part_ExC)
    return logits_NxC, first + jnp.arange(width) == targets_N[:, None], part_ExC
