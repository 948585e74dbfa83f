"""Converting weights of other programs into a model folder."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from retrieval_jax.checkpoints import model_folder, tokenizer
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.pretrained import Pretrained
from retrieval_jax.checkpoints.weights import LazyArray, write_safetensors
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.retriever import Retriever


@dataclasses.dataclass(frozen=True)
class ConvertedModel:
    """A model, and where its parameters and its vocabulary come from.

    Attributes:
      model: the model, without an optimiser.
      arrays: its parameters by name; nothing is read yet.
      vocabulary: the SentencePiece model's file.
      symbols: texts that stand for single tokens, as the weights' own tokenizer reads them.
      unused: names of the weights that the model lacks.
    """

    model: Retriever
    arrays: Mapping[str, LazyArray]
    vocabulary: Path
    symbols: Mapping[str, int]
    unused: list[str]

    def write(self, folder: Path, description: Mapping) -> dict:
        """Writes a model folder; see model_folder.py.

        Args:
          folder: an empty folder.
          description: see `model_folder.describe`.

        Returns:
          {"parameters": their number}.
        """
        write_safetensors(folder, model_folder.WEIGHTS, self.arrays)
        paths.copy(self.vocabulary, folder / model_folder.VOCABULARY)
        storage.write_json(folder / model_folder.DESCRIPTION, description)
        return {"parameters": sum(math.prod(array.shape) for array in self.arrays.values())}


def convert_weights(
    pretrained: Pretrained,
    retriever: type[Retriever],
    vocabulary: Path | None = None,
    sizes: Mapping[str, object] | None = None,
) -> ConvertedModel:
    """Makes a model of weights; none of its parameters may be missing.

    Args:
      pretrained: the weights.
      retriever: the model's class.
      vocabulary: the SentencePiece model's file; None for the one that lies with the weights.
      sizes: T5Config's arguments that the weights do not say: those of the docids that they write.

    Returns:
      The model.

    Raises:
      UserError: the weights are not those of such a model, or the vocabulary is not theirs.
    """
    pieces = vocabulary or pretrained.vocabulary
    _check_vocabulary(pretrained, pieces)
    symbols = {} if vocabulary else dict(pretrained.symbols)
    if vocabulary is None and pretrained.format in ("Hugging Face", "sentence-transformers"):
        symbols = tokenizer.symbols(pieces)
    is_dual_encoder = issubclass(retriever, DualEncoder)
    # The outputs are what the caller says they are.
    pretrained = dataclasses.replace(pretrained, network=pretrained.network | dict(sizes or {}))
    settings = pretrained.settings if is_dual_encoder else {}
    model = retriever(T5Config(**pretrained.network), None, **settings)
    unused = ("decoder",) if is_dual_encoder else ()
    match = InitialCheckpoint(missing_ok=(), unexpected_ok=unused, resize_vocab=()).match(pretrained, model)
    if mismatch := match.mismatch(pretrained.path, trains=False):
        raise UserError(mismatch)
    return ConvertedModel(model, match.arrays, pieces, symbols, match.unused)


def _check_vocabulary(pretrained: Pretrained, pieces: Path | None) -> None:
    """Raises UserError where there is no vocabulary, or one that is not of the embedding's rows."""
    if pieces is None:
        raise UserError(f"{pretrained.path}: no vocabulary lies with it: --VOCABULARY=…/sentencepiece.model")
    if mismatch := tokenizer.difference(pretrained.path, pretrained.vocabulary, pieces):
        raise UserError(f"VOCABULARY: {pieces} {mismatch}: leave it out, to take the weights' own")
    count, rows = Vocabulary(pieces).model.vocab_size(), pretrained.network["vocab_size"]
    if count > rows:
        raise UserError(
            f"{pieces}: has {count} pieces, and the weights' embedding {rows} rows: name their own VOCABULARY"
        )
