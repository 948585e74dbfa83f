"""Dual encoders in the format of sentence-transformers, read and written without that library.

A model is a folder of modules, each in a folder of its own: a T5's encoder, the mean over the tokens, a
matrix without bias and, where dot products are cosines, a division by the vector's length. GTR and
Sentence-T5 are such models. The folders of all versions from 3 to 6 are read; version 6 names the modules'
classes otherwise and writes more fields.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retrieval_jax.checkpoints import hugging_face
from retrieval_jax.checkpoints.weights import LazyArray, read_safetensors, write_safetensors
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.data.vocabulary import Prompts
from retrieval_jax.models.layers import T5Config

MODULES, LENGTH = "modules.json", "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
PROJECTION, DENSE = "projection_layer/kernel", "linear.weight"
_SIDES = {"query": "query_prompt", "document": "passage_prompt"}  # a prompt's name -> DualEncoder's setting
# What modules may follow the encoder and the mean, in this order.
_ENDS = ([], ["Dense"], ["Normalize"], ["Dense", "Normalize"])
_LIBRARY = "sentence_transformers."  # a class of that name elsewhere is code of its own
_OF_VECTORS = {
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding", None),
}
# Fields that change the vectors -> what they must be, where a file has them; see hugging_face.check_fields.
_FIXED = {
    PROMPTS: {
        "model_type": ("SentenceTransformer",),
        "similarity_fn_name": ("dot", "cosine", None),
    },
    LENGTH: {
        "do_lower_case": (False, None),
        "transformer_task": ("feature-extraction",),
        "module_output_name": ("token_embeddings",),
        "processing_kwargs": ({}, None),
        "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}}, None),
    },
    "Dense": _OF_VECTORS,
    "Normalize": _OF_VECTORS,
}
_SUPPORTED = "only a T5 encoder, the mean over tokens, a matrix and normalisation are supported"


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model of sentence-transformers."""
    return (folder / MODULES).is_file()


