"""Vocabularies that are learned on a collection."""

import numpy as np

from retrieval_jax.data.vocabulary import MAX_TEXT_BYTES, Vocabulary, learn, split_long


def test_long_texts_are_learned_from_in_parts(tmp_path):
    words = [f"{a}{b}" for a in ("har", "tid", "lan", "mar", "sol") for b in ("bour", "ement", "tern", "ket")]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 12_000)) for _ in range(3)]
    assert all(len(text) > MAX_TEXT_BYTES for text in texts)
    learn(texts, 100, tmp_path / "pieces.model")
    vocabulary = Vocabulary(tmp_path / "pieces.model")
    for word in words:
        tokens = vocabulary.encode(word)
        assert vocabulary.model.unk_id() not in tokens
        assert vocabulary.decode(np.array([tokens])) == [word]


def test_parts_are_cut_between_words_and_lose_nothing():
    long = "é" * 70_000
    for text in ("", "short", "ab cde " * 20_000, long, f"{long} {long}"):
        parts = list(split_long(text))
        assert "".join(parts) == text
        assert all(len(part.encode()) <= MAX_TEXT_BYTES for part in parts)
    assert all(part.endswith(" ") for part in split_long("ab cde " * 20_000))


def test_a_text_exceeds_a_length_where_its_batch_would_be_cut(collection):
    vocabulary = Vocabulary(collection.vocabulary_path)
    prompted = vocabulary.with_prompt("query: ")
    texts = ["", "a", " ", "draw a table " * 3, *("progress bar " * count for count in range(1, 12)), "ﷺ" * 9]
    for text in texts:
        for some in (vocabulary, prompted):
            for length in (2, 8, 24):
                cut = (some.batch([text], length) > 0).sum() < (some.batch([text], 500) > 0).sum()
                assert some.exceeds(text, length) == cut, (text, length)
