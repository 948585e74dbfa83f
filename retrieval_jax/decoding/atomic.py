"""Search with atomic docids: one decoding step, then the docids of highest log-probability."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

FEW = 256


def top_docids(
    logits_BxV: jax.Array,
    real_V: jax.Array,
    k: int,
    few_unreal: bool = False,
    mesh: Mesh | None = None,
    recall: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k most probable docid tokens B×k (int32) and their log-probabilities, best first.

    Where fewer than k are real, token -1 and log-probability -inf follow.

    Args:
      logits_BxV: float32; on a mesh its queries lie over `data` and its docids over `model`. Each shard gives
        its own best k, and those alone are gathered and merged; no device holds a query's whole softmax.
      real_V: bool, the tokens that name a docid. All others only pad the softmax: they take part in its
        normalisation (as in training) and cannot be found.
      few_unreal: whether at most FEW tokens are not real, as when they only pad the softmax: these are then
        dropped from a slightly larger top-k, which saves a pass over all logits.
      mesh: None for one device.
      recall: None for the exact top-k; else the recall that `lax.approx_max_k` shall reach in expectation
        (Chern et al. 2022), which is much faster on a TPU.
    """
    if mesh is None:
        return _top(logits_BxV, real_V, k, few_unreal, recall)
    on_shards = jax.shard_map(
        functools.partial(_top, k=k, few_unreal=few_unreal, recall=recall, axis="model"),
        mesh=mesh,
        in_specs=(P("data", "model"), P("model")),
        out_specs=P("data"),
        check_vma=False,  # what is gathered is alike on every device of `model`
    )
    return on_shards(logits_BxV, real_V)


def _top(logits_BxV, real_V, k: int, few_unreal: bool, recall: float | None, axis: str | None = None):
    """Of one shard's tokens; with an axis, merged over its shards."""
    log_z_B = jax.nn.logsumexp(logits_BxV, axis=-1)
    top_k = jax.lax.top_k if recall is None else functools.partial(jax.lax.approx_max_k, recall_target=recall)
    if few_unreal:
        best_BxK, token_BxK = top_k(logits_BxV, min(k + FEW, real_V.size))
        best_BxK = jnp.where(real_V[token_BxK], best_BxK, -jnp.inf)
    else:
        best_BxK, token_BxK = top_k(jnp.where(real_V, logits_BxV, -jnp.inf), min(k, real_V.size))
    if axis:
        token_BxK += jax.lax.axis_index(axis) * real_V.size
        log_z_B = jax.nn.logsumexp(jax.lax.all_gather(log_z_B, axis), axis=0)
        gathered = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (best_BxK, token_BxK))
        best_BxK, token_BxK = gathered
    if axis or few_unreal:
        best_BxK, nth = jax.lax.top_k(best_BxK, min(k, best_BxK.shape[1]))
        token_BxK = jnp.take_along_axis(token_BxK, nth, axis=1)
    missing = ((0, 0), (0, k - best_BxK.shape[1]))
    best_BxK = jnp.pad(best_BxK, missing, constant_values=-jnp.inf)
    tokens = jnp.where(best_BxK > -jnp.inf, jnp.pad(token_BxK, missing), -1)
    return tokens, best_BxK - log_z_B[:, None]
