"""The base of searchers that encode queries: as dense vectors, or as weights of tokens."""

from collections.abc import Sequence
from pathlib import Path

from retrieval_jax.checkpoints.model_folder import LoadedModel, load_model
from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.embeddings.text_encoder import TextEncoder
from retrieval_jax.search.searcher import Searcher


class EncodingSearcher(Searcher):
    """Encodes queries by a model, and compares the vectors with what it knows of the passages.

    Args:
      encoder: the encoder of queries.
    """

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder

    def truncates(self, query: str) -> bool:
        """See `Searcher.truncates`."""
        return self.encoder.vocabulary.exceeds(query, self.encoder.length)

    def compile_for(self, queries: Sequence[str]) -> None:
        """See `Searcher.compile_for`: the encoder's shapes."""
        if queries:
            self.encoder.compile_for(queries)

    def use_batch_sizes(self, sizes: Sequence[int]) -> None:
        """See `Searcher.use_batch_sizes`: of the encoder."""
        self.encoder.use_batch_sizes(sizes)


def load_own_model(folder: Path, manifest: dict) -> LoadedModel:
    """Loads a searcher's model on one device.

    Args:
      folder: the searcher's folder.
      manifest: its manifest, which has the model's relative path and step.

    Raises:
      UserError: the model is not there, as where the searcher was moved without it.
    """
    model = paths.join(folder, manifest["model"])
    if not model.is_dir():
        raise UserError(
            f"{folder}: its model is not at {paths.absolute(model)}: move both together, or "
            "`retrieval-jax index`"
        )
    return load_model(model, manifest["step"])