def read(folder: Path) -> tuple[dict[str, LazyArray], dict, dict, Path]:
    """Opens a dual encoder.

    Returns:
      (parameters by T5X's names, the arguments of T5Config, facts, the encoder's folder). Facts are
      vector_dim, normalize and, where the folder has them, length (in tokens), query_prompt and
      passage_prompt.

    Raises:
      UserError: it is another kind of encoder, or a file cannot be read.
    """
    path = folder / MODULES
    listed = storage.read_json(path, "fetch it again", list)
    kinds = [_kind(path, module) for module in listed]
    folders = [paths.join_inside(folder, module["path"], path) for module in listed]
    modules = list(zip(kinds, folders, strict=True))
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in _ENDS:
        raise UserError(f"{path}: modules {', '.join(kinds)}: {_SUPPORTED}")
    settings = _check(folder / PROMPTS, PROMPTS)
    pooling = storage.read_json(modules[1][1] / "config.json", "fetch it again")
    if not pools_by_mean(pooling):
        modes = {key: value for key, value in pooling.items() if key.startswith("pooling_mode") and value}
        found = ", ".join(f"{key} {value!r}" for key, value in modes.items()) or "no pooling_mode"
        raise UserError(f"{modules[1][1]}: pools otherwise than by the mean ({found}): {_SUPPORTED}")
    prompts = _prompts(folder)
    if prompts and pooling.get("include_prompt") is False:
        raise UserError(f"{modules[1][1]}: include_prompt: leaves the prompt out of the mean: {_SUPPORTED}")
    encoder = modules[0][1]
    _check(encoder / LENGTH, LENGTH)
    arrays, network = hugging_face.read(encoder)
    arrays = {name: array for name, array in arrays.items() if not name.startswith(("decoder", "lm_head"))}
    network["num_decoder_layers"] = 0
    for kind, where in modules:
        if kind == "Normalize":
            _check(where / "config.json", kind)
    dense = [where for kind, where in modules if kind == "Dense"]
    for where in dense:
        config = _check(where / "config.json", "Dense")
        bias, activation = config.get("bias", True), config.get("activation_function", "Tanh")  # its defaults
        if bias or not (activation or "Identity").endswith("Identity"):
            found = f"bias {bias!r}, activation_function {activation!r}"
            raise UserError(f"{where}: has a bias or an activation ({found}): {_SUPPORTED}")
        if not list(where.glob("model*.safetensors*")):
            raise UserError(
                f"{where}: no safetensors here, and pickled weights are not read: open the model with "
                "sentence-transformers and save it"
            )
        arrays[PROJECTION] = read_safetensors(where, "model")[DENSE].transposed()
    if not dense:
        arrays[PROJECTION] = LazyArray.from_numpy(np.eye(network["emb_dim"], dtype=np.float32))
    # Their search by cosines, which is their default, divides by the length, where no module does.
    cosine = settings.get("similarity_fn_name") in (None, "cosine")
    normalize = "Normalize" in kinds or cosine
    arrays[PROJECTION] = _truncated(folder / PROMPTS, settings, arrays[PROJECTION], "Normalize" in kinds)
    facts = {"vector_dim": arrays[PROJECTION].shape[1], "normalize": normalize} | prompts
    for name, key in ((LENGTH, "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if (encoder / name).is_file() and "length" not in facts:
            length = storage.read_json(encoder / name, "fetch it again").get(key)
            facts |= (
                {"length": int(length)} if length and length < 1e6 else {}
            )  # transformers says 1e30 for none
    return arrays, network, facts, encoder


def _truncated(path: Path, settings: Mapping, kernel_ExV: LazyArray, normalizes: bool) -> LazyArray:
    """Returns the matrix that gives the first `truncate_dim` dimensions of the vectors, which `encode` gives.

    Args:
      path: the file of the settings, for messages.
      settings: those of the model.
      kernel_ExV: the matrix that gives all dimensions.
      normalizes: whether a module divides them all by the vector's length before they are cut. Then cosines
        of what is left are those of this matrix, and dot products are not.

    Raises:
      UserError: it is no number of dimensions, or what it leaves cannot be computed here.
    """
    dimensions, similarity = settings.get("truncate_dim"), settings.get("similarity_fn_name")
    if dimensions is None:
        return kernel_ExV
    if type(dimensions) is not int or dimensions < 1:
        raise UserError(f"{path}: truncate_dim {dimensions!r} is not supported: only a number above 0 is")
    if dimensions >= kernel_ExV.shape[1]:
        return kernel_ExV
    if normalizes and similarity == "dot":
        raise UserError(
            f"{path}: truncate_dim {dimensions} with similarity_fn_name 'dot' is not supported: it compares "
            "parts of normalised vectors by their lengths, too: set 'cosine', or remove truncate_dim"
        )
    log(f"{path}: truncate_dim: the first {dimensions} of {kernel_ExV.shape[1]} dimensions are read")
    return kernel_ExV.resized(1, dimensions)


def _kind(path: Path, module: Mapping) -> str:
    """Returns the class of a module, with its package where that is not the library's.

    Raises UserError for a module that takes arguments of `encode`.
    """
    kind = str(module["type"])
    if module.get("kwargs"):
        raise UserError(f"{path}: kwargs {module['kwargs']!r} of {kind} are not supported: {_SUPPORTED}")
    return kind.rpartition(".")[2] if kind.startswith(_LIBRARY) else kind


def _check(path: Path, kind: str) -> dict:
    """Reads a file ({} where there is none). Raises UserError for fields that are not supported here."""
    config = storage.read_json(path, "fetch it again") if path.is_file() else {}
    hugging_face.check_fields(path, config, _FIXED[kind])
    return config


def pools_by_mean(pooling: Mapping) -> bool:
    """Whether a Pooling module takes the mean over the tokens, and nothing else."""
    older = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    if "pooling_mode" in pooling:
        return pooling["pooling_mode"] in ("mean", ["mean"]) and older in ([], ["pooling_mode_mean_tokens"])
    said = "pooling_mode_mean_tokens" in pooling  # it is the default
    return older == ["pooling_mode_mean_tokens"] or (not older and not said)


def _prompts(folder: Path) -> dict[str, str]:
    """Reads the prompts that `encode_query` and `encode_document` put before a text.

    These look up the names "query" and "document", which every SentenceTransformer has, even if they are
    empty. So `encode_document` never comes to "passage" and "corpus", the names that it would try next, and
    neither function comes to the default prompt.

    Returns:
      {"query_prompt": …, "passage_prompt": …}, where they are not empty.
    """
    path = folder / PROMPTS
    if not path.is_file():
        return {}
    config = storage.read_json(path, "fetch it again")
    prompts = {name: text for name, text in (config.get("prompts") or {}).items() if text}
    if bad := [name for name, text in prompts.items() if not isinstance(text, str)]:
        raise UserError(f"{path}: the prompt {bad[0]!r} is no text: fetch it again")
    default = config.get("default_prompt_name")
    unread = [name for name in prompts if name in ("passage", "corpus", default) and name not in _SIDES]
    if unread:
        log(f"{path}: prompts {', '.join(unread)} are not used, as encode_query and encode_document do not")
    return {_SIDES[name]: text for name, text in prompts.items() if name in _SIDES}


def write(
    folder: Path,
    arrays: Mapping[str, LazyArray],
    config: T5Config,
    normalize: bool,
    length: int,
    prompts: Prompts,
) -> None:
    """Writes a folder that SentenceTransformer opens, without the tokenizer; see `tokenizer.write`.

    Args:
      folder: an empty folder.
      arrays: the parameters of one tower by T5X's names, an array a layer.
      config: the tower's network.
      normalize: whether vectors are divided by their length.
      length: the maximal number of tokens of a text.
      prompts: what `encode_query` and `encode_document` put before a text.
    """
    hugging_face.write(folder, arrays, config, decoder=False)
    kernel_ExV = arrays[PROJECTION]
    width, dimensions = kernel_ExV.shape
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    if normalize:
        modules["3_Normalize"] = "Normalize"
    for name in modules:
        (folder / name).mkdir(exist_ok=True)
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules.items())
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    dense = {"in_features": width, "out_features": dimensions, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    for path, value in {
        MODULES: listed,
        PROMPTS: {
            "model_type": "SentenceTransformer",
            "prompts": dict(zip(_SIDES, prompts, strict=True)),
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
        LENGTH: {"max_seq_length": length, "do_lower_case": False},
        "1_Pooling/config.json": pooling,
        "2_Dense/config.json": dense,
    }.items():
        (folder / path).write_text(json.dumps(value, indent=1))
    write_safetensors(folder / "2_Dense", "model", {DENSE: kernel_ExV.transposed()})
