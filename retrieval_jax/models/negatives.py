"""The log-sum-exp of the scores of a batch's negatives, which may be too many to be in memory at once.

Every objective of `contrastive.py` needs one number of a query's negatives, the log-sum-exp of the query's
scores of them; the other direction needs the same number of a passage. Letters in shapes: B queries, E vector
size, G candidates of a query, M = B·G passages of the batch (the candidates of each query stand together), K
passages known to answer a query, C passages of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from retrieval_jax.models.softmax import NEG_INF, Blocks, mesh_axes, on_shards


class Negatives(NamedTuple):
    """Log-sum-exps of scores, float32.

    Attributes:
      of_queries: B, the log-sum-exp of each query's scores of its negatives, or the largest of these scores
        alone; NEG_INF for a query without negatives.
      of_passages: M, the log-sum-exp of each passage's scores with the queries that it does not answer.
      largest: B, the score of each query's hardest negative; has no gradient.
    """

    of_queries: jax.Array
    of_passages: jax.Array
    largest: jax.Array


def batch_negatives(
    queries_BxE: jax.Array,
    passages_MxE: jax.Array,
    known_BxK: jax.Array,
    passage_M: jax.Array,
    hardest_negative_only: bool = False,
    max_logits_per_block: int = 1 << 26,
) -> Negatives:
    """Computes the log-sum-exps of scores that are dot products of vectors.

    Scores are computed a block of passages at a time, and computed again for the gradient, so that all B×M of
    them never exist. On a mesh (see `mesh_context`) each device scores its own queries against the
    passages of all devices, whose vectors are gathered.

    Args:
      queries_BxE: float32.
      passages_MxE: float32.
      known_BxK: int32, rows of passages that answer the query and are never its negatives; -1 is padding. A
        row of nothing but -1 is not a query.
      passage_M: int32, the row of each passage in the collection; -1 is padding, and never a negative. A
        passage that occurs several times counts several times.
      hardest_negative_only: whether only the negative of highest score counts (the first, if several tie).
      max_logits_per_block: about how many scores a device holds at a time.
    """
    static = hardest_negative_only, max_logits_per_block, mesh_axes("batch")
    *logs, largest_B = _negatives(*static, queries_BxE, passages_MxE, known_BxK, passage_M)
    return Negatives(*logs, jax.lax.stop_gradient(largest_B))


def within_group_negatives(
    scores_BxG: jax.Array, known_BxK: jax.Array, passage_BxG: jax.Array, hardest_negative_only: bool = False
) -> Negatives:
    """Computes the log-sum-exps of each query's own candidates alone.

    Args:
      scores_BxG: float32, each query's scores of its candidates.
      known_BxK: see `batch_negatives`.
      passage_BxG: see `batch_negatives`.
      hardest_negative_only: see `batch_negatives`.

    Returns:
      The log-sum-exps; `of_passages` is NEG_INF.
    """
    answers_BxG = jnp.any(known_BxK[:, :, None] == passage_BxG[:, None, :], axis=1)
    own_BxG = jnp.where((passage_BxG >= 0) & ~answers_BxG, scores_BxG, NEG_INF)
    largest_B = jnp.max(own_BxG, axis=1)
    of_queries_B = largest_B if hardest_negative_only else jax.nn.logsumexp(own_BxG, axis=1)
    return Negatives(of_queries_B, jnp.full(scores_BxG.size, NEG_INF), jax.lax.stop_gradient(largest_B))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _negatives(
    hardest_negative_only, max_logits_per_block, over, queries_BxE, passages_MxE, known_BxK, passage_M
):
    return _forward(
        hardest_negative_only, max_logits_per_block, over, queries_BxE, passages_MxE, known_BxK, passage_M
    )[0]


def _forward(hardest_negative_only: bool, max_logits_per_block: int, over: tuple[str, ...], *arrays):
    def of_shard(queries_BxE, passages_MxE, known_BxK, passage_M):
        blocks, count = _blocks(passages_MxE, passage_M, over, len(queries_BxE), max_logits_per_block)

        def add(carry, block):
            largest_B, total_B, hardest_B = carry
            logits_BxC, _ = _scores(queries_BxE, known_BxK, block)
            best_B, best_C = jnp.max(logits_BxC, axis=1), jnp.max(logits_BxC, axis=0)
            here_B = block.number_C[jnp.argmax(logits_BxC, axis=1)]
            hardest_B = jnp.where(best_B > largest_B, here_B, hardest_B)
            larger_B = jnp.maximum(largest_B, best_B)
            total_B *= jnp.exp(largest_B - larger_B)
            total_B += jnp.sum(jnp.exp(logits_BxC - larger_B[:, None]), axis=1)
            return (larger_B, total_B, hardest_B), (best_C, jnp.sum(jnp.exp(logits_BxC - best_C), axis=0))

        B = len(queries_BxE)
        start = (jnp.full(B, NEG_INF), jnp.zeros(B), jnp.zeros(B, jnp.int32))
        (largest_B, total_B, hardest_B), columns = jax.lax.scan(add, start, blocks)
        largest_M, total_M = (x.reshape(-1)[:count] for x in columns)
        if over:
            own_M, largest_M = largest_M, jax.lax.pmax(largest_M, over)
            total_M = jax.lax.psum(total_M * jnp.exp(own_M - largest_M), over)
        of_queries_B = largest_B if hardest_negative_only else largest_B + jnp.log(total_B)
        return of_queries_B, largest_M + jnp.log(total_M), largest_B, hardest_B

    of_queries_B, of_passages_M, largest_B, hardest_B = on_shards(
        of_shard, (P(over),) * 4, (P(over), P(), P(over), P(over))
    )(*arrays)
    return (of_queries_B, of_passages_M, largest_B), (*arrays, of_queries_B, of_passages_M, hardest_B)


def _backward(
    hardest_negative_only: bool, max_logits_per_block: int, over: tuple[str, ...], residuals, gradients
):
    def of_shard(queries_BxE, passages_MxE, known_BxK, passage_M, log_B, log_M, hardest_B, grad_B, grad_M):
        blocks, count = _blocks(passages_MxE, passage_M, over, len(queries_BxE), max_logits_per_block)

        def add(grad_queries_BxE, block):
            logits_BxC, there_BxC = _scores(queries_BxE, known_BxK, block)
            if hardest_negative_only:
                share_BxC = (block.number_C == hardest_B[:, None]).astype(jnp.float32)
            else:
                share_BxC = jnp.exp(logits_BxC - log_B[:, None])
            grad_logits_BxC = grad_B[:, None] * share_BxC
            grad_logits_BxC += grad_M[block.number_C] * jnp.exp(logits_BxC - log_M[block.number_C])
            grad_logits_BxC = jnp.where(there_BxC, grad_logits_BxC, 0.0)
            grad_queries_BxE += _dot(grad_logits_BxC, block.passages_CxE)
            return grad_queries_BxE, _dot(grad_logits_BxC.T, queries_BxE)

        grad_queries_BxE, grad_blocks = jax.lax.scan(add, jnp.zeros_like(queries_BxE), blocks)
        grad_passages_MxE = grad_blocks.reshape(-1, queries_BxE.shape[1])[:count]
        if over:
            grad_passages_MxE = jax.lax.psum_scatter(grad_passages_MxE, over, scatter_dimension=0, tiled=True)
        return grad_queries_BxE, grad_passages_MxE

    grad_queries_B, grad_passages_M, _ = gradients
    specs = (*(P(over),) * 5, P(), P(over), P(over), P())
    grad_vectors = on_shards(of_shard, specs, (P(over), P(over)))(*residuals, grad_queries_B, grad_passages_M)
    return *grad_vectors, None, None


_negatives.defvjp(_forward, _backward)


class _Block(NamedTuple):
    """Some passages of the batch: their vectors, rows in the collection, and indices among the M."""

    passages_CxE: jax.Array
    passage_C: jax.Array
    number_C: jax.Array


def _blocks(
    passages_MxE, passage_M, over: tuple[str, ...], queries: int, max_logits_per_block: int
) -> tuple[_Block, int]:
    """Gathers the passages of all devices, and cuts them into blocks along a new first axis.

    The last block is filled up with passages -1. Gives (the blocks, the number of passages before that).
    """
    if over:
        passages_MxE = jax.lax.all_gather(passages_MxE, over, tiled=True)
        passage_M = jax.lax.all_gather(passage_M, over, tiled=True)
    cut = Blocks.of(len(passage_M), max_logits_per_block // queries)
    missing = cut.count * cut.width - cut.size
    whole = _Block(
        jnp.pad(passages_MxE, ((0, missing), (0, 0))),
        jnp.pad(passage_M, (0, missing), constant_values=-1),
        jnp.arange(cut.size + missing),
    )
    blocks = jax.tree.map(lambda x: x.reshape(cut.count, cut.width, *x.shape[1:]), whole)
    return blocks, cut.size


def _scores(queries_BxE, known_BxK, block: _Block) -> tuple[jax.Array, jax.Array]:
    """Computes (scores B×C, NEG_INF where the passage is not a negative; which are negatives)."""
    answers_BxC = jnp.any(known_BxK[:, :, None] == block.passage_C, axis=1)
    queries_B = jnp.any(known_BxK >= 0, axis=1)
    there_BxC = queries_B[:, None] & (block.passage_C >= 0) & ~answers_BxC
    return jnp.where(there_BxC, _dot(queries_BxE, block.passages_CxE.T), NEG_INF), there_BxC


def _dot(a, b) -> jax.Array:
    """Multiplies in full float32: a TPU rounds to 8 bits by default, which a low temperature multiplies."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
