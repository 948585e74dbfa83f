"""Planning ahead (PAG): lexical scores of all passages in one pass, whose best ones guide the beam search.

A passage has a set of text tokens; its lexical score is the sum of the query's weights of these tokens (Zeng
et al. 2024, "Planning Ahead in Generative Retrieval", section 3.2). `plan` keeps the n passages of largest
lexical score. In the search along the trie of docids, a prefix has a bonus: the largest lexical score of the
kept passages below it. Beams are chosen by `sequential_weight` · (sum of token scores) + bonus, and carry the
sum of token scores alone, so that the bonus of a prefix does not add to those of longer ones. The score of a
docid is `sequential_weight` · (sum of token scores) + (lexical score).

Letters in shapes: B queries, V tokens of the text vocabulary, P passages, M tokens of a set, n kept passages,
N docids, D kept docids, K beams, I local ids (see local_ids.py), C children, L positions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.trie import capacity

BLOCK = 1 << 16  # passages that are scored at once; on CPUs and GPUs larger ones are not faster
GROUP = 16  # neighbouring passages, of which the first pass keeps the largest score alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SetArrays:
    """The token sets of passages; padded, so that those of a similar collection do not recompile a search.

    On a mesh `tokens_PxM` and `impacts_PxM` are divided over the axis `data`, along P.

    Attributes:
      tokens_PxM: unsigned integers, the tokens of each passage in any order; 0 stands for none.
      impacts_PxM: uint8, what each token's weight is multiplied by; None where that is 1.
      impact_scale: float32 scalar, which the impacts are multiplied by.
      count: int32 scalar, how many passages there are; the rows after them pad the arrays.
    """

    tokens_PxM: np.ndarray | jax.Array
    impacts_PxM: np.ndarray | jax.Array | None
    impact_scale: np.ndarray | jax.Array
    count: np.ndarray | jax.Array


class Plan(NamedTuple):
    """The passages of largest lexical score, best first; of equal ones the lower row comes first.

    Attributes:
      row_Bxn: int32, rows of the sets; -1 where there are fewer passages than n.
      score_Bxn: float32, their lexical scores; -inf where there is no passage.
    """

    row_Bxn: jax.Array
    score_Bxn: jax.Array


def padded_rows(count: int, shards: int = 1) -> int:
    """Returns the rows that the arrays of `count` passages have: equal blocks on each of the shards."""
    local = -(-capacity(count) // shards)
    blocks = -(-local // BLOCK)
    return shards * blocks * round_up(-(-local // blocks), GROUP)


def build_sets(
    tokens_PxM: np.ndarray,
    impacts_PxM: np.ndarray | None = None,
    impact_scale: float = 1.0,
    shards: int = 1,
    reuse_shapes_of: SetArrays | None = None,
) -> SetArrays:
    """Pads the sets of a collection's passages for the search.

    Args:
      tokens_PxM: unsigned integers below the size of the text vocabulary, 0 for none.
      impacts_PxM: uint8, or None.
      impact_scale: see `SetArrays`.
      shards: devices along the mesh's axis `data`.
      reuse_shapes_of: the arrays of an earlier state of the collection. If the new ones fit into their
        shapes, a search that was compiled for those takes the new ones.
    """
    rows = padded_rows(len(tokens_PxM), shards)
    earlier = reuse_shapes_of and reuse_shapes_of.tokens_PxM.shape
    if earlier and earlier[1] == tokens_PxM.shape[1] and rows <= earlier[0]:
        rows = earlier[0]

    def pad(x_PxM: np.ndarray | None) -> np.ndarray | None:
        if x_PxM is None:
            return None
        padded = np.zeros((rows, x_PxM.shape[1]), x_PxM.dtype)
        padded[: len(x_PxM)] = x_PxM
        return padded

    return SetArrays(pad(tokens_PxM), pad(impacts_PxM), np.float32(impact_scale), np.int32(len(tokens_PxM)))


def plan(weights_BxV: jax.Array, sets: SetArrays, n: int, mesh: Mesh | None = None) -> Plan:
    """Finds the passages of largest lexical score: exactly, in one pass over all sets.

    Of more passages than a block, the pass computes the scores of a block at a time and keeps the largest
    score of every GROUP of neighbours; so its memory is B × P / GROUP numbers. The best n passages lie in the
    n groups whose largest scores are largest, and only the passages of these groups are scored again and
    sorted.

    On a mesh each device does this for all queries and its own passages; what is exchanged are the queries'
    weights and the best n passages of each device.

    Args:
      weights_BxV: float32, the query's weight of each token, not negative; that of token 0 has no effect.
      sets: the passages, as `build_sets` made them.
      n: how many passages to keep.
      mesh: the mesh over whose axis `data` queries and passages lie; None for one device.
    """
    if mesh is None:
        return _merge(*_best_of(weights_BxV, sets, n, jnp.int32(0)), n)

    def on_device(weights_BxV: jax.Array, sets: SetArrays) -> Plan:
        weights_BxV = jax.lax.all_gather(weights_BxV, "data", tiled=True)
        first = jax.lax.axis_index("data") * sets.tokens_PxM.shape[0]
        found = _best_of(weights_BxV, sets, n, first)
        # Each device gets what all devices found for its own queries, in the order of the rows.
        return _merge(*(jax.lax.all_to_all(x, "data", 0, 1, tiled=True) for x in found), n)

    in_specs = P("data"), specs(sets)
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=P("data"), check_vma=False)(
        weights_BxV, sets
    )


def specs(sets: SetArrays) -> SetArrays:
    """Returns how the arrays lie on a mesh: a PartitionSpec in the place of each."""
    rows = P("data")
    return SetArrays(rows, None if sets.impacts_PxM is None else rows, P(), P())


def place_sets(sets: SetArrays, place: Callable, axis: str = "data") -> SetArrays:
    """Places the arrays on the devices: passages over an axis of the mesh, the rest on every device.

    Args:
      sets: NumPy arrays.
      place: (tree, axes of the first dimension…) -> the tree on the devices.
      axis: `data` for a plan, `model` for `score_all`.
    """
    rows = place((sets.tokens_PxM, sets.impacts_PxM), axis)
    return SetArrays(*rows, *place((sets.impact_scale, sets.count)))


def score_all(weights_BxV: jax.Array, sets: SetArrays, mesh: Mesh | None = None) -> jax.Array:
    """Computes the lexical scores of all passages, float32 B×P.

    Args:
      weights_BxV: see `plan`.
      sets: the passages, not padded by a part of a shard.
      mesh: the mesh over whose axis `data` the queries lie, and over whose axis `model` the passages do, here
        as the tokens of a softmax over all docids; None for one device.
    """
    if mesh is None:
        return _all_scores(weights_BxV, sets)
    rows = P("model")
    in_specs = P("data"), SetArrays(rows, None if sets.impacts_PxM is None else rows, P(), P())
    return jax.shard_map(
        _all_scores, mesh=mesh, in_specs=in_specs, out_specs=P("data", "model"), check_vma=False
    )(weights_BxV, sets)


def _all_scores(weights_BxV: jax.Array, sets: SetArrays) -> jax.Array:
    """Computes what `score_all` does, of this device's passages."""
    weights_VxB, rows = _table(weights_BxV, sets), sets.tokens_PxM.shape[0]
    size = min(BLOCK, rows)

    def add(nth, scores_PxB):
        first = jnp.minimum(nth * size, rows - size)  # the last block may overlap the one before
        block = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), first, size),
            (sets.tokens_PxM, sets.impacts_PxM),
        )
        return jax.lax.dynamic_update_slice(scores_PxB, _block_scores(weights_VxB, block), (first, 0))

    start = jnp.zeros((rows, weights_BxV.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, -(-rows // size), add, start).T * sets.impact_scale


def score_rows(
    weights_BxV: jax.Array, sets: SetArrays, row_BxK: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """Computes the lexical scores of K passages of each query, float32 B×K.

    Args:
      weights_BxV: see `plan`.
      sets: the passages.
      row_BxK: int32, rows of the sets; the score of negative ones is 0.
      mesh: see `plan`.
    """
    if mesh is None:
        return _scores_of(weights_BxV, sets, row_BxK)

    def on_device(weights_BxV: jax.Array, sets: SetArrays, row_BxK: jax.Array) -> jax.Array:
        weights_BxV, row_BxK = (jax.lax.all_gather(x, "data", tiled=True) for x in (weights_BxV, row_BxK))
        row_BxK -= jax.lax.axis_index("data") * sets.tokens_PxM.shape[0]
        row_BxK = jnp.where(row_BxK < sets.tokens_PxM.shape[0], row_BxK, -1)
        scores_BxK = _scores_of(weights_BxV, sets, row_BxK)  # 0 of other devices' passages
        return jax.lax.psum_scatter(scores_BxK, "data", tiled=True)

    in_specs = P("data"), specs(sets), P("data")
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=P("data"), check_vma=False)(
        weights_BxV, sets, row_BxK
    )


def _ignore_padding(weights_BxV: jax.Array) -> jax.Array:
    """Returns the queries' weights B×V in float32, where token 0, which pads the sets, weighs 0."""
    return weights_BxV.astype(jnp.float32).at[:, 0].set(0.0)


def _table(weights_BxV: jax.Array, sets: SetArrays) -> jax.Array:
    """Returns the weights as V×B, so that those of all queries of one token are read at once.

    Where the sets' tokens are uint16, the table has a row for each of the 65,536 numbers that a token can be:
    XLA then leaves out the check of each index, with which a batch of 8 queries takes 1.2 to 1.5 times as
    long on a CPU.
    """
    V = weights_BxV.shape[1]
    rows = max(V, 1 << 16) if sets.tokens_PxM.dtype == jnp.uint16 else V
    return jnp.pad(_ignore_padding(weights_BxV).T, ((0, rows - V), (0, 0)))


def _blocks(sets: SetArrays) -> tuple[jax.Array, jax.Array | None]:
    """Divides tokens and impacts into blocks of the same size, of at most BLOCK passages."""
    rows, width = sets.tokens_PxM.shape
    blocks = -(-rows // BLOCK)
    shape = (blocks, rows // blocks, width)
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(shape), (sets.tokens_PxM, sets.impacts_PxM))


def _block_scores(weights_VxB: jax.Array, block: tuple[jax.Array, jax.Array | None]) -> jax.Array:
    """Computes a block's lexical scores P×B, before `impact_scale`.

    The sum is written out, token by token, as compilers turn it into one loop that way: a reduction over
    gathered weights takes 20 times as long on a CPU.
    """
    tokens_PxM, impacts_PxM = block
    scores_PxB = jnp.zeros((tokens_PxM.shape[0], weights_VxB.shape[1]), jnp.float32)
    for m in range(tokens_PxM.shape[1]):
        added_PxB = weights_VxB.at[tokens_PxM[:, m]].get(mode="promise_in_bounds")
        if impacts_PxM is not None:
            added_PxB *= impacts_PxM[:, m, None].astype(jnp.float32)
        scores_PxB += added_PxB
    return scores_PxB


def _scores_of(weights_BxV: jax.Array, sets: SetArrays, row_BxK: jax.Array) -> jax.Array:
    """Computes what `score_rows` does, of this device's rows."""
    V, at = weights_BxV.shape[1], jnp.maximum(row_BxK, 0)
    # One index into the weights of all queries: two, of the query and of the token, take 10 times as long.
    weights, first_B = _ignore_padding(weights_BxV).reshape(-1), jnp.arange(row_BxK.shape[0]) * V
    tokens_PxM, scores_BxK = jnp.asarray(sets.tokens_PxM), jnp.zeros(row_BxK.shape, jnp.float32)
    for m in range(tokens_PxM.shape[1]):
        tokens_BxK = tokens_PxM.at[at, m].get(mode="promise_in_bounds").astype(jnp.int32)
        added_BxK = weights.at[first_B[:, None] + tokens_BxK].get(mode="promise_in_bounds")
        if sets.impacts_PxM is not None:
            added_BxK *= jnp.asarray(sets.impacts_PxM).at[at, m].get(mode="clip").astype(jnp.float32)
        scores_BxK += added_BxK
    return jnp.where(row_BxK >= 0, scores_BxK * sets.impact_scale, 0.0)


def _best_of(
    weights_BxV: jax.Array, sets: SetArrays, n: int, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Finds this device's best passages: (scores B×m, rows B×m), m at most n; -inf and -1 for padding.

    Args:
      weights_BxV: see `plan`.
      sets: this device's.
      n: see `plan`.
      first: the row of this device's first passage among those of all devices.
    """
    rows = sets.tokens_PxM.shape[0]
    if rows <= BLOCK:  # so few that sorting all of them takes less time than scoring some again
        row_BxC = jnp.broadcast_to(jnp.arange(rows), (weights_BxV.shape[0], rows))
        # The barrier keeps the sums out of the loop that sorts, where they take 50 times as long on a CPU.
        score_BxC = jax.lax.optimization_barrier(_all_scores(weights_BxV, sets))
    else:
        row_BxC = _best_groups(weights_BxV, sets, n, first)
        score_BxC = _scores_of(weights_BxV, sets, row_BxC)
    score_BxC = jnp.where(first + row_BxC < sets.count, score_BxC, -jnp.inf)
    score, nth = jax.lax.top_k(score_BxC, min(n, score_BxC.shape[1]))
    row = first + jnp.take_along_axis(row_BxC, nth, axis=1)
    return score, jnp.where(score > -jnp.inf, row, -1)


def _best_groups(weights_BxV: jax.Array, sets: SetArrays, n: int, first: jax.Array) -> jax.Array:
    """Finds the passages of this device's n groups of largest scores: their rows on it, B×C, ascending."""
    rows, B = sets.tokens_PxM.shape[0], weights_BxV.shape[0]
    blocks, weights_VxB = _blocks(sets), _table(weights_BxV, sets)

    def group_maxima(block) -> jax.Array:
        scores_GxCxB = _block_scores(weights_VxB, block).reshape(-1, GROUP, B)
        # Written out as above: the sums would otherwise be computed inside of the reduction.
        return functools.reduce(jnp.maximum, (scores_GxCxB[:, c] for c in range(GROUP)))

    maxima_GxB = jax.lax.map(group_maxima, blocks).reshape(rows // GROUP, B)
    # Padding scores 0, and no passage scores less: a group's maximum changes only where all of it is padding.
    is_real_G = first + jnp.arange(rows // GROUP) * GROUP < sets.count
    maxima_BxG = jnp.where(is_real_G[:, None], maxima_GxB, -jnp.inf).T
    _, group_Bxg = jax.lax.top_k(maxima_BxG, min(n, rows // GROUP))
    group_Bxg = jnp.sort(group_Bxg, axis=-1)  # in the order of rows, for ties
    return (group_Bxg[..., None] * GROUP + jnp.arange(GROUP)).reshape(B, -1)


def _merge(score_Bxm: jax.Array, row_Bxm: jax.Array, n: int) -> Plan:
    """Keeps the best n of what several devices found, with -1 and -inf where there are fewer."""
    missing = ((0, 0), (0, max(0, n - score_Bxm.shape[1])))
    score_Bxm = jnp.pad(score_Bxm, missing, constant_values=-jnp.inf)
    row_Bxm = jnp.pad(row_Bxm, missing, constant_values=-1)
    score, nth = jax.lax.top_k(score_Bxm, n)
    return Plan(jnp.take_along_axis(row_Bxm, nth, axis=1), score)
