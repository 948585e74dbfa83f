"""Search with atomic docids: one decoding step, then the docids of highest score.

Letters in shapes: B queries, V tokens of the softmax, K results, N blocks of C tokens, M chosen blocks,
F blocks of both valid and other tokens.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

BLOCK = 128  # tokens; softmaxes are padded to a multiple of it
MAX_MIXED_BLOCKS = 64  # blocks of both valid and other tokens that are masked token by token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DocidTokens:
    """Docids that are single tokens of the softmax, as a search takes them.

    Attributes:
      token_to_passage_V: int32, for each token of the softmax the row of the passage whose docid it is; -1
        for a token that is no docid.
    """

    token_to_passage_V: np.ndarray | jax.Array

    @property
    def arrays(self) -> dict[str, np.ndarray | jax.Array]:
        """The arrays by name, for programs that take them so; named as those of a Trie are."""
        return {"token_to_passage_V": self.token_to_passage_V}


def top_docids(
    logits_BxV: jax.Array,
    valid_mask_V: jax.Array,
    k: int,
    mesh: Mesh | None = None,
    recall: float | None = None,
    sums_log_probs: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Finds the k most probable docid tokens, which are those of the largest logits.

    Args:
      logits_BxV: float32. On a mesh the queries lie over axis `data` and the tokens over axis `model`. Each
        device finds the best k of its own tokens, and only these are gathered and merged: no device holds
        the whole softmax of a query.
      valid_mask_V: bool, which tokens name a docid. The others pad the softmax: they take part in its
        normalisation, as in training, and cannot be found.
      k: how many tokens to find.
      mesh: None for one device.
      recall: None for the exact top k; else the recall that `lax.approx_max_k` is to reach in expectation
        (Chern et al. 2022), which is much faster on a TPU.
      sums_log_probs: whether the scores are log-probabilities; otherwise they are the logits.

    Returns:
      (tokens B×k int32, best first; their scores B×k float32). Where fewer than k tokens are valid, the token
      is -1 and its score -inf.
    """
    top = functools.partial(_top, k=k, recall=recall, sums_log_probs=sums_log_probs)
    if mesh is None:
        return top(logits_BxV, valid_mask_V)
    on_shards = jax.shard_map(
        functools.partial(top, axis="model"),
        mesh=mesh,
        in_specs=(P("data", "model"), P("model")),
        out_specs=P("data"),
        check_vma=False,  # the gathered results are the same on every device along `model`
    )
    return on_shards(logits_BxV, valid_mask_V)


def _top(
    logits_BxV, valid_mask_V, k: int, recall: float | None, sums_log_probs: bool, axis: str | None = None
):
    """Finds the top k of one shard's tokens; merges those of all shards along `axis`, if one is named."""
    log_z_B = jax.nn.logsumexp(logits_BxV, axis=-1) if sums_log_probs else None
    if recall is None:
        best_BxK, token_BxK = _exact(logits_BxV, valid_mask_V, min(k, valid_mask_V.size))
    else:
        masked_BxV = jnp.where(valid_mask_V, logits_BxV, -jnp.inf)
        best_BxK, token_BxK = jax.lax.approx_max_k(
            masked_BxV, min(k, valid_mask_V.size), recall_target=recall
        )
    if axis:
        token_BxK += jax.lax.axis_index(axis) * valid_mask_V.size
        if sums_log_probs:
            log_z_B = jax.nn.logsumexp(jax.lax.all_gather(log_z_B, axis), axis=0)
        gathered = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (best_BxK, token_BxK))
        best_BxK, token_BxK = gathered
        best_BxK, nth = jax.lax.top_k(best_BxK, min(k, best_BxK.shape[1]))
        token_BxK = jnp.take_along_axis(token_BxK, nth, axis=1)
    missing = ((0, 0), (0, k - best_BxK.shape[1]))
    best_BxK = jnp.pad(best_BxK, missing, constant_values=-jnp.inf)
    tokens = jnp.where(best_BxK > -jnp.inf, jnp.pad(token_BxK, missing), -1)
    return tokens, best_BxK - log_z_B[:, None] if sums_log_probs else best_BxK


def _exact(logits_BxV: jax.Array, valid_mask_V: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Finds the k largest logits of valid tokens, and the tokens; if logits tie, the lower token comes first.

    They lie in the k blocks whose largest logits are largest. So all logits are read once, for the largest of
    each block, and only a few blocks are sorted.
    """
    B, V = logits_BxV.shape
    block = math.gcd(V, BLOCK)
    N, M = V // block, min(k, V // block)
    blocked_BxNxC, valid_NxC = logits_BxV.reshape(B, N, block), valid_mask_V.reshape(N, block)
    _, chosen_BxM = jax.lax.top_k(_block_maxima(blocked_BxNxC, valid_NxC), M)
    chosen_BxM = jnp.sort(chosen_BxM, axis=-1)  # in the order of tokens, for ties
    chosen_BxMxC = jnp.take_along_axis(blocked_BxNxC, chosen_BxM[..., None], axis=1)
    chosen_BxMxC = jnp.where(valid_NxC[chosen_BxM], chosen_BxMxC, -jnp.inf)
    best_BxK, nth_BxK = jax.lax.top_k(chosen_BxMxC.reshape(B, M * block), k)
    block_BxK = jnp.take_along_axis(chosen_BxM, nth_BxK // block, axis=1)
    return best_BxK, block_BxK * block + nth_BxK % block


def _block_maxima(blocked_BxNxC: jax.Array, valid_NxC: jax.Array) -> jax.Array:
    """Finds the largest logit of the valid tokens of each block, B×N.

    Masking every token takes longer than reading the logits does. Where only a few blocks have both valid and
    other tokens, as where some tokens pad the softmax, only these blocks are masked.
    """
    mixed_N = ~jnp.all(valid_NxC, axis=-1)

    def mask_mixed_blocks() -> jax.Array:
        (mixed_F,) = jnp.nonzero(mixed_N, size=MAX_MIXED_BLOCKS, fill_value=len(mixed_N))
        mixed_BxFxC, valid_FxC = (x.at[..., mixed_F, :].get(mode="clip") for x in (blocked_BxNxC, valid_NxC))
        maxima_BxF = jnp.max(jnp.where(valid_FxC, mixed_BxFxC, -jnp.inf), axis=-1)
        return jnp.max(blocked_BxNxC, axis=-1).at[:, mixed_F].set(maxima_BxF, mode="drop")

    def mask_all_blocks() -> jax.Array:
        return jnp.max(jnp.where(valid_NxC, blocked_BxNxC, -jnp.inf), axis=-1)

    return jax.lax.cond(jnp.sum(mixed_N) <= MAX_MIXED_BLOCKS, mask_mixed_blocks, mask_all_blocks)
