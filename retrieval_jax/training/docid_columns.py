"""The softmax of docids of one token begins as what the network makes of their passages.

With random columns, a generative retriever knows nothing of a docid before the first example of its passage,
and an epoch of a large collection takes longer than many trainings. Here column d begins as the state in
which the network, as it is before the first step, reads passage d: a text then scores the docids of passages
that it shares words with highest, from the first step on. (Nguyen and Yates 2023, Generative Retrieval as
Dense Retrieval, section 3, tie atomic docids to vectors of their passages.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.core.progress import bar
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.examples.training_data import TrainDataset
from retrieval_jax.mesh import multihost, partitioning
from retrieval_jax.models.generative import GenerativeRetriever

_BLOCK = 1024  # docids for each shard of data that are read at once
_SAME = 1e-9  # of the states' square: what is left of their variance where all are the same but for rounding


def begin_as_passages(
    model: GenerativeRetriever, params: dict, examples: TrainDataset, mesh: Mesh, rules: partitioning.Rules
) -> dict:
    """Replaces the columns of the softmax.

    Args:
      model: the retriever.
      params: its parameters, on the mesh.
      examples: the passages, and their docids of one token each.
      mesh: the devices.
      rules: the mesh axes of each logical axis.

    Returns:
      The parameters. The columns of docids have the mean 0, and in the mean the length 1, as random ones;
      those that stand for no docid are 0, and all are where the passages cannot be told apart.
    """
    table, length = examples.table, examples.config.passage_length
    kernel = params["decoder"]["logits_dense"]["kernel"]
    # Of passages that share a token the first one is read.
    tokens_D, rows_D = np.unique(table.tokens_NxL[:, 0], return_index=True)
    count = len(tokens_D)
    size = min(_BLOCK, round_up(count, 8)) * mesh.shape["data"]

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=kernel.sharding)
    def fill(kernel_ExV: jax.Array, params: dict, inputs_BxS: jax.Array, column_B: jax.Array) -> jax.Array:
        batch = {
            "encoder_input_tokens": inputs_BxS,
            "decoder_input_tokens": jnp.zeros((len(inputs_BxS), 1), jnp.int32),
        }
        with partitioning.mesh_context(mesh, rules):
            x_BxE = model.hidden(params, batch)[:, 0].astype(jnp.float32)
        return kernel_ExV.at[:, column_B].set(x_BxE.T, mode="drop")

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=kernel.sharding)
    def centre(kernel_ExV: jax.Array, is_docid_V: jax.Array) -> jax.Array:
        mean_E = jnp.sum(kernel_ExV, axis=1, keepdims=True) / count
        centred = jnp.where(is_docid_V, kernel_ExV - mean_E, 0.0)
        variance, square = (jnp.sum(jnp.square(x)) / count for x in (centred, kernel_ExV))
        # Of one passage, or of equal ones, the mean leaves nothing, or what rounding left.
        return centred * jnp.where(variance > _SAME * square, jax.lax.rsqrt(variance), 0.0)

    rows_data = multihost.local_rows(mesh, size)
    made = jax.jit(jnp.zeros_like, out_shardings=kernel.sharding)(kernel)
    with bar("docids' columns", count) as advance:
        for first in range(0, count, size):
            docids = np.arange(first, first + size)[rows_data]
            inside = docids < count
            columns = np.full(len(docids), kernel.shape[1], np.int32)  # dropped
            columns[inside] = tokens_D[docids[inside]]
            passages = examples.collection.get(table.passages_of(rows_D[docids[inside]]).tolist())
            tokens = np.zeros((len(docids), length), np.int32)
            tokens[inside] = examples.vocabulary.batch([passage.full_text for passage in passages], length)
            block = multihost.make_global_batch(mesh, {"inputs": tokens, "columns": columns})
            # Simulated devices must not get ahead of one another, and the bar not of the work.
            made = jax.block_until_ready(fill(made, params, block["inputs"], block["columns"]))
            advance(min(size, count - first))
    is_docid = np.zeros(kernel.shape[1], bool)
    is_docid[tokens_D] = True
    made = centre(made, multihost.make_global_arrays(mesh, is_docid))
    decoder = params["decoder"] | {"logits_dense": {"kernel": made}}
    return params | {"decoder": decoder}
