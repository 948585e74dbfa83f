"""Weights of every format that is read here: lazy arrays under T5X's names, one a layer."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

from retrieval_jax.checkpoints import hugging_face, model_folder, sentence_transformers, t5x_checkpoints
from retrieval_jax.checkpoints.sentence_transformers import PROJECTION
from retrieval_jax.checkpoints.weights import LazyArray
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.models.dual_encoder_network import split_tower
from retrieval_jax.models.layers import STACK_AXIS

FORMATS = (
    "a model folder of this project, a checkpoint of T5X's, a T5 of Hugging Face's or sentence-transformers"
)
T5X = "T5X"
OUTPUT = "decoder/logits_dense/kernel"
_LAYERS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights, and what is known about their model.

    Attributes:
      path: where they lie.
      format: the program whose format it is.
      arrays: {"encoder/layers_0/mlp/wi_0/kernel": …}; names that no T5 has are kept as they are.
      network: the arguments of T5Config.
      settings: the settings of a dual encoder: vector_dim, normalize and so on.
      length: the maximal number of tokens of a text, where it is known.
      vocabulary: the SentencePiece model, where one lies with the weights.
      symbols: the symbols that it finds in texts; see Vocabulary.
      step: the number of training steps, where it is known.
      passage_length: the maximal number of tokens of a passage, where it has one of its own.
    """

    path: Path
    format: str
    arrays: dict[str, LazyArray]
    network: dict
    settings: dict = dataclasses.field(default_factory=dict)
    length: int | None = None
    vocabulary: Path | None = None
    symbols: Mapping[str, int] = dataclasses.field(default_factory=dict)
    step: int = 0
    passage_length: int | None = None


def open_pretrained(path: str | Path, setting: str = "INITIAL_CHECKPOINT") -> Pretrained:
    """Opens weights. Only names and shapes are read.

    Args:
      path: a file or folder in one of FORMATS, also gs://….
      setting: what names the path, for messages.

    Raises:
      UserError: there are no weights that can be read.
    """
    path = paths.as_path(path)
    paths.check_bucket(path)
    if not path.exists():
        raise UserError(f"{setting}: {path}: there is no such file or folder")
    if (path / model_folder.DESCRIPTION).is_file():
        return _own(path)
    if sentence_transformers.is_model(path):
        arrays, network, facts, encoder = sentence_transformers.read(path)
        length = facts.pop("length", None)
        return Pretrained(
            path, "sentence-transformers", arrays, network, facts, length, _pieces(path, encoder)
        )
    if hugging_face.is_model(path):
        arrays, network = hugging_face.read(path)
        return Pretrained(path, "Hugging Face", arrays, network, vocabulary=_pieces(path))
    if path.is_dir() and not t5x_checkpoints.is_checkpoint(path):
        path = t5x_checkpoints.newest(path) or path
    if t5x_checkpoints.is_checkpoint(path):
        arrays = t5x_checkpoints.read(path)
        step = path.name.rpartition("_")[2]
        bare = {split_tower(name)[1]: array for name, array in arrays.items()}
        settings = {"vector_dim": bare[PROJECTION].shape[1]} if PROJECTION in bare else {}
        settings |= {"shared_towers": False} if bare.keys() != arrays.keys() else {}
        return Pretrained(
            path,
            T5X,
            arrays,
            network_of(path, bare),
            settings,
            step=int(step) if step.isdigit() else 0,
        )
    raise UserError(f"{setting}: {path}: none of {FORMATS}: check the path")


def fingerprint(pretrained: Pretrained) -> str:
    """Computes a fingerprint of the weights' content, for recipes: other weights may come to lie there."""
    path = pretrained.path
    if (path / model_folder.DESCRIPTION).is_file():
        description = model_folder.read_description(path)
        return str(model_folder.model_checksum(path, pretrained.step, description))
    sums = storage.file_checksums(path) if path.is_dir() else {path.name: storage.checksum(path)}
    return storage.digest(itertools.chain(*sorted(sums.items())))


def _pieces(*folders: Path) -> Path | None:
    files = (folder / hugging_face.PIECES for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _own(folder: Path) -> Pretrained:
    description, step, arrays = model_folder.lazy_params(folder)
    return Pretrained(
        folder,
        "retrieval_jax",
        t5x_checkpoints.unscanned(arrays, STACK_AXIS),
        description["network"],
        description["settings"],
        description.get("input_length"),
        folder / model_folder.VOCABULARY,
        description.get("symbols", {}),
        step,
        description.get("passage_length"),
    )


def network_of(path: Path, arrays: Mapping[str, LazyArray]) -> dict:
    """Infers the arguments of T5Config from the arrays' shapes. Raises UserError where they are no T5's."""
    try:
        heads, buckets = arrays["encoder/relpos_bias/rel_embedding"].shape
        query = arrays["encoder/layers_0/attention/query/kernel"].shape
        mlp = arrays["encoder/layers_0/mlp/wo/kernel"].shape
        rows, width = arrays["token_embedder/embedding"].shape
    except KeyError as error:
        raise UserError(f"{path}: has no {error}: it is no T5 of T5X's names") from None
    layers = {
        stack: {name.split("/")[1] for name in arrays if name.startswith(f"{stack}/layers_")}
        for stack in _LAYERS
    }
    outputs = arrays[OUTPUT].shape[1] if OUTPUT in arrays else None
    separate_target_embedding = "decoder_token_embedder/embedding" in arrays
    gated = "encoder/layers_0/mlp/wi_0/kernel" in arrays
    return {
        "vocab_size": rows,
        "emb_dim": width,
        "num_heads": heads,
        "head_dim": query[1] // heads,
        "mlp_dim": mlp[0],
        "num_encoder_layers": len(layers["encoder"]),
        "num_decoder_layers": len(layers["decoder"]),
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": bool(layers["decoder"]) and outputs is None,
        "output_size": outputs if outputs != rows or separate_target_embedding else None,
        "separate_target_embedding": separate_target_embedding,
        "relpos_buckets": buckets,
    }
