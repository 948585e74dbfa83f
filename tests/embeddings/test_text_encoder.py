"""Texts in batches of a few lengths: the vectors of the whole length, whatever is beside a text."""

import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folders import random_params

from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.embeddings import text_encoder
from retrieval_jax.embeddings.text_encoder import (
    TextEncoder,
    lengths_up_to,
    passage_shapes,
    query_shapes,
)
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config

LONGEST = 40


class Compiled:
    """A dual encoder's encoding, and the shapes that it was traced for, each time it was."""

    def __init__(self, collection):
        self.vocabulary = Vocabulary(collection.vocabulary_path)
        self.model = DualEncoder(T5Config(self.vocabulary.size, 32, 2, 16, 48, 2, 0), vector_dim=24)
        self.params, self.shapes = random_params(self.model), []

    def __call__(self, params, tokens_BxS):
        self.shapes.append(tokens_BxS.shape)
        return self.model.encode_passages(params, tokens_BxS)

    def encoder(self, shapes, mesh=None) -> TextEncoder:
        return TextEncoder(self, self.params, self.vocabulary, shapes, mesh)


@pytest.fixture
def compiled(collection) -> Compiled:
    return Compiled(collection)


@pytest.fixture
def texts(collection) -> list[str]:
    """Of all lengths from none to more than LONGEST tokens, in no order."""
    words = " ".join(passage.full_text for passage in collection.passages()).split()
    rng = np.random.default_rng(0)
    return [" ".join(words[start : start + rng.integers(0, 30)]) for start in range(0, 2500, 5)]


def test_vectors_are_those_of_the_whole_length(compiled, texts):
    encoder = compiled.encoder(passage_shapes(LONGEST), all_devices())
    done = []
    found = encoder(texts, done.append)
    assert found.dtype == np.float32
    assert sum(done) == len(texts)
    tokens = compiled.vocabulary.batch(texts, LONGEST)
    expected = jax.jit(compiled.model.encode_passages)(compiled.params, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert {tokens.shape[1] for _, tokens in encoder.batches(texts)} == {*lengths_up_to(LONGEST, 4, 4)}


def test_a_passages_vector_is_the_same_whatever_its_batch(compiled, texts):
    encoder = compiled.encoder(passage_shapes(LONGEST))
    found = encoder(texts)
    shapes = len(compiled.shapes)
    order = np.random.default_rng(1).permutation(len(texts))
    shuffled = encoder([texts[place] for place in order])
    np.testing.assert_array_equal(shuffled, found[order])
    for place in (0, 77, 303):  # alone, beside rows of padding
        np.testing.assert_array_equal(encoder([texts[place]])[0], found[place])
    assert len(compiled.shapes) == shapes


def test_a_querys_vector_is_nearly_the_same_whatever_its_batch(compiled, texts):
    encoder = compiled.encoder(query_shapes(LONGEST))
    found = encoder(texts)
    alone = np.concatenate([encoder([text]) for text in texts[:60]])
    np.testing.assert_allclose(alone, found[:60], rtol=0, atol=1e-6)


def test_shapes_are_compiled_once_and_only_where_needed(compiled, texts):
    encoder = compiled.encoder(query_shapes(LONGEST))
    encoder(["a"])
    assert compiled.shapes == [(1, 8)]
    encoder(["a"] * 6)
    assert compiled.shapes == [(1, 8), (8, 8)]
    encoder(texts)
    encoder(texts)
    encoder(texts[:7])
    assert len(compiled.shapes) == len(set(compiled.shapes)) <= 3 * 4  # 8, 16, 32 and 40 tokens


def test_texts_that_were_compiled_for_compile_nothing_more(compiled, texts):
    encoder = compiled.encoder(query_shapes(LONGEST))
    encoder.compile_for(texts)
    shapes = [*compiled.shapes]
    assert len(shapes) > 1
    encoder(texts)
    assert compiled.shapes == shapes


def test_lengths():
    assert lengths_up_to(256, 4, 4) == [
        *range(4, 32, 4), *range(32, 64, 8), *range(64, 128, 16), *range(128, 257, 32)
    ]  # fmt: skip
    assert lengths_up_to(100, 8, 1) == [8, 16, 32, 64, 100]
    assert lengths_up_to(3, 4, 4) == [3]
    assert [*query_shapes(16).values()] == [(1, 8, 32)] * 2
    for length, (rows,) in passage_shapes(512).items():
        assert rows * length <= 512 < (rows + 1) * length
    tpu = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))
    shapes = passage_shapes(512, tpu)  # fewer to compile
    assert sum(map(len, shapes.values())) == 32
    assert shapes[16] == [128, 1024]
    assert [*shapes] == [*range(16, 128, 16), *range(128, 256, 32), *range(256, 513, 64)]


@given(
    st.lists(st.integers(1, 20), max_size=150),
    st.sets(st.integers(1, 40), min_size=1, max_size=3).map(sorted),
)
def test_every_text_is_in_one_batch_at_its_length(numbers, counts):
    class Words:
        """Makes n tokens of the number n."""

        def tokens(self, texts, length):
            return [[*range(2, int(text) + 1), 1][:length] for text in texts]

    lengths = lengths_up_to(20, 4, 4)
    encoder = TextEncoder(lambda params, tokens: tokens, {}, Words(), dict.fromkeys(lengths, counts))
    seen = []
    for places, tokens in encoder.batches([*map(str, numbers)]):
        assert len(tokens) in counts
        assert 0 < len(places) <= len(tokens)
        seen += places
        length = tokens.shape[1]
        for place, row in zip(places, tokens, strict=False):
            assert np.count_nonzero(row) == numbers[place] <= length
            assert length == 4 or length - 4 < numbers[place]
        assert not tokens[len(places) :].any()
        assert len(tokens) == counts[0] or 2 * len(places) >= len(tokens)
    assert sorted(seen) == [*range(len(numbers))]


def test_an_accelerators_batches_are_larger(monkeypatch):
    chips = [type("Chip", (), {"platform": "tpu"})()]
    monkeypatch.setattr(text_encoder.jax, "devices", lambda: chips)
    shapes = passage_shapes(256)
    assert shapes[256] == [8, 64]
    assert shapes[16] == [128, 1024]
