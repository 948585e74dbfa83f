"""Atomic docids by ScaNN: columns of the softmax are the docids' vectors, the decoder's state the query's.

A docid's logit is the product of the decoder's state and its column of the softmax. T5 adds no bias. So the
docids of highest probability are those of the largest products, which ScaNN finds without computing all.

    embeddings/NAME.docids/    the columns, as vectors of the passages; see `encoding`
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.checkpoints.model_folder import LoadedModel, model_recipe
from retrieval_jax.core import arrow_ids, npy, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.docids.search_strategies import SoftmaxSearch
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.embeddings.encoding import Embeddings, check_finite
from retrieval_jax.embeddings.text_encoder import TextEncoder, query_shapes
from retrieval_jax.mesh import multihost
from retrieval_jax.models.t5 import output_kernel
from retrieval_jax.search.dense import ScannSearcher
from retrieval_jax.search.index_inputs import IndexInputs
from retrieval_jax.search.searcher import register_searcher

_BLOCK = 1 << 16  # columns of the softmax that are copied at once


@register_searcher
class SoftmaxVectorsSearcher(ScannSearcher):
    """Searches the columns of a softmax over atomic docids with ScaNN; see `ScannSearcher`.

    The scores are logits, whatever the model's `score` is: log-probabilities but for a constant of the query,
    which the logits of all docids would be needed for.
    """

    kind: ClassVar[str] = "softmax_vectors"
    family: ClassVar[str] = "generative"
    model_family: ClassVar[str | None] = "generative"

    @classmethod
    def make_encoder(
        cls, opened: LoadedModel, mesh: Mesh | None = None, dimensions: None = None
    ) -> TextEncoder:
        """See `DenseSearcher.make_encoder`. A query's vector is the decoder's state, and never shortened."""
        model, shapes = opened.model, query_shapes(opened.description["input_length"])
        decoder = {name: x for name, x in opened.params["decoder"].items() if name != "logits_dense"}
        params = opened.params | {"decoder": decoder}  # the columns are in the index
        return TextEncoder(model.first_states, params, opened.vocabulary, shapes, mesh)

    @classmethod
    def make_embeddings(cls, inputs: IndexInputs) -> Embeddings:
        """See `DenseSearcher.make_embeddings`: the columns of the softmax."""
        opened, table = inputs.model, inputs.docids
        recipe = model_recipe(inputs.model_dir, opened.step, opened.description)
        recipe |= {"docids_fingerprint": table.fingerprint()}
        folder = inputs.work.embeddings(f"{paths.absolute(inputs.model_dir).name}.docids")

        def write(tmp: Path) -> dict:
            return write_columns(tmp, output_kernel(opened.model.config, opened.params), table)

        multihost.on_process_0(lambda: storage.build_once(folder, recipe, write))
        return Embeddings.open(folder)

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the docids, and the settings of the index."""
        table = inputs.docids
        if table.search != SoftmaxSearch.name:
            raise UserError(
                f"make_index.kind: {cls.kind} is for docids of one token each (atomic), and "
                f"{inputs.model_dir} writes {table.kind} ones: --gin.make_index.kind=\"'generative'\""
            )
        return super().recipe(inputs) | {"docids_fingerprint": table.fingerprint()}


def write_columns(folder: Path, kernel_ExV: jax.Array, table: DocidTable) -> dict:
    """Writes the columns of a softmax that are docids, as vectors of the table's passages.

    Args:
      folder: an empty folder, for what `Embeddings.open` reads.
      kernel_ExV: float32.
      table: atomic docids.

    Returns:
      Facts for the folder's manifest.
    """
    token_N, E = table.tokens_NxL[:, 0], len(kernel_ExV)
    with (folder / "vectors.npy").open("wb") as file, bar("columns of the softmax", len(token_N)) as advance:
        npy.begin(file, "<f4", (len(token_N), E))
        begin = file.tell()
        for rows, vectors in columns(kernel_ExV, token_N):
            check_finite(vectors, table.kind, rows)
            order = np.argsort(rows)
            ends = np.flatnonzero(np.diff(rows[order], append=-1) != 1) + 1  # of rows that follow each other
            for run in np.split(order, ends[:-1]):
                file.seek(begin + int(rows[run[0]]) * E * 4)
                file.write(vectors[run].astype("<f4").tobytes())
            advance(len(rows))
    np.save(folder / "text_hashes.npy", token_N.astype(np.uint64))  # a passage with another docid is another
    arrow_ids.write(folder / "ids.arrow", table.passage_ids)
    return {"passages": len(token_N), "dimensions": E}


def columns(kernel_ExV: jax.Array, token_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows, float32 vectors): a block of the kernel is fetched from the devices at a time."""
    order = np.argsort(token_N, kind="stable")
    ends = np.searchsorted(token_N[order], np.arange(0, kernel_ExV.shape[1] + _BLOCK, _BLOCK))
    for number, (begin, end) in enumerate(itertools.pairwise(ends.tolist())):
        if end > begin:
            block_ExB = np.asarray(kernel_ExV[:, number * _BLOCK : (number + 1) * _BLOCK])
            rows = order[begin:end]
            yield rows, block_ExB.T[token_N[rows] - number * _BLOCK]
