"""What searchers that encode queries have in common, with an encoder of two compiled lengths."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import Vocabulary, learn
from retrieval_jax.embeddings.text_encoder import TextEncoder, query_shapes
from retrieval_jax.search.encoding_searcher import EncodingSearcher, load_own_model


def test_queries_are_cut_and_compiled_as_the_encoder_does(tmp_path: Path):
    learn(["the quick brown fox", "jumps over", "the lazy dog"], 60, tmp_path / "pieces.model")
    vocabulary = Vocabulary(tmp_path / "pieces.model")

    def encode(params: dict, tokens_BxS: jnp.ndarray) -> jnp.ndarray:
        return jnp.sum(tokens_BxS, axis=1, keepdims=True).astype(jnp.float32)

    encoder = TextEncoder(encode, {}, vocabulary, query_shapes(16))
    searcher = EncodingSearcher(encoder)
    fits = next(text for n in range(99) if len(vocabulary.tokens([text := "x" * n], 99)[0]) == 16)
    assert not searcher.truncates(fits)
    assert searcher.truncates(f"{fits}x")
    searcher.compile_for([])
    assert encoder._encode._cache_size() == 0
    searcher.compile_for(["fox"])  # the shape 1×8
    assert encoder._encode._cache_size() == 1
    searcher.use_batch_sizes([1, 2])  # of lengths 8 and 16
    assert encoder._encode._cache_size() == 4
    assert encoder(["fox", fits]).shape == (2, 1)
    assert encoder._encode._cache_size() == 4


def test_a_model_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"alone: its model is not at .*models/m: move both together, or"):
        load_own_model(tmp_path / "searchers/alone", {"model": "../../models/m", "step": 1})
