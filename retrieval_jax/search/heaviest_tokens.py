"""The tokens that count most, by which lexical and planned searchers explain their scores."""

import numpy as np

from retrieval_jax.data.vocabulary import Vocabulary


def heaviest_tokens(vocabulary: Vocabulary, tokens: np.ndarray, scores: np.ndarray, most: int) -> list[dict]:
    """Lists the tokens of largest score, those above 0 alone.

    Args:
      vocabulary: the text vocabulary.
      tokens: int; one that is no piece of the vocabulary is named by its number.
      scores: float, one of each token.
      most: how many are listed, at most.

    Returns:
      {"text", "score"} of each, the largest score first.
    """
    pieces, listed = vocabulary.model.get_piece_size(), []
    for nth in np.argsort(-scores, kind="stable")[:most]:
        token, score = int(tokens[nth]), float(scores[nth])
        if score > 0:
            text = vocabulary.model.id_to_piece(token) if token < pieces else f"<{token}>"
            listed.append({"text": text, "score": score})
    return listed
