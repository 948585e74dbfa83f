"""Constrained beam search over docids: exact scores, and only docids of the trie can come out.

Letters in shapes: B queries, K beams, I local ids (see local_ids.py), C children of a beam's node, L
positions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from retrieval_jax.decoding.bonuses import KeptDocids
from retrieval_jax.decoding.trie import Trie

DecodeStep = Callable[[jax.Array, jax.Array | int, Any, jax.Array], tuple[jax.Array, jax.Array | None, Any]]
"""The decoder, which reads one token a beam and predicts the next one.

Args:
  newest tokens: int32 B×K. At position 0 they are 0 (the start token) and K is 1.
  position: of these tokens; may be traced.
  cache: any pytree of arrays B×K×…, whose beams the search re-orders.
  candidates: int32, I tokens.

Returns:
  (float32 logits B×K×I of the candidates as the next token; log-sum-exp B×K of the logits of the whole
  vocabulary, or None where the search is to add up logits; the cache with the newest tokens).
"""


class Beams(NamedTuple):
    """The K best hypotheses of each query, best first, and where they stand in the trie. Each array is B×K.

    Attributes:
      score: float32, the sum of its tokens' log-probabilities, or of their logits; -inf where there is no
        hypothesis.
      token: int32, its newest token.
      first_child: int32, the first edge that leaves its node, or, without children, its docid's row.
      num_children: int32, how many edges leave its node; 0: one docid is left.
    """

    score: jax.Array
    token: jax.Array
    first_child: jax.Array
    num_children: jax.Array


def constrained_beam_search(
    step: DecodeStep,
    cache: Any,
    trie: Trie,
    beams: int,
    mesh: Mesh | None = None,
    kept: KeptDocids | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, KeptDocids | None]:
    """Finds the docids of highest log-probability under the model's full softmax, or of the largest logits.

    A hypothesis's score is the sum of the log-probabilities of its tokens: there is no length penalty, and
    probabilities are not renormalised over the allowed tokens. Where the step gives no log-sum-exp, the score
    is the sum of the tokens' logits (RIPOR, Zeng et al. 2024, section 3.1); a docid that has ended adds
    nothing. With as many beams as docids the result is that of scoring every docid.

    The step is compiled twice: for the root, where a query has one beam, and in a loop over the other
    positions, which ends when every beam has written its docid.

    As an example, the four docids of `build_trie`, and a model whose next token depends on the position
    alone. Three beams find the docids of probabilities 0.6 · 0.7 · 0.9, 0.6 · 0.3 · 0.9 and 0.4 · 0.3 · 0.9:

    >>> trie, _ = build_trie(np.array([[5, 9, 1, 0], [5, 2, 1, 0], [7, 2, 1, 0], [5, 9, 4, 1]]))
    >>> probability_LxV = np.zeros((4, 10))
    >>> probability_LxV[[0, 0, 1, 1], [5, 7, 9, 2]] = 0.6, 0.4, 0.7, 0.3
    >>> probability_LxV[[2, 2, 3], [1, 4, 1]] = 0.9, 0.1, 1.0
    >>> def step(tokens_BxK, position, cache, candidates_I):
    ...     logits_I = jnp.log(jnp.asarray(probability_LxV)[position])[candidates_I]
    ...     logits_BxKxI = jnp.broadcast_to(logits_I, (*tokens_BxK.shape, len(candidates_I)))
    ...     return logits_BxKxI, jnp.zeros(tokens_BxK.shape), cache
    >>> rows, scores, bound, _ = constrained_beam_search(step, jnp.zeros((1, 1)), trie, beams=3)
    >>> rows.tolist()
    [[0, 1, 2]]
    >>> print(np.exp(scores).round(3))
    [[0.378 0.162 0.108]]

    The hypothesis of probability 0.12, (7, 2), was the worst that three beams kept, so nothing better was
    pruned. The first two docids score above this bound: no other docid can be better than they are.

    >>> print(np.exp(bound).round(3))
    [0.12]

    Args:
      step: the decoder; see `DecodeStep`.
      cache: what the first step is given: arrays B×1×….
      trie: the docids; its arrays may be traced.
      beams: K.
      mesh: the mesh over whose axis `data` the queries lie, a whole number on each device; None for one
        device.
      kept: the docids that a plan kept, by whose bonuses beams are chosen (see bonuses.py); None without a
        plan.

    Returns:
      (rows B×K int32: rows of the docid table, best first; scores B×K float32; pruned_upper_bound B float32;
      `kept` after the last step). With `kept`, the order is that of the priorities by which docids were
      chosen, the scores are still the sums of token scores, and the bound is one of docids' priorities, and
      so of sequential_weight · (sum of log-probabilities) + (lexical score).
      Where there are fewer docids than beams the row is -1 and the score -inf. `pruned_upper_bound` is the
      largest score at which a hypothesis may have been pruned. As a docid's log-probability is no larger than
      its prefixes', no docid that is left out scores above it: the docids found above it are exactly those
      that scoring every docid would rank first, in that order. A logit may be positive, so a sum of logits
      may grow, and has no such bound: it is inf, or -inf where a beam was always left, so that nothing was
      pruned.
    """
    trie = jax.tree.map(jnp.asarray, trie)
    batch_size = jax.tree.leaves(cache)[0].shape[0]  # of any size, or symbolic
    root = jnp.zeros((batch_size, 1), jnp.int32)
    num_children = jnp.broadcast_to(trie.root_num_children, root.shape)
    state = Beams(jnp.zeros(root.shape, jnp.float32), root, root, num_children)
    logits_Bx1xI, log_z_Bx1, cache = step(root, 0, cache, trie.token_LxI[0])
    expand_beams = functools.partial(_expand_on_devices, mesh, trie, beams)
    state, parent, kept = expand_beams(
        trie.max_branching[0], state, logits_Bx1xI, log_z_Bx1, jnp.int32(0), kept
    )
    cache, worst_B = _take_beams(cache, parent), _worst(state, kept)

    # The loop's body has a branch for each number of children that a position can need.
    widths = sorted(set(trie.max_branching[1:])) or [1]  # docids of one token never enter the loop
    branch_of = jnp.array([0, *(widths.index(width) for width in trie.max_branching[1:])])
    branches = [functools.partial(expand_beams, width) for width in widths]

    def is_unfinished(carry) -> jax.Array:
        position, state, *_ = carry
        local_id = trie.suffix_local_id(state.first_child, position)
        ended = trie.token_LxI[jnp.minimum(position, trie.length - 1)][local_id] == 0
        return (position < trie.length) & ~jnp.all((state.num_children == 0) & ended)

    def advance(carry):
        position, state, cache, worst_B, kept = carry
        logits_BxKxI, log_z_BxK, cache = step(state.token, position, cache, trie.token_LxI[position])
        state, parent, kept = jax.lax.switch(
            branch_of[position], branches, state, logits_BxKxI, log_z_BxK, position, kept
        )
        worst_B = jnp.maximum(worst_B, _worst(state, kept))
        return position + 1, state, _take_beams(cache, parent), worst_B, kept

    start = (jnp.int32(1), state, cache, worst_B, kept)
    _, state, _, pruned_upper_bound_B, kept = jax.lax.while_loop(is_unfinished, advance, start)
    if log_z_Bx1 is None:
        pruned_upper_bound_B = jnp.where(pruned_upper_bound_B > -jnp.inf, jnp.inf, -jnp.inf)
    found = state.score > -jnp.inf
    return jnp.where(found, state.first_child, -1), state.score, pruned_upper_bound_B, kept


def expand(
    trie: Trie,
    max_children: int,
    beams: int,
    state: Beams,
    logits_BxKxI: jax.Array,
    log_z_BxK: jax.Array | None,
    position: jax.Array | int,
    kept: KeptDocids | None = None,
) -> tuple[Beams, jax.Array, KeptDocids | None]:
    """Takes one step of the search: keeps the best of all children of all beams.

    Only the logits of children are looked at. A beam whose docid is known goes on with that docid, or stays
    unchanged where the docid has ended.

    Args:
      trie: the docids.
      max_children: C, how many children of each beam are looked at; as many as any node at this position has.
      beams: how many hypotheses are kept.
      state: the beams, K of them.
      logits_BxKxI: what the step returned for them.
      log_z_BxK: what the step returned for them.
      position: of the tokens that are chosen here; may be traced.
      kept: the docids that a plan kept; None without a plan.

    Returns:
      (the new beams; int32 B×beams, the index of the beam that each came from; `kept` after the step).
    """
    B = state.score.shape[0]
    child_C = jnp.arange(max_children)
    token_I = trie.token_LxI[position]
    suffix_BxK = trie.suffix_local_id(state.first_child, position)
    local_id_BxKxC = trie.local_id_E.at[state.first_child[..., None] + child_C].get(mode="clip")
    is_single_BxK = state.num_children == 0
    local_id_BxKxC = jnp.where(
        is_single_BxK[..., None], suffix_BxK[..., None], local_id_BxKxC.astype(jnp.int32)
    )
    added = _take(logits_BxKxI, local_id_BxKxC)
    if log_z_BxK is not None:
        added -= log_z_BxK[..., None]
    # Only local id 0 can stand for token 0: the docid has ended, and goes on at no cost.
    added = jnp.where((local_id_BxKxC == 0) & (token_I[0] == 0), 0.0, added)
    exists = child_C < jnp.maximum(state.num_children, 1)[..., None]
    total_BxKC = jnp.where(exists, state.score[..., None] + added, -jnp.inf).reshape(B, -1)

    chosen_by_BxKC = total_BxKC
    if kept is not None:
        chosen_by_BxKC = kept.priorities(total_BxKC, local_id_BxKxC, position, token_I.shape[0])
    count = min(beams, total_BxKC.shape[1])
    priority, best = jax.lax.top_k(chosen_by_BxKC, count)
    parent = best // max_children
    is_single, first_child = _take(is_single_BxK, parent), _take(state.first_child, parent)
    edge = first_child + best % max_children
    local_id = _take(local_id_BxKxC.reshape(B, -1), best)
    reached = Beams(
        priority if kept is None else _take(total_BxKC, best),
        token_I[local_id],
        jnp.where(is_single, first_child, trie.first_child_E.at[edge].get(mode="clip")),
        jnp.where(is_single, 0, trie.num_children_E.at[edge].get(mode="clip").astype(jnp.int32)),
    )
    if kept is not None:
        least_B = priority[:, -1] if count == beams else jnp.full(B, -jnp.inf)
        kept = kept.follow(parent, local_id, least_B, position)
    missing = ((0, 0), (0, beams - count))
    no_hypothesis = Beams(-jnp.inf, 0, 0, 0)
    padded = [
        jnp.pad(x, missing, constant_values=value) for x, value in zip(reached, no_hypothesis, strict=True)
    ]
    return Beams(*padded), jnp.pad(parent, missing), kept


def _worst(state: Beams, kept: KeptDocids | None) -> jax.Array:
    """Returns what the worst of the newest beams was chosen by, B; -inf where there are fewer than K."""
    return state.score[:, -1] if kept is None else kept.least_B


def _expand_on_devices(mesh: Mesh | None, trie: Trie, beams: int, max_children: int, *state_and_logits):
    """Calls `expand` on each device for that device's queries; XLA would gather all queries for the top-k."""

    def expand_local(trie: Trie, *state_and_logits):
        return expand(trie, max_children, beams, *state_and_logits)

    if mesh is not None:
        rows = P("data")
        specs = (P(), rows, rows, rows, P(), rows)
        # Unchecked: the devices along `model` all do the same.
        expand_local = jax.shard_map(expand_local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return expand_local(trie, *state_and_logits)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Takes along the last axis."""
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def _take_beams(cache: Any, parent_BxK: jax.Array) -> Any:
    """Re-orders the second axis of every array."""
    return jax.tree.map(lambda x: jax.vmap(lambda a, i: a[i])(x, parent_BxK), cache)
