"""Hugging Face's T5 folders, read and written without transformers: config.json and safetensors weights.

T5 1.0, T5 1.1 and Flan-T5 are read alike, whole or the encoder alone; where there are no safetensors, the
weights of transformers' Flax models are read. PyTorch keeps matrices as outputs × inputs, T5X (and this
project) as inputs × outputs.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from retrieval_jax.checkpoints.weights import LazyArray, placed, read_safetensors, write_safetensors
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError, first_line
from retrieval_jax.models.layers import T5Config

CONFIG, WEIGHTS, PIECES = "config.json", "model", "spiece.model"
FLAX = "flax_model.msgpack"  # the only weights beside pickles in some repositories, such as google/t5-v1_1-*
# Their names of an MLP's activation -> ours. Their "gelu" is another function than the T5s' "gelu_new".
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "linear": "linear"}
GATED_GELU = "gated-gelu"  # which means "gated-gelu_new"
# Fields that change what a T5 computes -> what they must be, where a file has them, to be this network's.
FIXED = {
    "model_type": ("t5", "mt5"),
    "layer_norm_epsilon": (1e-6,),
    "is_decoder": (False,),
    "pad_token_id": (0,),
    "eos_token_id": (1, [1]),
    "scalable_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),  # code of its own
}
FIXED_WITH_DECODER = {"decoder_start_token_id": (0, None)}
# What a file may hold beside: the embedding again, by another name.
SHARED, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def is_model(folder: Path) -> bool:
    """Whether a folder looks like a T5 of Hugging Face."""
    if not (folder / CONFIG).is_file():
        return False
    return "t5" in str(storage.read_json(folder / CONFIG, "fetch it again").get("model_type", "")).lower()


def read(folder: Path) -> tuple[dict[str, LazyArray], dict]:
    """Opens the weights of a folder.

    Returns:
      ({T5X's name of a parameter: lazy array}, the arguments of T5Config). Arrays that no T5 has keep their
      names, so that the caller can report them.

    Raises:
      UserError: a file cannot be read, or T5Config cannot describe this T5.
    """
    path = folder / CONFIG
    config = storage.read_json(path, "fetch it again")
    has_safetensors = bool(list(folder.glob(f"{WEIGHTS}*.safetensors*")))
    if not has_safetensors and not (folder / FLAX).is_file():
        raise UserError(
            f"{folder}: no safetensors here, and pickled weights are not read: open it with transformers and "
            "save_pretrained"
        )
    check_fields(path, config, FIXED)
    arrays = read_safetensors(folder, WEIGHTS) if has_safetensors else _read_flax(folder / FLAX)
    embedding = next((name for name in (SHARED, *COPIES) if name in arrays), None)
    if embedding is None:
        raise UserError(f"{folder}: has no token embedding ({SHARED}): it is no T5")
    for name in {SHARED, *COPIES} & arrays.keys() - {embedding}:
        del arrays[name]
    arrays[SHARED] = arrays.pop(embedding)
    try:
        network = _network(path, config, arrays[SHARED].shape[0])
    except KeyError as error:
        raise UserError(f"{path}: has no {error}: fetch it again") from None
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    decodes = any(name.startswith("decoder.") for name in arrays)
    check_fields(path, config, FIXED_WITH_DECODER if decodes else {})
    if not decodes:
        network["num_decoder_layers"] = 0
    elif scaled:
        network["logits_via_embedding"] = True
        head = arrays.pop(HEAD, None)
        if head and not np.array_equal(
            *(x.read_slice((slice(0, 8), slice(None))) for x in (head, arrays[SHARED]))
        ):
            raise UserError(f"{path}: scales its outputs and has a matrix for them ({HEAD}): not supported")
    elif HEAD not in arrays:
        arrays[HEAD] = arrays[SHARED]
    ours = {}
    for name, theirs, turned in pairs(network):
        if theirs in arrays:
            array = arrays.pop(theirs)
            ours[name] = array.transposed() if turned else array
    return ours | arrays, network


def _read_flax(path: Path) -> dict[str, LazyArray]:
    """Reads the weights of transformers' Flax models under their PyTorch names and in PyTorch's layout.

    The whole file is read into memory. Raises UserError where it cannot be read.
    """
    try:
        tree = flatten_dict(msgpack_restore(path.read_bytes()), sep=".")
        found = {name: LazyArray.from_numpy(np.asarray(x)) for name, x in tree.items()}
    except Exception as error:  # msgpack's and Flax's have no common class
        raise UserError(f"{path}: cannot be read ({first_line(error)}): fetch it again") from None
    arrays = {}
    for name, array in found.items():
        module, _, kind = name.rpartition(".")
        arrays[f"{module}.weight"] = array.transposed() if kind == "kernel" else array
    return arrays


def check_fields(path: Path, config: Mapping, known: Mapping[str, tuple]) -> None:
    """Checks that the fields of a configuration have values that this project's network computes.

    Args:
      path: the file, for the error.
      config: its content.
      known: field -> the values that are supported. A field that the file lacks is not checked.

    Raises:
      UserError: a field has another value.
    """
    for name, values in known.items():
        if name in config and config[name] not in values:
            only = " or ".join(map(str, dict.fromkeys(json.dumps(value) for value in values)))
            raise UserError(f"{path}: {name} {config[name]!r} is not supported: only {only} is")


def _activations(path: Path, config: dict) -> tuple[str, ...]:
    """Returns T5Config's mlp_activations. Raises UserError for another MLP, or fields that contradict."""
    kind = str(config.get("feed_forward_proj", "relu"))
    gate, _, act = kind.rpartition("-")
    act = "gelu_new" if kind == GATED_GELU else act
    if gate not in ("", "gated") or act not in ACTIVATIONS:
        known = f"{', '.join(ACTIVATIONS)}, plain or gated-, or {GATED_GELU}"
        raise UserError(f"{path}: feed_forward_proj {kind!r} is not supported: only {known} is")
    gated, ours = gate == "gated", ACTIVATIONS[act]
    same = tuple(theirs for theirs, name in ACTIVATIONS.items() if name == ours)
    check_fields(path, config, {"dense_act_fn": same, "is_gated_act": (gated,)})
    return (ours, "linear") if gated else (ours,)


def feed_forward_proj(activations: tuple[str, ...]) -> str:
    """Returns Hugging Face's name of T5Config's mlp_activations. Raises UserError where it has none."""
    if activations == ("gelu", "linear"):
        return GATED_GELU
    act = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == activations[0]), None)
    if act is None or activations[1:] not in ((), ("linear",)):
        raise UserError(f"T5Config.mlp_activations: {activations}: transformers' T5 has no such MLP")
    return f"gated-{act}" if activations[1:] else act


