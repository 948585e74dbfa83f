"""The two ways in which a generative retriever finds the docids of a table.

`TrieSearch` runs a beam search along the trie of all docids. `SoftmaxSearch` is for docids that are a single
token each: one decoding step scores all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.atomic import DocidTokens
from retrieval_jax.decoding.bonuses import DocidArrays, Planning, build_docids
from retrieval_jax.decoding.local_ids import to_local_ids
from retrieval_jax.decoding.planning import SetArrays, build_sets, padded_rows
from retrieval_jax.decoding.trie import Trie, build_trie, capacity, check_sizes, edge_dtypes
from retrieval_jax.docids.search_strategy import SearchStrategy
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import SetShape, token_dtype

EDGES_PER_DOCID = 2  # a trie in which every node has several children has no more edges


class TrieSearch(SearchStrategy):
    """Beam search along the trie of the docids; see `decoding.beam_search`."""

    name = "trie"
    prunes = True

    @classmethod
    def build(cls, table, outputs, reuse_shapes_of=None):
        """See SearchStrategy. Raises UserError where a docid is a prefix of another, or too many exist."""
        try:
            return build_trie(table.tokens_NxL, reuse_shapes_of=reuse_shapes_of)
        except ValueError as error:
            raise UserError(
                f"docids/{table.kind}: {error}: make the docids again, `retrieval-jax docids`"
            ) from None

    @classmethod
    def abstract(cls, shape, passages, outputs):
        """See SearchStrategy. The trie is rather too large than too small."""

        def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        local_ids, docids = round_up(shape.tokens_per_position, 8), passages + shape.extra_docids
        bits, edges = (local_ids - 1).bit_length(), EDGES_PER_DOCID * docids
        words = round_up(docids, 32) // 32 * (shape.length - 1) * bits
        try:
            check_sizes(docids, edges, words)
        except ValueError as error:
            raise UserError(f"DOCIDS: {error}: choose shorter ones, or a part of the collection") from None
        max_branching = (local_ids,) * shape.length
        return Trie(
            array(np.int32, shape.length, local_ids),
            *(array(dtype, edges) for dtype in edge_dtypes(local_ids, max_branching)),
            array(np.int32, edges),
            array(np.uint32, words),
            array(np.int32),
            max_branching=max_branching,
            suffix_start=1,
            local_id_bits=bits,
        )

    @classmethod
    def width(cls, beams, k, outputs):
        """See SearchStrategy: a beam search finds as many docids as it has beams."""
        return beams

    @classmethod
    def steps(cls, docids):
        """See SearchStrategy: the first token of a docid is chosen before the loop."""
        return docids.length - 1

    @classmethod
    def decode(cls, model, params, batch, docids, width, mesh=None, recall_target=None, planning=None):
        """See SearchStrategy. The search is as exact as its beams allow: `recall_target` has no effect."""
        return model.predict_batch_with_aux(
            params, batch, trie=docids, beams=width, mesh=mesh, planning=planning
        )

    @classmethod
    def planned_docids(cls, table, docids, first_N, reuse_shapes_of=None):
        """See SearchStrategy."""
        _, local_id_NxL = to_local_ids(table.tokens_NxL)
        missing = docids.length - local_id_NxL.shape[1]  # of a trie that has an earlier one's shapes
        local_id_NxL = np.pad(local_id_NxL, ((0, 0), (0, missing)))
        return build_docids(local_id_NxL, first_N, table.extra_docid_passage_M, reuse_shapes_of)

    @classmethod
    def build_planning(cls, table, docids, first_N, sets, size, shards=1, reuse_shapes_of=None):
        """See SearchStrategy: the sets of all passages, and their docids."""
        earlier = reuse_shapes_of
        arrays = cls.planned_docids(table, docids, first_N, earlier and earlier.docids)
        passed = sets.tokens_PxM, sets.impacts_PxM, sets.impact_scale, shards, earlier and earlier.sets
        return Planning(build_sets(*passed), np.float32(1), arrays, size)

    @classmethod
    def abstract_planned_docids(cls, shape, passages):
        """See SearchStrategy. No two passages are taken to share a docid."""
        local_id = np.min_scalar_type(shape.tokens_per_position - 1)
        extra, none = (jax.ShapeDtypeStruct((capacity(n),), np.int32) for n in (shape.extra_docids, 0))
        return DocidArrays(
            jax.ShapeDtypeStruct((capacity(passages + shape.extra_docids), shape.length), local_id),
            jax.ShapeDtypeStruct((), np.int32),
            extra,
            none,
            none,
            max_docids=shape.docids_per_passage,
        )

    @classmethod
    def abstract_planning(cls, docids, passages, outputs, vocab_size, sets, size, shards):
        """See SearchStrategy."""
        return _abstract_planning(padded_rows(passages, shards), vocab_size, sets, docids, size)

    @classmethod
    def encode(cls, model, params, batch):
        """See SearchStrategy: the encoder's part of the decoder's attention."""
        return model.encode_queries(params, batch)

    @classmethod
    def token_scores(cls, model, params, batch, encoded, tokens_BxKxL):
        """See SearchStrategy."""
        return model.docid_scores(params, batch, encoded, tokens_BxKxL)


class SoftmaxSearch(SearchStrategy):
    """One decoding step, then the best k of the softmax; see `decoding.atomic`. Every docid is one token."""

    name = "softmax"
    mesh_axes = set_axes = ("model",)

    @classmethod
    def build(cls, table, outputs, reuse_shapes_of=None):
        """See SearchStrategy. Raises UserError where a docid has several tokens or several passages."""
        rows_N = np.arange(len(table.tokens_NxL), dtype=np.int32)
        token_to_passage_V = _token_to_passage(table, outputs)
        if table.length > 1 or np.count_nonzero(token_to_passage_V >= 0) < len(rows_N) or table.has_several:
            raise UserError(
                f"docids/{table.kind}: one step of the softmax finds only docids that are a single token, "
                "each of one passage that has no other: give the kind search = TrieSearch"
            )
        return DocidTokens(token_to_passage_V), rows_N

    @classmethod
    def abstract(cls, shape, passages, outputs):
        """See SearchStrategy."""
        return DocidTokens(jax.ShapeDtypeStruct((outputs,), np.int32))

    @classmethod
    def width(cls, beams, k, outputs):
        """See SearchStrategy: there are no beams, and all k docids are found."""
        return min(k, outputs)

    @classmethod
    def steps(cls, docids):
        """See SearchStrategy."""
        return 1

    @classmethod
    def decode(cls, model, params, batch, docids, width, mesh=None, recall_target=None, planning=None):
        """See SearchStrategy."""
        token_to_passage_V = docids.token_to_passage_V
        tokens_BxK, aux = model.rank_atomic(
            params, batch, token_to_passage_V >= 0, width, mesh, recall_target, planning
        )
        return jnp.where(tokens_BxK >= 0, token_to_passage_V[tokens_BxK], -1), aux

    @classmethod
    def build_planning(cls, table, docids, first_N, sets, size, shards=1, reuse_shapes_of=None):
        """See SearchStrategy: a set for each token of the softmax, which need not be padded."""
        row_V = _token_to_passage(table, docids.token_to_passage_V.shape[0])

        def of_tokens(x_PxM: np.ndarray | None) -> np.ndarray | None:
            if x_PxM is None:
                return None
            return np.where(row_V[:, None] >= 0, x_PxM[np.maximum(row_V, 0)], 0).astype(x_PxM.dtype)

        arrays = map(of_tokens, (sets.tokens_PxM, sets.impacts_PxM))
        made = SetArrays(*arrays, np.float32(sets.impact_scale), np.int32(len(row_V)))
        return Planning(made, np.float32(1), None, size)

    @classmethod
    def abstract_planning(cls, docids, passages, outputs, vocab_size, sets, size, shards):
        """See SearchStrategy."""
        return _abstract_planning(outputs, vocab_size, sets, docids, size)

    @classmethod
    def encode(cls, model, params, batch):
        """See SearchStrategy: the scores of all docids, B×V."""
        return model.atomic_scores(params, batch)

    @classmethod
    def token_scores(cls, model, params, batch, encoded, tokens_BxKxL):
        """See SearchStrategy."""
        return jnp.take_along_axis(encoded, tokens_BxKxL[..., 0], axis=1)[..., None]


def _token_to_passage(table: DocidTable, outputs: int) -> np.ndarray:
    """Returns `DocidTokens.token_to_passage_V` of a table of single tokens."""
    token_to_passage_V = np.full(outputs, -1, np.int32)
    token_to_passage_V[table.tokens_NxL[:, 0]] = np.arange(len(table.tokens_NxL))
    return token_to_passage_V


def _abstract_planning(
    rows: int, vocab_size: int, sets: SetShape, docids: DocidArrays | None, size: int
) -> Planning:
    """Makes what `abstract_planning` returns."""
    scalars = (jax.ShapeDtypeStruct((), dtype) for dtype in (np.float32, np.int32, np.float32))
    scale, count, weight = scalars
    tokens = jax.ShapeDtypeStruct((rows, sets.size), token_dtype(vocab_size))
    impacts = jax.ShapeDtypeStruct(tokens.shape, np.uint8) if sets.impacts else None
    return Planning(SetArrays(tokens, impacts, scale, count), weight, docids, size)


STRATEGIES: dict[str, type[SearchStrategy]] = {
    strategy.name: strategy for strategy in (TrieSearch, SoftmaxSearch)
}
