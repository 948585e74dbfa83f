"""Docids of every kind, simulated: laid out as the project does, for a collection that does not exist."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.docids import residual, semantic
from retrieval_jax.docids.kinds import digits_needed

T5_SIZE = 32_128


@dataclasses.dataclass(frozen=True)
class Docids:
    """A table of one kind. `codes`: by how much tokens grow from a position to the next; 0: they do not."""

    tokens_NxL: np.ndarray
    output_size: int
    codes: int = 0


def kinds(vocabulary: Path | None) -> dict[str, Callable[[int], Docids]]:
    """What makes `count` docids of each kind."""
    return {
        "naive": lambda count: naive(count, vocabulary),
        "naive_digits": naive_digits,
        "semantic": lambda count: clustered(count, two_d=False),
        "semantic_16": lambda count: dataclasses.replace(clustered(count, two_d=False), output_size=16),
        "semantic_2d": lambda count: clustered(count, two_d=True),
        "rq_8x256": lambda count: quantised(count, 8, 256),
        "rq_8x256_skewed": lambda count: quantised(count, 8, 256, skewed=True),
        "rq_8x2048": lambda count: quantised(count, 8, 2048),
        "rq_32x256": lambda count: quantised(count, 32, 256),
    }


def naive(count: int, vocabulary: Path | None) -> Docids:
    """The numbers from 0 on in a vocabulary's pieces; without one, as T5 cuts most: a digit, then pairs."""
    parts = list(_pieces(count, Vocabulary(vocabulary)) if vocabulary else _simulated_pieces(count))
    tokens_NxL = np.zeros((count, max(part.shape[1] for part in parts)), np.uint16)
    first = 0
    for part in parts:
        tokens_NxL[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return Docids(tokens_NxL, T5_SIZE)


def _pieces(count: int, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    for first in range(0, count, 1 << 16):
        numbers = map(str, range(first, min(first + (1 << 16), count)))
        docids = vocabulary.model.encode(list(numbers), add_eos=True)
        longest = max(map(len, docids))
        yield np.array([docid + [0] * (longest - len(docid)) for docid in docids], np.uint16)


def _simulated_pieces(count: int) -> Iterator[np.ndarray]:
    digits_NxD = _digits(count)
    width = digits_NxD.shape[1]
    pieces = [2 + digits_NxD[:, 0].astype(np.int32)]
    for left in range(1, width, 2):
        value = digits_NxD[:, left].astype(np.int32)  # -1: the number has ended
        two = digits_NxD[:, left + 1] >= 0 if left + 1 < width else np.zeros(count, bool)
        pair = 22 + 10 * value + (digits_NxD[:, left + 1] if left + 1 < width else 0)
        pieces.append(np.where(two, pair, np.where(value >= 0, 12 + value, 0)))
    yield _ended(np.stack(pieces, 1))


def naive_digits(count: int) -> Docids:
    """The numbers from 0 on, a token a digit."""
    digits_NxD = _digits(count)
    return Docids(_ended(np.where(digits_NxD < 0, 0, digits_NxD + 2).astype(np.uint8)), 128)


def _digits(count: int) -> np.ndarray:
    """int8: the digits of the numbers from 0 on, from the left, then -1."""
    texts = np.arange(count).astype(f"S{len(str(count - 1))}")
    ascii_NxD = texts.view(np.uint8).reshape(count, -1)
    return np.where(ascii_NxD > 0, ascii_NxD.astype(np.int8) - ord("0"), np.int8(-1))


def _ended(tokens_NxL: np.ndarray) -> np.ndarray:
    """With EOS after the last token of each."""
    tokens_NxL = np.pad(tokens_NxL, ((0, 0), (0, 1)))
    tokens_NxL[np.arange(len(tokens_NxL)), (tokens_NxL > 0).sum(1)] = EOS
    return tokens_NxL


def clustered(count: int, two_d: bool) -> Docids:
    """Paths in a tree of ten uneven clusters of clusters, down to 100 passages, and numbers in its leaves."""
    rng, settings = np.random.default_rng(0), semantic.Settings()
    sizes, children, level = [np.array([count])], [], np.array([count])
    while len(level):
        parts = rng.multinomial(level, rng.dirichlet(np.full(settings.clusters_per_node, 2.0), len(level)))
        parts[level <= settings.leaf_size] = 0
        children.append((parts > 0).sum(1))
        level = parts[parts > 0]
        sizes.append(level)
    size_M, children_M = np.concatenate(sizes), np.concatenate(children).astype(np.int32)
    first_child_M = (1 + np.cumsum(children_M) - children_M).astype(np.int32)
    tree = semantic.Tree(np.zeros((1, 0)), first_child_M, children_M, np.zeros(len(size_M), np.int32))
    leaf_M = np.flatnonzero(children_M == 0)
    # Neighbours in a cluster are not neighbours in the collection.
    leaves = rng.permutation(np.repeat(leaf_M, size_M[leaf_M]).astype(np.int32))
    tokens_NxL = semantic.tokens(
        tree, leaves, tree.take_leaf_indices(leaves), settings.clusters_per_node, two_d
    )
    size = semantic.output_size(tokens_NxL.shape[1], settings.clusters_per_node, two_d)
    return Docids(tokens_NxL, size, settings.clusters_per_node * two_d)


def quantised(count: int, levels: int, size: int, skewed: bool = False) -> Docids:
    """Random codes: uniform, or (as in real codebooks) some far more often than others, by Zipf's law.

    Where passages share all codes each docid ends with the passage's number among those.
    """
    rng = np.random.default_rng(0)
    codes_NxL = np.empty((count, levels), np.min_scalar_type(size - 1))
    weight_V = 1 / np.arange(1, size + 1) if skewed else np.ones(size)
    upto_V = np.cumsum(weight_V / weight_V.sum())[:-1]
    for level in range(levels):
        codes_NxL[:, level] = np.searchsorted(upto_V, rng.random(count, np.float32), side="right")
    numbers_N = residual.collision_indices(codes_NxL, codes_NxL[:0], np.zeros(0, np.int64))
    digits = digits_needed(int(numbers_N.max()), size)
    tokens_NxL = residual.tokens(codes_NxL, numbers_N, digits, size)
    return Docids(tokens_NxL, residual.output_size(tokens_NxL.shape[1], size), size)
