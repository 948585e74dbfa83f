"""What a plan adds to the beam search: bonuses of prefixes, and the lexical part of the scores of docids.

A plan keeps passages (planning.py); the search knows docids. A passage that has several docids lends its
lexical score to each of them, and a docid that several passages share has the score of its best passage.

A prefix below which the plan kept no passage has as its bonus the plan's floor, the lowest score that was
kept: no passage outside of the plan has a larger one. (PAG gives it 0, or nothing.) So the priority of a
prefix, `sequential_weight` · (sum of token scores) + bonus, is an upper bound of the scores of all docids
below it where token scores are log-probabilities, and the search keeps its certificate.

Letters in shapes are those of planning.py.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.decoding.planning import Plan, SetArrays, score_rows
from retrieval_jax.decoding.trie import capacity

_NONE = np.iinfo(np.int32).max  # pads ascending rows
_AT_ONCE = 16  # passages of a shared docid that are scored at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DocidArrays:
    """The docids of passages, and the passages of docids; padded, so that a similar table does not recompile.

    Attributes:
      local_id_NxL: unsigned integers, the docids of a table as local ids of its trie. The first rows are
        those of the passages; further ones are of passages that have several docids.
      passages: int32 scalar, how many passages there are.
      extra_passage_M: int32, ascending, the passages that the further rows are of.
      shared_first_S: int32, ascending, for each row whose docid an earlier row has: the first such row.
      shared_row_S: int32, those rows.
      max_docids: the most docids of one passage. Static.
    """

    local_id_NxL: np.ndarray | jax.Array
    passages: np.ndarray | jax.Array
    extra_passage_M: np.ndarray | jax.Array
    shared_first_S: np.ndarray | jax.Array
    shared_row_S: np.ndarray | jax.Array
    max_docids: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planning:
    """All that a planned search takes besides the docids' own arrays.

    Attributes:
      sets: the token sets, by passage; where docids are single tokens, by token of the softmax.
      sequential_weight: float32 scalar, not negative: what sums of token scores are multiplied by.
      docids: None where docids are single tokens, all of which are scored.
      size: n, how many passages a plan keeps. Static.
      of_prefixes: whether the docids are prefixes of docids, which very many passages share: the lexical part
        of a prefix's score is then its bonus. Static.
    """

    sets: SetArrays
    sequential_weight: np.ndarray | jax.Array
    docids: DocidArrays | None
    size: int = dataclasses.field(metadata={"static": True})
    of_prefixes: bool = dataclasses.field(default=False, metadata={"static": True})


class KeptDocids(NamedTuple):
    """The docids of a plan's passages, and how the search has followed them so far.

    Attributes:
      local_id_BxDxL: the docids.
      score_BxD: float32, their passages' lexical scores; -inf where there is no docid.
      beam_BxD: int32, the beam that has written the docid's prefix so far; -1: none has.
      steps_BxD: int32, how many of its tokens beams have written.
      floor_B: float32, the bonus of prefixes below which there is no kept docid.
      weight_B: float32, `sequential_weight`.
      least_B: float32, the priority of the worst of the beams that were chosen last.
    """

    local_id_BxDxL: jax.Array
    score_BxD: jax.Array
    beam_BxD: jax.Array
    steps_BxD: jax.Array
    floor_B: jax.Array
    weight_B: jax.Array
    least_B: jax.Array

    def priorities(
        self, total_BxKC: jax.Array, local_id_BxKxC: jax.Array, position: jax.Array | int, local_ids: int
    ) -> jax.Array:
        """Computes by what the search chooses among children, float32 B×KC; see the module's docstring.

        A kept docid follows one beam at most, so that its score goes to one place of B×K×I.

        Args:
          total_BxKC: the sums of their token scores; -inf where there is no child.
          local_id_BxKxC: int32, the tokens that they add.
          position: of these tokens; may be traced.
          local_ids: I.
        """
        B, K, _ = local_id_BxKxC.shape
        bonus_BxKxI = jnp.broadcast_to(self.floor_B[:, None, None], (B, K, local_ids))
        beam_BxD = jnp.where(self.beam_BxD < 0, K, self.beam_BxD)  # out of bounds, which is dropped
        at = jnp.arange(B)[:, None], beam_BxD, self._local_ids(position)
        bonus_BxKxI = bonus_BxKxI.at[at].max(self.score_BxD, mode="drop")
        bonus_BxKxC = jnp.take_along_axis(bonus_BxKxI, local_id_BxKxC, axis=-1, mode="clip")
        priority_BxKC = self.weight_B[:, None] * total_BxKC + bonus_BxKxC.reshape(B, -1)
        return jnp.where(total_BxKC > -jnp.inf, priority_BxKC, -jnp.inf)

    def bonuses(self, beams: int) -> jax.Array:
        """Returns the bonuses of what the beams have written so far, float32 B×K."""
        B = self.floor_B.shape[0]
        beam_BxD = jnp.where(self.beam_BxD < 0, beams, self.beam_BxD)  # out of bounds, which is dropped
        bonus_BxK = jnp.broadcast_to(self.floor_B[:, None], (B, beams))
        return bonus_BxK.at[jnp.arange(B)[:, None], beam_BxD].max(self.score_BxD, mode="drop")

    def follow(
        self, parent_BxK: jax.Array, local_id_BxK: jax.Array, least_B: jax.Array, position: jax.Array | int
    ) -> "KeptDocids":
        """Returns the same after a step of the search.

        Args:
          parent_BxK: int32, the beam that each new beam came from.
          local_id_BxK: int32, the token that it added.
          least_B: see the attribute.
          position: of these tokens; may be traced.
        """
        same_BxKxD = self.beam_BxD[:, None] == parent_BxK[..., None]
        same_BxKxD &= self._local_ids(position)[:, None] == local_id_BxK[..., None]
        # Beams that are no hypotheses come last, and are followed by nothing that follows another one.
        beam_BxD = jnp.where(same_BxKxD.any(axis=1), jnp.argmax(same_BxKxD, axis=1), -1)
        steps_BxD = self.steps_BxD + (beam_BxD >= 0)
        return self._replace(beam_BxD=beam_BxD.astype(jnp.int32), steps_BxD=steps_BxD, least_B=least_B)

    def _local_ids(self, position: jax.Array | int) -> jax.Array:
        """Returns the kept docids' tokens at a position, int32 B×D."""
        local_id_BxD = jax.lax.dynamic_index_in_dim(self.local_id_BxDxL, position, axis=2, keepdims=False)
        return local_id_BxD.astype(jnp.int32)