def _network(path: Path, config: dict, rows: int) -> dict:
    layers = config["num_layers"]
    decoder_layers = config.get("num_decoder_layers")
    return {
        "vocab_size": rows,
        "emb_dim": config["d_model"],
        "num_heads": config["num_heads"],
        "head_dim": config["d_kv"],
        "mlp_dim": config["d_ff"],
        "num_encoder_layers": layers,
        "num_decoder_layers": layers if decoder_layers is None else decoder_layers,
        "mlp_activations": _activations(path, config),
        "logits_via_embedding": False,
        "relpos_buckets": config.get("relative_attention_num_buckets", 32),
        "relpos_max_distance": config.get("relative_attention_max_distance", 128),
    }


def pairs(network: Mapping) -> Iterator[tuple[str, str, bool]]:
    """Pairs the names of a T5's parameters.

    Args:
      network: the arguments of T5Config.

    Yields:
      (T5X's name, Hugging Face's name, whether one is the other's transpose).
    """
    yield "token_embedder/embedding", SHARED, False
    gated = len(network["mlp_activations"]) > 1
    for stack in ("encoder", "decoder") if network["num_decoder_layers"] else ("encoder",):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"{stack}/relpos_bias/rel_embedding", first, True
        yield f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight", False
        parts = ENCODER if stack == "encoder" else DECODER
        for i in range(network[f"num_{stack}_layers"]):
            for number, (norm, ours, theirs, matrices) in enumerate(parts):
                layer = f"{stack}.block.{i}.layer.{number}"
                yield f"{stack}/layers_{i}/{norm}/scale", f"{layer}.layer_norm.weight", False
                for name, other in matrices.items() if ours != "mlp" else _mlp(gated):
                    yield f"{stack}/layers_{i}/{ours}/{name}/kernel", f"{layer}.{theirs}.{other}.weight", True
    if network["num_decoder_layers"] and not network["logits_via_embedding"]:
        yield "decoder/logits_dense/kernel", HEAD, True


