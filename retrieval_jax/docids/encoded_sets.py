"""Sets of the tokens that a lexical encoder gives the highest weights.

The tokens and weights lie in embeddings/NAME.topM, in place of vectors: so they are computed part by part,
shared by hosts, and those of passages that were there before are not computed again.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.checkpoints.model_folder import LoadedModel, model_recipe
from retrieval_jax.core import npy, paths
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.table import blocks
from retrieval_jax.docids.term_weights import LARGEST
from retrieval_jax.docids.token_sets import IMPACTS, TOKENS, TokenSets, token_dtype
from retrieval_jax.embeddings.encoding import Embeddings, encode_collection
from retrieval_jax.embeddings.text_encoder import TextEncoder, passage_shapes
from retrieval_jax.models.softmax import exact_products


def encode_sets(
    model_dir: str | Path, opened: LoadedModel, mesh: Mesh, work: Workspace, collection: Collection, m: int
) -> Embeddings:
    """Computes the m best tokens of each passage. All processes must call this.

    Tokens are chosen by gain · weight, the most that they can add to a score; their impacts are the weights.

    Args:
      model_dir: the model's folder.
      opened: a lexical encoder, loaded on `mesh`.
      mesh: a mesh of this process's devices.
      work: tokens and weights are kept in its embeddings/.
      collection: the passages.
      m: the most tokens of a passage.

    Returns:
      P × 2m numbers: m tokens, 0 for none, and their weights.
    """
    model = opened.model

    def encode(params: dict, tokens_BxS: jax.Array) -> jax.Array:
        with exact_products():
            weights_BxV = model.encode_passages(params, tokens_BxS)
        most_Bxm, tokens_Bxm = jax.lax.top_k(weights_BxV * model.gain(params), min(m, weights_BxV.shape[1]))
        tokens_Bxm = jnp.where(most_Bxm > 0, tokens_Bxm, 0)
        tokens_Bxm = jnp.pad(tokens_Bxm, ((0, 0), (0, m - tokens_Bxm.shape[1])))
        kept_Bxm = jnp.take_along_axis(weights_BxV, tokens_Bxm, axis=1)
        return jnp.concatenate([tokens_Bxm.astype(jnp.float32), kept_Bxm], axis=1)  # exact below 2²⁴

    def make_encode() -> TextEncoder:
        shapes = passage_shapes(opened.description["passage_length"], mesh)
        vocabulary = opened.vocabulary.with_prompt(model.prompts.passage)
        return TextEncoder(encode, opened.params, vocabulary, shapes, mesh)

    recipe = model_recipe(model_dir, opened.step, opened.description) | {"tokens": m}
    folder = work.embeddings(f"{paths.absolute(model_dir).name}.top{m}")
    return encode_collection(folder, recipe, collection, make_encode)


def write_encoded_sets(folder: Path, encoded: Embeddings, opened: LoadedModel, with_impacts: bool) -> dict:
    """Writes the sets; returns what the folder's manifest shall say.

    Args:
      folder: the folder to write into.
      encoded: what `encode_sets` gave.
      opened: the model that gave them.
      with_impacts: whether tokens have their weights as impacts.
    """
    P, m = encoded.vectors_NxE.shape[0], encoded.vectors_NxE.shape[1] // 2
    dtype = token_dtype(opened.model.config.vocab_size)
    tokens_PxM = npy.zeros(folder / TOKENS, dtype, (P, m))
    impacts_PxM, scale = None, 1.0
    if with_impacts:
        impacts_PxM = npy.zeros(folder / IMPACTS, np.uint8, (P, m))
        scale = max(float(part[:, m:].max(initial=0)) for _, part in _parts(encoded)) / LARGEST or 1.0
    for rows, part in _parts(encoded):
        tokens_PxM[rows] = part[:, :m]
        if with_impacts:
            impacts_PxM[rows] = np.rint(part[:, m:] / scale)
    facts = encoded.ids, encoded.manifest["recipe"]["collection"], opened.vocabulary.checksum
    return TokenSets(tokens_PxM, impacts_PxM, scale, *facts).write(folder)


def _parts(encoded: Embeddings) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the rows of each part, and its numbers."""
    for rows in blocks(len(encoded.vectors_NxE)):
        yield rows, encoded.vectors_NxE[rows]