def build_docids(
    local_id_NxL: np.ndarray,
    first_N: np.ndarray,
    extra_passage_M: np.ndarray | None = None,
    reuse_shapes_of: DocidArrays | None = None,
) -> DocidArrays:
    """Lays out the docids of a table for planned search.

    Args:
      local_id_NxL: the table's docids; see `local_ids.to_local_ids`.
      first_N: for each row the first row with the same docid, as `build_trie` gives it.
      extra_passage_M: int32, ascending, the passages that the last M rows are of; None where each passage has
        one docid.
      reuse_shapes_of: the arrays of an earlier state of the table, whose shapes are taken if these fit.
    """
    earlier, extra_passage_M = (
        reuse_shapes_of,
        np.zeros(0, np.int32) if extra_passage_M is None else extra_passage_M,
    )
    duplicates = np.flatnonzero(first_N != np.arange(len(first_N)))
    duplicates = duplicates[np.argsort(first_N[duplicates], kind="stable")]
    docids_of = np.bincount(extra_passage_M, minlength=1).max() + 1

    def pad(x: np.ndarray, fill: int, like: str) -> np.ndarray:
        size, before = capacity(len(x)), getattr(earlier, like).shape[0] if earlier else 0
        padded = np.full((before if size <= before else size, *x.shape[1:]), fill, x.dtype)
        padded[: len(x)] = x
        return padded

    missing = earlier.local_id_NxL.shape[1] - local_id_NxL.shape[1] if earlier else 0
    if missing > 0:  # as `build_trie` does
        local_id_NxL = np.pad(local_id_NxL, ((0, 0), (0, missing)))
    return DocidArrays(
        pad(local_id_NxL, 0, "local_id_NxL"),
        np.int32(len(local_id_NxL) - len(extra_passage_M)),
        pad(extra_passage_M.astype(np.int32), _NONE, "extra_passage_M"),
        pad(first_N[duplicates].astype(np.int32), _NONE, "shared_first_S"),
        pad(duplicates.astype(np.int32), -1, "shared_row_S"),
        max_docids=max(int(docids_of), earlier.max_docids if earlier else 1),
    )


