"""Vocabularies that are learned on a collection."""

import numpy as np
import pytest

from retrieval_jax.core.errors import UserError
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


def test_words_are_the_same_pieces_beside_punctuation(tmp_path):
    """Against texts with spaces around punctuation; all else is normalised as without the rules."""
    words = ["list", "files", "scipy", "signal", "caf\u00e9", "create", "archive", "directory"]
    texts = [" ".join(words[i:] + words[:i]) + f" ({i}), x-y_z." for i in range(8)] * 20
    path = tmp_path / "pieces.model"
    learn(texts, 90, path)
    assert [file.name for file in tmp_path.iterdir()] == ["pieces.model"]
    pieces = Vocabulary(path)
    for text, spaced in (
        ("List(Files)", "list ( files )"),
        ("scipy.signal_create", "scipy . signal _ create"),
        ("\uff33cipy  caf\u0065\u0301-x", "scipy caf\u00e9 - x"),
    ):
        assert pieces.encode(text) == pieces.encode(spaced)
        assert 2 not in pieces.encode("".join(c for c in spaced if c.isalpha() or c == " "))
    assert pieces.decode(np.array([pieces.encode("scipy.signal")])) == ["scipy . signal"]


def test_required_characters_have_pieces_however_rare_they_are(tmp_path):
    words, rng = ["common", "words", "of", "a", "longer", "text"], np.random.default_rng(0)
    # Of one text 2,000 times, SentencePiece takes minutes to find what repeats.
    texts = [" ".join(rng.permutation(words)) for _ in range(2000)] + ["\u00c5~"]
    for required, rare in (
        ((), [2, 2]),
        (("~\u00c5", "A\u030a"), []),
        ([*map(chr, range(0x4E00, 0x4E80)), "~~"], [2]),
    ):
        path = tmp_path / f"{len(required)}.model"
        learn(texts, 60, path, required)
        encoded = Vocabulary(path).encode("\u00c5 ~")
        assert [token for token in encoded if token == 2] == rare
        assert Vocabulary(path).encode("common words").count(2) == 0


@pytest.mark.parametrize("content", [b"", b"text"])
def test_a_file_that_is_no_vocabulary_is_told(tmp_path, content: bytes):
    (tmp_path / "pieces.model").write_bytes(content)
    with pytest.raises(UserError, match=r"pieces.model: not a SentencePiece model: check VOCABULARY"):
        Vocabulary(tmp_path / "pieces.model")
