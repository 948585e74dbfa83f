"""The learned-sparse searcher: the weights of a lexical head, summed over the passages' sets of tokens.

It scores all passages for each query: one gather and one sum over the sets, which lie on the devices in the
bytes that they have on disk. Its folder holds the sets' files (see token_sets.py), whose facts are in the
manifest.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.checkpoints.model_folder import LoadedModel
from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.decoding.planning import Plan, SetArrays, build_sets, place_sets, plan
from retrieval_jax.docids import token_sets
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.embeddings.text_encoder import TextEncoder, query_shapes
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import Partitioner, all_devices
from retrieval_jax.models.softmax import exact_products
from retrieval_jax.search.encoding_searcher import EncodingSearcher, load_own_model
from retrieval_jax.search.heaviest_tokens import heaviest_tokens
from retrieval_jax.search.index_inputs import IndexInputs
from retrieval_jax.search.searcher import RankedList, register_searcher

_SIZES = (1, 8, 32)  # queries that are scored at once
_DEPTH = 128  # a search keeps a multiple of so many passages, so that few depths are compiled
_EXPLAINED = 32  # tokens of a query that are explained, at most


@register_searcher
class LexicalSearcher(EncodingSearcher):
    """Ranks all passages by the sum of the query's weights of the tokens in their sets.

    Args:
      encoder: gives the weights of queries.
      sets: the passages' sets of tokens.
      mesh: the devices over which the sets are spread; None for one device.
    """

    kind: ClassVar[str] = "lexical"
    family: ClassVar[str] = "lexical"
    model_family: ClassVar[str | None] = "lexical"
    other_model_families: ClassVar[tuple[str, ...]] = ("generative",)
    reads_settings: ClassVar[tuple[str, ...]] = ("sets",)

    def __init__(self, encoder: TextEncoder, sets: TokenSets, mesh: Mesh | None = None):
        super().__init__(encoder)
        self.sets = sets
        self.mesh = mesh or all_devices(devices=jax.local_devices()[:1])
        shards = self.mesh.shape["data"]
        arrays = build_sets(sets.tokens_PxM, sets.impacts_PxM, sets.impact_scale, shards)
        self.arrays = place_sets(arrays, functools.partial(multihost.make_global_arrays, self.mesh))
        self.batch_sizes: Sequence[int] = _SIZES
        self.find_rows = arrow_ids.RowFinder(sets.passage_ids)

    def use_batch_sizes(self, sizes: Sequence[int]) -> None:
        """See `Searcher.use_batch_sizes`: of the encoder, and of the scores."""
        super().use_batch_sizes(sizes)
        self.batch_sizes = sizes

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`. The scores are the sums of weights; passages without any are not found."""
        if not queries or k <= 0:
            return [[] for _ in queries]
        n = -(-min(k, len(self.sets.passage_ids)) // _DEPTH) * _DEPTH
        lists = []
        for weights_BxV in self._weights(queries):
            found = self._plan(weights_BxV, n)
            lists += [self._ranked_list(*pair, k) for pair in zip(*found, strict=True)]
        return lists

    def _weights(self, queries: Sequence[str]) -> Iterator[np.ndarray]:
        """Yields the weights of each batch of queries, B×V: those of all of them need not fit into memory."""
        for first in range(0, len(queries), self.batch_sizes[-1]):
            yield self.encoder(queries[first : first + self.batch_sizes[-1]])

    def _plan(self, weights_BxV: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the best n passages: rows and scores, each B×n."""
        count, shards = len(weights_BxV), self.mesh.shape["data"]
        size = next(size for size in self.batch_sizes if size >= count)
        padded = np.pad(weights_BxV, ((0, -(-size // shards) * shards - count), (0, 0)))
        placed = multihost.make_global_arrays(self.mesh, padded, "data")
        found = best_passages(placed, self.arrays, n, self.mesh)
        return np.asarray(found.row_Bxn)[:count], np.asarray(found.score_Bxn)[:count]

    def _ranked_list(self, rows_n: np.ndarray, scores_n: np.ndarray, k: int) -> RankedList:
        pairs = zip(rows_n[:k].tolist(), scores_n[:k].tolist(), strict=True)
        return [(self.sets.passage_ids[row].as_py(), score) for row, score in pairs if score > 0]

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`. The scores are the sums of weights."""
        results, weights = [], itertools.chain.from_iterable(self._weights(queries))
        for weights_V, wanted in zip(weights, candidates, strict=True):
            rows_C = np.array(self.find_rows(wanted), int)
            scores_C = self.sets.contributions(weights_V, rows_C).sum(axis=1, dtype=np.float32)
            results.append(np.where(rows_C < 0, np.nan, scores_C).tolist())
        return results

    def explain(self, query: str, ranked_list: RankedList) -> dict:
        """See `Searcher.explain`.

        Returns:
          "certain": the number of passages, as all are scored; "tokens": [{"text", "score"}, …], the query's
          tokens of highest weight; "docids": for each passage {"passage": its id, "tokens": those that it
          shares with the query, with what each adds to its score}; best first.
        """
        (weights_V,), vocabulary = self.encoder([query]), self.encoder.vocabulary
        pieces = vocabulary.model.get_piece_size()  # the network's table may be padded
        ids = [passage_id for passage_id, _ in ranked_list]
        rows_C = np.array(self.find_rows(ids), int)
        passages = [
            {
                "passage": passage_id,
                "tokens": heaviest_tokens(vocabulary, self.sets.tokens_PxM[row], added_M, self.sets.size),
            }
            for passage_id, row, added_M in zip(
                ids, rows_C, self.sets.contributions(weights_V, rows_C), strict=True
            )
        ]
        weighed = heaviest_tokens(vocabulary, np.arange(pieces), weights_V[:pieces], _EXPLAINED)
        return {"certain": len(passages), "tokens": weighed, "docids": passages}

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the sets."""
        if not inputs.model.model.config.lexical_head:
            raise UserError(
                f"{inputs.model_dir}: has no lexical head: train it with T5Config.lexical_head=True, or a "
                "model of runs/lexical.gin"
            )
        return {"sets_fingerprint": inputs.token_sets.fingerprint()}

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`."""
        source = token_sets.chosen(inputs.work, inputs.settings.sets)
        facts = storage.read_manifest(source, "sets")
        for name in token_sets.files(facts):
            paths.link(paths.ensure_local(source / name), folder / name)
        return {
            "passages": facts["passages"],
            "token_sets": {k: v for k, v in facts.items() if k != "recipe"},
        }

    @classmethod
    def open(
        cls, folder: Path, make_partitioner: Callable[[], Partitioner] | None = None
    ) -> "LexicalSearcher":
        """See `Searcher.open`."""
        manifest = storage.read_manifest(folder, "index")
        mesh = make_partitioner().mesh if make_partitioner else all_devices()
        sets = TokenSets.read(paths.ensure_local(folder), manifest["token_sets"])
        return cls(weights_encoder(load_own_model(folder, manifest)), sets, mesh)


@functools.partial(jax.jit, static_argnames=("n", "mesh"))
def best_passages(weights_BxV: jax.Array, sets: SetArrays, n: int, mesh: Mesh) -> Plan:
    """Finds the best n passages of each query, on every device; see `plan`."""
    found = plan(weights_BxV, sets, n, mesh)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))


def weights_encoder(opened: LoadedModel) -> TextEncoder:
    """Makes what gives the weights of queries, by a model with a lexical head."""
    model = opened.model

    def encode(params: dict, tokens_BxS: jax.Array) -> jax.Array:
        with exact_products():
            return model.lexical_weights(params, {"encoder_input_tokens": tokens_BxS})

    vocabulary = opened.vocabulary.with_prompt(model.prompts.query)
    return TextEncoder(encode, opened.params, vocabulary, query_shapes(opened.description["input_length"]))