def keep(plan: Plan, docids: DocidArrays, sequential_weight: jax.Array) -> KeptDocids:
    """Finds the docids of a plan's passages, for `constrained_beam_search`.

    Args:
      plan: the passages.
      docids: their docids.
      sequential_weight: see `Planning`.
    """
    row_BxD, score_BxD = _docids_of(plan.row_Bxn, docids), plan.score_Bxn
    if docids.max_docids > 1:
        score_BxD = jnp.repeat(score_BxD, docids.max_docids, axis=1)
    there_BxD, B = row_BxD >= 0, row_BxD.shape[0]
    zeros_BxD = jnp.zeros(row_BxD.shape, jnp.int32)
    return KeptDocids(
        jnp.asarray(docids.local_id_NxL)[jnp.maximum(row_BxD, 0)],
        jnp.where(there_BxD, score_BxD, -jnp.inf),
        jnp.where(there_BxD, 0, -1),
        zeros_BxD,
        jnp.where(plan.row_Bxn[:, -1] < 0, 0.0, plan.score_Bxn[:, -1]),  # or nothing is left out
        jnp.full(B, sequential_weight, jnp.float32),
        jnp.full(B, -jnp.inf),
    )


def lexical_scores(
    weights_BxV: jax.Array,
    sets: SetArrays,
    docids: DocidArrays,
    row_BxK: jax.Array,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Computes the lexical scores of docids, float32 B×K: each is that of its best passage.

    Args:
      weights_BxV: the queries' weights of tokens.
      sets: the passages' tokens.
      docids: the passages of docids.
      row_BxK: int32, the docids: the first row of each, or -1.
      mesh: see `planning.plan`.
    """
    best_BxK = score_rows(weights_BxV, sets, _passage_of(row_BxK, docids), mesh)
    shared_first_S, shared_row_S = jnp.asarray(docids.shared_first_S), jnp.asarray(docids.shared_row_S)
    begin_BxK, end_BxK = (jnp.searchsorted(shared_first_S, row_BxK, side) for side in ("left", "right"))

    def add_passages(carry):
        done, best_BxK = carry
        at_BxKxA = begin_BxK[..., None] + done + jnp.arange(_AT_ONCE)
        there_BxKxA = at_BxKxA < end_BxK[..., None]
        row_BxKxA = jnp.where(there_BxKxA, shared_row_S.at[at_BxKxA].get(mode="clip"), -1)
        passages = _passage_of(row_BxKxA, docids).reshape(row_BxK.shape[0], row_BxK.shape[1] * _AT_ONCE)
        scores_BxKxA = score_rows(weights_BxV, sets, passages, mesh).reshape(row_BxKxA.shape)
        best_of_these_BxK = jnp.where(there_BxKxA, scores_BxKxA, -jnp.inf).max(axis=-1)
        return done + _AT_ONCE, jnp.maximum(best_BxK, best_of_these_BxK)

    most = jnp.max(end_BxK - begin_BxK)  # passages besides the first of any of these docids
    return jax.lax.while_loop(lambda carry: carry[0] < most, add_passages, (jnp.int32(0), best_BxK))[1]


def rerank(
    rows_BxK: jax.Array, sequential_BxK: jax.Array, lexical_BxK: jax.Array, sequential_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sorts the docids that a search found by sequential_weight · sequential + lexical.

    Args:
      rows_BxK: int32, -1 for none.
      sequential_BxK: float32, the sums of their tokens' scores.
      lexical_BxK: float32, their lexical scores.
      sequential_weight: see `Planning`.

    Returns:
      (rows B×K, best first; their scores, -inf where there is no docid).
    """
    found = rows_BxK >= 0
    total = jnp.where(found, sequential_weight * jnp.where(found, sequential_BxK, 0) + lexical_BxK, -jnp.inf)
    scores, nth = jax.lax.top_k(total, total.shape[1])
    return jnp.take_along_axis(rows_BxK, nth, axis=1), scores


def _docids_of(row_Bxn: jax.Array, docids: DocidArrays) -> jax.Array:
    """Finds the rows of the docids of passages, B×(n·max_docids); -1 for none."""
    if docids.max_docids == 1:
        return row_Bxn
    extra_passage_M = jnp.asarray(docids.extra_passage_M)
    row_Bxnx1 = row_Bxn[..., None]
    at = jnp.searchsorted(extra_passage_M, row_Bxnx1) + jnp.arange(docids.max_docids - 1)
    is_its = extra_passage_M.at[at].get(mode="fill", fill_value=_NONE) == row_Bxnx1
    rows = jnp.concatenate([row_Bxnx1, jnp.where(is_its, docids.passages + at, -1)], axis=-1)
    return rows.reshape(row_Bxn.shape[0], -1).astype(jnp.int32)


def _passage_of(row_BxK: jax.Array, docids: DocidArrays) -> jax.Array:
    """Finds the rows of the passages that docids are of; negative rows stay as they are."""
    if docids.max_docids == 1:
        return row_BxK
    extra_passage_M = jnp.asarray(docids.extra_passage_M)
    extra = extra_passage_M.at[jnp.maximum(row_BxK - docids.passages, 0)].get(mode="clip")
    return jnp.where(row_BxK < docids.passages, row_BxK, extra)
