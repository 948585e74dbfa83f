"""Texts that are in a collection more than once: a copy of a positive passage is never used as a negative.

    collection/copies.npy    int64, C×2: the row of a passage, and the first row that has the same text

Two texts are the same if they differ in white space alone.
"""

import collections
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from retrieval_jax.core.progress import log
from retrieval_jax.data.collection import Passage, Query

MAX_OTHERS = 64  # a log of clicks may have one query thousands of times, each with another passage


def normalize_white_space(text: str) -> str:
    """Returns the text with single blanks between its words."""
    return " ".join(text.split())


def digest(text: str) -> bytes:
    """Returns 16 bytes that are equal for texts that are the same."""
    return hashlib.blake2b(
        normalize_white_space(text).encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


def find_copies(digests_Nx2: np.ndarray) -> np.ndarray:
    """Finds the later copies of texts.

    Args:
      digests_Nx2: the digest of each text (`digest`), as two uint64.

    Returns:
      int64 C×2, by row: each row whose digest occurs in an earlier row, and the first row that has it.
    """
    order = np.lexsort(tuple(digests_Nx2.T))  # stable: equal digests stay in the order of their rows
    ordered = digests_Nx2[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    found = np.stack([order[~new], first[~new]], axis=1).astype(np.int64)
    return found[np.argsort(found[:, 0])]


def same_text(query: Query, passage: Passage) -> bool:
    """Returns whether the words of a query are part of a passage, or the passage's text is part of the query.

    Case is ignored, and the passage's title may be missing from the query.
    """
    words = normalize_white_space(f"{passage.title} {passage.text}").casefold()
    text, body = normalize_white_space(query.text).casefold(), normalize_white_space(passage.text).casefold()
    return bool(text) and (text in words or (bool(body) and body in text))


class KnownAnswers:
    """Finds the passages that are known to answer a query besides its own positives.

    These are the positives of other queries whose text differs in case and white space alone (judged by
    people and by a language model under two ids, for example), and the passage that the query itself is.

    Args:
      queries: all queries whose positives are known.
    """

    def __init__(self, queries: Iterable[Query]):
        positives: dict[bytes, list[Mapping[str, int]]] = collections.defaultdict(list)
        for query in queries:
            if query.text.strip():
                positives[digest(query.text.casefold())].append(query.positives)
        repeated = {key: some for key, some in positives.items() if len(some) > 1}
        self.of_text = {key: [*dict.fromkeys(itertools.chain(*some))] for key, some in repeated.items()}
        if cut := sum(len(some) > MAX_OTHERS for some in self.of_text.values()):
            log(f"{cut:,} texts of train queries have over {MAX_OTHERS} positives: groups know the first")

    def others(self, query: Query, most: int | None = MAX_OTHERS) -> Sequence[str]:
        """Returns the ids of the passages that answer a query and are not among its own positives.

        Args:
          query: the query.
          most: how many positives of queries with its text are looked at; None for all.
        """
        shared = self.of_text.get(digest(query.text.casefold()), ())[:most]
        own = [query.id] if query.is_passage else []
        return [passage for passage in dict.fromkeys([*own, *shared]) if passage not in query.positives]
