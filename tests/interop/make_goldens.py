"""Makes goldens/: tiny random T5s as transformers and sentence-transformers save them, and what they give.

    python tests/interop/make_goldens.py

Made with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0, sentence-transformers 5.7.0 and numpy 2.4.6.
t5_1_1/ and t5_1_0/ are T5ForConditionalGeneration's folders, gtr/ is SentenceTransformer's; each has
expected.npz: inputs, decoder_inputs and float32 logits, or texts and vectors. Weights are drawn so that
float16 holds them exactly; t5_1_1's lie in several files.
"""

import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
from sentence_transformers import SentenceTransformer, models

GOLDENS = Path(__file__).with_name("goldens")
SIZES = {"vocab_size": 50, "d_model": 16, "num_heads": 2, "d_kv": 6, "d_ff": 20, "num_layers": 2}
KINDS = {
    "t5_1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    "t5_1_0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
}
INPUTS = np.array([[5, 9, 3, 41, 1, 0, 0], [7, 49, 2, 2, 30, 11, 1]])
TEXTS = [
    "Passages answer queries.",
    "A docid names a passage, and a trie holds all docids.",
    "Vectors of queries lie near those of the passages that answer them; the nearest are found by ScaNN.",
]
DECODER_INPUTS = np.array([[0, 4, 8, 15], [0, 16, 23, 42]])


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights of a size at which every part matters; float16 holds them exactly."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            scale = 1.0 if "relative_attention_bias" in name or p.ndim == 1 else p.shape[-1] ** -0.5
            drawn = rng.uniform(0.5, 1.5, p.shape) if p.ndim == 1 else scale * rng.standard_normal(p.shape)
            p.copy_(torch.from_numpy(drawn.astype(np.float16)))


def t5(sizes: dict, seed: int) -> transformers.T5ForConditionalGeneration:
    """Hugging Face's T5 with random weights."""
    config = transformers.T5Config(**sizes, dropout_rate=0.0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not sizes["tie_word_embeddings"]:  # transformers 5 ties them all the same
        model.lm_head.weight = torch.nn.Parameter(torch.empty(model.lm_head.weight.shape))
        model.all_tied_weights_keys = {}
    randomise(model, seed)
    return model


def logits(model: torch.nn.Module, inputs: np.ndarray, decoder_inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(inputs),
            attention_mask=torch.from_numpy((inputs > 0).astype(np.int64)),
            decoder_input_ids=torch.from_numpy(decoder_inputs),
        )
    return output.logits.float().numpy()


def sentence_transformer(folder: Path, sizes: dict, dimensions: int, seed: int) -> SentenceTransformer:
    """A folder as GTR's: a T5 1.0 encoder, mean, matrix, unit length."""
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=pieces, vocab_size=48, normalization_rule_name="identity",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as saved:
        (Path(saved) / "spiece.model").write_bytes(pieces.getvalue())
        tokenizer = transformers.T5Tokenizer.from_pretrained(saved, extra_ids=100)
        config = transformers.T5Config(**sizes | {"vocab_size": 256}, dropout_rate=0.0)
        encoder = transformers.T5EncoderModel(config).eval()
        randomise(encoder, seed)
        encoder.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        transformer = models.Transformer(saved, max_seq_length=12)
    identity = torch.nn.Identity()
    dense = models.Dense(sizes["d_model"], dimensions, bias=False, activation_function=identity)
    randomise(dense, seed + 1)
    model = SentenceTransformer(
        modules=[transformer, models.Pooling(sizes["d_model"]), dense, models.Normalize()]
    )
    model.save(str(folder))
    (folder / "README.md").unlink()
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    return model.eval()


def main() -> None:
    for kind, options in KINDS.items():
        folder = GOLDENS / kind
        shutil.rmtree(folder, ignore_errors=True)
        model = t5(SIZES | options, seed=len(kind))
        found = logits(model, INPUTS, DECODER_INPUTS)
        model.config.tie_word_embeddings = options["tie_word_embeddings"]  # which transformers 5 sets to True
        model.half().save_pretrained(folder, max_shard_size="8KB" if kind == "t5_1_1" else "1GB")
        np.savez(folder / "expected.npz", inputs=INPUTS, decoder_inputs=DECODER_INPUTS, logits=found)

    shutil.rmtree(GOLDENS / "gtr", ignore_errors=True)
    model = sentence_transformer(GOLDENS / "gtr", SIZES | {"feed_forward_proj": "relu"}, dimensions=9, seed=3)
    np.savez(GOLDENS / "gtr" / "expected.npz", texts=TEXTS, vectors=model.encode(TEXTS))
    for path in GOLDENS.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
