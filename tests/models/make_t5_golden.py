"""Makes t5_golden.npz: a small random T5 1.1 of Hugging Face, and what it gives for a few padded inputs.

    python tests/models/make_t5_golden.py

Made with Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0 and numpy 2.4.6. The file holds the
weights under T5X's names (`params/<name>`, float16: the weights are drawn so that this is exact), `inputs`,
`decoder_inputs`, and the float32 `encoded` and `logits` at `positions` of the encoder and of the decoder.
"""

import re
from pathlib import Path

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 64,
    "d_model": 32,
    "num_heads": 4,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
}
LENGTHS, DECODER_LENGTH = (140, 137, 5), 140  # beyond 128, where the relative positions are clamped
POSITIONS = (0, 1, 2, 4, 9, 17, 40, 70, 100, 127, 128, 129, 136, 139)

# Applied in this order; dots become slashes last.
RENAMES = (
    (r"^shared\.weight$", "token_embedder.embedding"),
    (r"^lm_head\.weight$", "decoder.logits_dense.kernel"),
    (r"^(encoder|decoder)\.final_layer_norm\.weight$", r"\1.\1_norm.scale"),
    (
        r"^(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight$",
        r"\1.relpos_bias.rel_embedding",
    ),
    (r"\.block\.(\d+)\.", r".layers_\1."),
    (r"^(encoder\.layers_\d+)\.layer\.0\.layer_norm\.weight$", r"\1.pre_attention_layer_norm.scale"),
    (r"^(encoder\.layers_\d+)\.layer\.1\.layer_norm\.weight$", r"\1.pre_mlp_layer_norm.scale"),
    (r"^(decoder\.layers_\d+)\.layer\.0\.layer_norm\.weight$", r"\1.pre_self_attention_layer_norm.scale"),
    (r"^(decoder\.layers_\d+)\.layer\.1\.layer_norm\.weight$", r"\1.pre_cross_attention_layer_norm.scale"),
    (r"^(decoder\.layers_\d+)\.layer\.2\.layer_norm\.weight$", r"\1.pre_mlp_layer_norm.scale"),
    (r"^(encoder\.layers_\d+)\.layer\.0\.SelfAttention\.", r"\1.attention."),
    (r"^(decoder\.layers_\d+)\.layer\.0\.SelfAttention\.", r"\1.self_attention."),
    (r"\.layer\.1\.EncDecAttention\.", ".encoder_decoder_attention."),
    (r"\.layer\.[12]\.DenseReluDense\.", ".mlp."),
    (r"\.q\.weight$", ".query.kernel"),
    (r"\.k\.weight$", ".key.kernel"),
    (r"\.v\.weight$", ".value.kernel"),
    (r"\.o\.weight$", ".out.kernel"),
    (r"\.weight$", ".kernel"),
    (r"\.", "/"),
)


def t5x_name(name: str) -> str:
    """T5X's name, with slashes, of a parameter of Hugging Face's T5ForConditionalGeneration."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def t5x_params(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's weights under T5X's names; all but the embedding are transposed."""
    weights = {t5x_name(name): p.detach().numpy() for name, p in model.named_parameters()}
    return {name: w if name == "token_embedder/embedding" else w.T for name, w in weights.items()}


def random_weight(name: str, shape: tuple[int, ...], d_kv: int, rng: np.random.Generator) -> np.ndarray:
    """A float32 weight that float16 holds exactly, of a size at which every part of the network matters."""
    if name.endswith("layer_norm.weight"):
        weight = rng.uniform(0.5, 1.5, shape)
    else:
        weight = rng.standard_normal(shape)
        if name == "shared.weight":
            weight *= 0.03  # so small that the norms' epsilon shows
        elif "relative_attention_bias" not in name:
            weight /= shape[1] ** 0.5
        if name.endswith(".q.weight"):
            weight /= d_kv**0.5
    return weight.astype(np.float16).astype(np.float32)


def random_model(seed: int, **sizes: int) -> transformers.T5ForConditionalGeneration:
    """Hugging Face's T5 1.1 of these sizes (T5Config's names) with random weights."""
    config = transformers.T5Config(
        **sizes,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    # transformers 5 ties the output matrix to the embedding in spite of tie_word_embeddings=False.
    model.lm_head.weight = torch.nn.Parameter(torch.empty(model.lm_head.weight.shape))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.from_numpy(random_weight(name, tuple(p.shape), config.d_kv, rng)))
    return model


def random_tokens(
    seed: int, vocab_size: int, lengths: tuple[int, ...], decoder_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of these lengths padded with 0 to the longest, and decoder inputs, which start with 0."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(1, vocab_size, (len(lengths), max(lengths)))
    inputs[np.arange(max(lengths)) >= np.array(lengths)[:, None]] = 0
    decoder_inputs = rng.integers(1, vocab_size, (len(lengths), decoder_length))
    decoder_inputs[:, 0] = 0
    return inputs, decoder_inputs


def run(
    model: transformers.T5ForConditionalGeneration, inputs: np.ndarray, decoder_inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's output and the logits."""
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(inputs),
            attention_mask=torch.from_numpy((inputs > 0).astype(np.int64)),
            decoder_input_ids=torch.from_numpy(decoder_inputs),
        )
    return output.encoder_last_hidden_state.numpy(), output.logits.numpy()


def main() -> None:
    model = random_model(seed=0, **SIZES)
    inputs, decoder_inputs = random_tokens(1, SIZES["vocab_size"], LENGTHS, DECODER_LENGTH)
    encoded, logits = run(model, inputs, decoder_inputs)
    np.savez_compressed(
        Path(__file__).with_name("t5_golden.npz"),
        inputs=inputs.astype(np.uint8),
        decoder_inputs=decoder_inputs.astype(np.uint8),
        positions=np.array(POSITIONS),
        encoded=encoded[:, POSITIONS],
        logits=logits[:, POSITIONS],
        **{f"params/{name}": weight.astype(np.float16) for name, weight in t5x_params(model).items()},
    )


if __name__ == "__main__":
    main()
