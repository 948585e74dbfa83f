"""A SentencePiece vocabulary as transformers' T5Tokenizer reads it."""

import json
from pathlib import Path

from retrieval_jax import paths
from retrieval_jax.data.vocabulary import SENTINELS, Vocabulary
from retrieval_jax.interop.hugging_face import PIECES


def write(folder: Path, vocabulary: Vocabulary, length: int | None) -> None:
    """Writes the pieces and what the tokenizer shall do with them, for texts of at most `length` tokens."""
    paths.copy(vocabulary.path, folder / PIECES)
    config = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": SENTINELS,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
