"""Search with atomic docids: one decoding step, then the docids of highest log-probability."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

BLOCK = 128  # docids; outputs are padded to a multiple of it
FEW = 64  # blocks whose tokens are looked at one by one, as not all of them are real


def top_docids(
    logits_BxV: jax.Array, real_V: jax.Array, k: int, mesh: Mesh | None = None, recall: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k most probable docid tokens B×k (int32) and their log-probabilities, best first.

    Where fewer than k are real, token -1 and log-probability -inf follow.

    Args:
      logits_BxV: float32; on a mesh its queries lie over `data` and its docids over `model`. Each shard gives
        its own best k, and those alone are gathered and merged; no device holds a query's whole softmax.
      real_V: bool, the tokens that name a docid. All others only pad the softmax: they take part in its
        normalisation (as in training) and cannot be found.
      mesh: None for one device.
      recall: None for the exact top-k; else the recall that `lax.approx_max_k` shall reach in expectation
        (Chern et al. 2022), which is much faster on a TPU.
    """
    if mesh is None:
        return _top(logits_BxV, real_V, k, recall)
    on_shards = jax.shard_map(
        functools.partial(_top, k=k, recall=recall, axis="model"),
        mesh=mesh,
        in_specs=(P("data", "model"), P("model")),
        out_specs=P("data"),
        check_vma=False,  # what is gathered is alike on every device of `model`
    )
    return on_shards(logits_BxV, real_V)


def _top(logits_BxV, real_V, k: int, recall: float | None, axis: str | None = None):
    """Of one shard's tokens; with an axis, merged over its shards."""
    log_z_B = jax.nn.logsumexp(logits_BxV, axis=-1)
    if recall is None:
        best_BxK, token_BxK = _exact(logits_BxV, real_V, min(k, real_V.size))
    else:
        masked_BxV = jnp.where(real_V, logits_BxV, -jnp.inf)
        best_BxK, token_BxK = jax.lax.approx_max_k(masked_BxV, min(k, real_V.size), recall_target=recall)
    if axis:
        token_BxK += jax.lax.axis_index(axis) * real_V.size
        log_z_B = jax.nn.logsumexp(jax.lax.all_gather(log_z_B, axis), axis=0)
        gathered = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (best_BxK, token_BxK))
        best_BxK, token_BxK = gathered
        best_BxK, nth = jax.lax.top_k(best_BxK, min(k, best_BxK.shape[1]))
        token_BxK = jnp.take_along_axis(token_BxK, nth, axis=1)
    missing = ((0, 0), (0, k - best_BxK.shape[1]))
    best_BxK = jnp.pad(best_BxK, missing, constant_values=-jnp.inf)
    tokens = jnp.where(best_BxK > -jnp.inf, jnp.pad(token_BxK, missing), -1)
    return tokens, best_BxK - log_z_B[:, None]


def _exact(logits_BxV: jax.Array, real_V: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest logits of real tokens, and the tokens; where they tie the lower token comes first.

    They lie in the k blocks whose largest logits are largest. So all logits are read once, for each block's
    largest, and only a few of them are sorted.
    """
    B, V = logits_BxV.shape
    block = math.gcd(V, BLOCK)
    N, M = V // block, min(k, V // block)
    blocked_BxNxC, real_NxC = logits_BxV.reshape(B, N, block), real_V.reshape(N, block)
    _, chosen_BxM = jax.lax.top_k(_largest(blocked_BxNxC, real_NxC), M)
    chosen_BxM = jnp.sort(chosen_BxM, axis=-1)  # in the tokens' order, for ties
    some_BxMxC = jnp.take_along_axis(blocked_BxNxC, chosen_BxM[..., None], axis=1)
    some_BxMxC = jnp.where(real_NxC[chosen_BxM], some_BxMxC, -jnp.inf)
    best_BxK, nth_BxK = jax.lax.top_k(some_BxMxC.reshape(B, M * block), k)
    first_BxK = jnp.take_along_axis(chosen_BxM, nth_BxK // block, axis=1)
    return best_BxK, first_BxK * block + nth_BxK % block


def _largest(blocked_BxNxC: jax.Array, real_NxC: jax.Array) -> jax.Array:
    """The largest logit of each block's real tokens, B×N.

    Asking of each token whether it is real takes longer than reading the logits does. Where that matters only
    to a few blocks, as where tokens merely pad the softmax, it is asked in these.
    """
    mixed_N = ~jnp.all(real_NxC, axis=-1)

    def few() -> jax.Array:
        (mixed_F,) = jnp.nonzero(mixed_N, size=FEW, fill_value=len(mixed_N))
        some_BxFxC, real_FxC = (x.at[..., mixed_F, :].get(mode="clip") for x in (blocked_BxNxC, real_NxC))
        largest_BxF = jnp.max(jnp.where(real_FxC, some_BxFxC, -jnp.inf), axis=-1)
        return jnp.max(blocked_BxNxC, axis=-1).at[:, mixed_F].set(largest_BxF, mode="drop")

    def many() -> jax.Array:
        return jnp.max(jnp.where(real_NxC, blocked_BxNxC, -jnp.inf), axis=-1)

    return jax.lax.cond(jnp.sum(mixed_N) <= FEW, few, many)
