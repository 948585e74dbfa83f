"""Texts that stand in a collection more than once: no passage is a negative of a query that its copy answers.

    collection/copies.npy    int64, C×2: the row of a passage, and the first row that has the same text

Two texts are the same where they differ in white space alone.
"""

import collections
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from retrieval_jax.core.progress import log
from retrieval_jax.data.collection import Passage, Query

MOST_OTHERS = 64  # a log of clicks may have one query thousands of times, each with another passage


def normal(text: str) -> str:
    """The text with single blanks between its words."""
    return " ".join(text.split())


def digest(text: str) -> bytes:
    """16 bytes, the same for texts that are the same."""
    return hashlib.blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def pairs(digests_Nx2: np.ndarray) -> np.ndarray:
    """Int64 C×2, by row: each row whose digest (two uint64) stood before, and the first row that has it."""
    order = np.lexsort(tuple(digests_Nx2.T))  # stable: equal digests stay in the order of their rows
    ordered = digests_Nx2[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    found = np.stack([order[~new], first[~new]], axis=1).astype(np.int64)
    return found[np.argsort(found[:, 0])]


def same_text(query: Query, passage: Passage) -> bool:
    """Whether the query is the passage: one's words hold the other's, whatever became of the title."""
    words = normal(f"{passage.title} {passage.text}").casefold()
    text, body = normal(query.text).casefold(), normal(passage.text).casefold()
    return bool(text) and (text in words or (bool(body) and body in text))


class KnownAnswers:
    """The passages that answer a query, as far as some queries tell: its positives, and then others.

    The others are the positives of queries with the same text (as people and a language model judged them
    under two ids; at most MOST_OTHERS, the first ones), and the passage that the query itself is.
    """

    def __init__(self, queries: Iterable[Query]):
        positives: dict[bytes, list[Mapping[str, int]]] = collections.defaultdict(list)
        for query in queries:
            if query.text.strip():
                positives[digest(query.text)].append(query.positives)
        repeated = {key: some for key, some in positives.items() if len(some) > 1}
        self.of_text = {key: [*dict.fromkeys(itertools.chain(*some))] for key, some in repeated.items()}
        if cut := sum(len(some) > MOST_OTHERS for some in self.of_text.values()):
            log(f"{cut:,} texts of train queries have over {MOST_OTHERS} positives: the first are known")

    def others(self, query: Query) -> Sequence[str]:
        """Ids of the passages that are not among the query's own positives."""
        shared = self.of_text.get(digest(query.text), ())[:MOST_OTHERS]
        own = [query.id] if query.is_passage else []
        return [passage for passage in dict.fromkeys([*own, *shared]) if passage not in query.positives]