_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_SELF, _MLP = "SelfAttention", ("pre_mlp_layer_norm", "mlp", "DenseReluDense", {})
ENCODER = (("pre_attention_layer_norm", "attention", _SELF, _ATTENTION), _MLP)
DECODER = (
    ("pre_self_attention_layer_norm", "self_attention", _SELF, _ATTENTION),
    ("pre_cross_attention_layer_norm", "encoder_decoder_attention", "EncDecAttention", _ATTENTION),
    _MLP,
)


def _mlp(gated: bool) -> list[tuple[str, str]]:
    return [(name, name) for name in (("wi_0", "wi_1", "wo") if gated else ("wi", "wo"))]


def write(
    folder: Path, arrays: Mapping[str, LazyArray], config: T5Config, decoder: bool = True, start: int = 0
) -> None:
    """Writes a folder that `from_pretrained` of T5ForConditionalGeneration or T5EncoderModel opens.

    Args:
      folder: an empty folder.
      arrays: the parameters by T5X's names, an array a layer.
      config: the network.
      decoder: whether the decoder is written, too.
      start: the decoder's first token.
    """
    network = {**vars(config), "num_decoder_layers": config.num_decoder_layers if decoder else 0}
    named = {
        theirs: arrays[name].transposed() if turned else arrays[name]
        for name, theirs, turned in pairs(network)
    }
    write_safetensors(folder, WEIGHTS, named)
    described = {
        "architectures": ["T5ForConditionalGeneration" if decoder else "T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": decoder,
        "vocab_size": arrays["token_embedder/embedding"].shape[0],
        "d_model": config.emb_dim,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers if decoder else config.num_encoder_layers,
        "feed_forward_proj": feed_forward_proj(config.mlp_activations),
        "tie_word_embeddings": config.tied or not decoder,
        "scale_decoder_outputs": config.tied,
        "relative_attention_num_buckets": config.relpos_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": start,
        "dtype": "float32",
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=1))


def with_docids(arrays: Mapping[str, LazyArray], config: T5Config) -> dict[str, LazyArray]:
    """Rewrites the parameters of a T5 with a docid vocabulary as those of a T5 with one longer vocabulary.

    Token t of a docid, also the 0 at its start, becomes token vocab_size + t: the embedding has the rows of
    the text vocabulary, then those of the docids, and so have the logits. The logits of text tokens are 0 and
    mean nothing.
    """
    rest = dict(arrays)
    kernel_ExV, texts_VxE = rest["decoder/logits_dense/kernel"], rest["token_embedder/embedding"]
    V = texts_VxE.shape[0]
    rows = V + kernel_ExV.shape[1]
    docids_VxE = texts_VxE.resized(0, 1)  # atomic docids are one token, and nothing is read after it
    if config.separate_target_embedding:
        docids_VxE = rest.pop("decoder_token_embedder/embedding")
    return rest | {
        "token_embedder/embedding": placed({0: texts_VxE, V: docids_VxE}, rows),
        "decoder/logits_dense/kernel": placed({V: kernel_ExV.transposed()}, rows).transposed(),
    }
