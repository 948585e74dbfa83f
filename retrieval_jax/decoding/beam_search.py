"""Constrained beam search over docids: exact log-probabilities, and only real docids can come out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from retrieval_jax.decoding.trie import Trie

Step = Callable[[jax.Array, jax.Array | int, Any, jax.Array], tuple[jax.Array, jax.Array, Any]]
"""The decoder, one token a beam: (newest tokens B×K, their position (may be traced), cache, tokens S) ->
(logits B×K×S of those as the next token, log-sum-exp B×K of all logits, the cache with the newest tokens).

At position 0 the newest tokens are 0 (start) and K is 1. `cache` is any pytree of arrays B×K×…, whose beams
the search re-orders.
"""


class Beams(NamedTuple):
    """Each B×K: where K beams a query stand in the trie, best first."""

    score: jax.Array  # sum of its tokens' log-probabilities; -inf: no beam
    token: jax.Array  # the newest
    child: jax.Array  # the first edge that leaves its node, or (degree 0) its docid's row
    degree: jax.Array  # children of its node; 0: one docid is left


def constrained_beam_search(
    step: Step, cache: Any, trie: Trie, beams: int, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the docids of highest log-probability under the model's full softmax.

    A beam's score is the sum of its tokens' log-probabilities: no length penalty, and no renormalisation over
    the allowed tokens. With as many beams as docids the result is that of scoring every docid.

    The step is compiled twice: for the root, where a query has one beam, and in a loop over the other
    positions, which ends when every beam has written its docid.

    Args:
      step: the decoder; see Step.
      cache: what the first step is given: B×1×….
      trie: the docids; its arrays may be traced.
      beams: K.
      mesh: where the queries lie over `data`, a whole number on each device; None for one device.

    Returns:
      (docid rows of the table B×K, scores B×K, bound B), best first. Where there are fewer docids than beams
      the row is -1 and the score -inf. No docid that was left out scores above the bound (the best score at
      which a beam was dropped, as a docid scores no more than its beginning): those found above it are, in
      their order, what scoring every docid would find.
    """
    batch_size = jax.tree.leaves(cache)[0].shape[0]  # of any size, or symbolic
    root = jnp.zeros((batch_size, 1), jnp.int32)
    degree = jnp.broadcast_to(jnp.asarray(trie.root_degree, jnp.int32), root.shape)
    state = Beams(jnp.zeros(root.shape, jnp.float32), root, root, degree)
    token_LxS = jnp.asarray(trie.token_LxS)
    logits_Bx1xS, log_z_Bx1, cache = step(root, 0, cache, token_LxS[0])
    grown = functools.partial(_expand_own_queries, mesh, trie, beams)
    state, parent = grown(trie.fanouts[0], state, logits_Bx1xS, log_z_Bx1, jnp.int32(0))
    cache, bound_B = _take_beams(cache, parent), state.score[:, -1]

    # The branches of the loop's body differ in how many children they look at.
    fanouts = sorted(set(trie.fanouts[1:]))
    branch_of = jnp.array([0, *(fanouts.index(fanout) for fanout in trie.fanouts[1:])])
    branches = [functools.partial(grown, fanout) for fanout in fanouts]

    def goes_on(carry) -> jax.Array:
        position, state, *_ = carry
        symbol = trie.tail_symbol(state.child, position)
        ended = token_LxS[jnp.minimum(position, trie.length - 1)][symbol] == 0
        return (position < trie.length) & ~jnp.all((state.degree == 0) & ended)

    def write(carry):
        position, state, cache, bound_B = carry
        logits_BxKxS, log_z_BxK, cache = step(state.token, position, cache, token_LxS[position])
        state, parent = jax.lax.switch(
            branch_of[position], branches, state, logits_BxKxS, log_z_BxK, position
        )
        return position + 1, state, _take_beams(cache, parent), jnp.maximum(bound_B, state.score[:, -1])

    _, state, _, bound_B = jax.lax.while_loop(goes_on, write, (jnp.int32(1), state, cache, bound_B))
    found = state.score > -jnp.inf
    return jnp.where(found, state.child, -1), state.score, bound_B


def expand(
    trie: Trie,
    fanout: int,
    beams: int,
    state: Beams,
    logits_BxKxS: jax.Array,
    log_z_BxK: jax.Array,
    position: jax.Array | int,
) -> tuple[Beams, jax.Array]:
    """One step of the search: the best `beams` of all beams' children, and the beam that each came from, B×K.

    Only the children's logits are looked at, at most `fanout` (F) of each beam; a beam whose docid is known
    goes on with it, or, where that has ended, unchanged.
    """
    B = state.score.shape[0]
    nth_F = jnp.arange(fanout)
    token_S = jnp.asarray(trie.token_LxS)[position]
    tail_BxK = trie.tail_symbol(state.child, position)
    symbol_BxKxF = trie.symbol_E.at[state.child[..., None] + nth_F].get(mode="clip").astype(jnp.int32)
    symbol_BxKxF = jnp.where((state.degree == 0)[..., None], tail_BxK[..., None], symbol_BxKxF)
    log_prob = _take(logits_BxKxS, symbol_BxKxF) - log_z_BxK[..., None]
    # Only symbol 0 can stand for token 0: the docid has ended, and goes on at no cost.
    log_prob = jnp.where((symbol_BxKxF == 0) & (token_S[0] == 0), 0.0, log_prob)
    exists = nth_F < jnp.maximum(state.degree, 1)[..., None]
    total_BxC = jnp.where(exists, state.score[..., None] + log_prob, -jnp.inf).reshape(B, -1)

    kept = min(beams, total_BxC.shape[1])
    score, best = jax.lax.top_k(total_BxC, kept)
    parent = best // fanout
    single, child = _take(state.degree, parent) == 0, _take(state.child, parent)
    edge = child + best % fanout
    reached = Beams(
        score,
        token_S[_take(symbol_BxKxF.reshape(B, -1), best)],
        jnp.where(single, child, trie.child_E.at[edge].get(mode="clip")),
        jnp.where(single, 0, trie.degree_E.at[edge].get(mode="clip").astype(jnp.int32)),
    )
    missing = ((0, 0), (0, beams - kept))
    nobody = Beams(-jnp.inf, 0, 0, 0)
    reached = [jnp.pad(x, missing, constant_values=n) for x, n in zip(reached, nobody, strict=True)]
    return Beams(*reached), jnp.pad(parent, missing)


def _expand_own_queries(mesh: Mesh | None, trie: Trie, beams: int, fanout: int, *beams_logits_and_position):
    """`expand`, by each device for its own queries: XLA would gather those of all for the top-k."""

    def own(trie: Trie, *beams_logits_and_position):
        return expand(trie, fanout, beams, *beams_logits_and_position)

    if mesh is not None:
        rows = P("data")
        specs = (P(), rows, rows, rows, P())
        # Unchecked: the devices of `model` do the same.
        own = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return own(trie, *beams_logits_and_position)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Along the last axis."""
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def _take_beams(cache: Any, parent_BxK: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.vmap(lambda a, i: a[i])(x, parent_BxK), cache)
