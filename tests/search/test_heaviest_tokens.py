"""Which tokens an explanation lists."""

from pathlib import Path

import numpy as np

from retrieval_jax.data.vocabulary import Vocabulary, learn
from retrieval_jax.search.heaviest_tokens import heaviest_tokens


def test_the_largest_scores_above_zero_come_first(tmp_path: Path):
    learn(["the quick brown fox", "jumps over", "the lazy dog"], 60, tmp_path / "pieces.model")
    vocabulary = Vocabulary(tmp_path / "pieces.model")
    fox, beyond = vocabulary.encode("fox")[0], vocabulary.model.get_piece_size() + 3
    piece = vocabulary.model.id_to_piece
    tokens, scores = np.array([7, fox, beyond, 9, 5]), np.float32([0.5, 2, 0.25, 0, -1])
    wanted = [{"text": piece(fox), "score": 2.0}, {"text": piece(7), "score": 0.5}]
    assert heaviest_tokens(vocabulary, tokens, scores, 2) == wanted
    assert heaviest_tokens(vocabulary, tokens, scores, 9) == [*wanted, {"text": f"<{beyond}>", "score": 0.25}]
