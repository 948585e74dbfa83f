"""BM25's and TF-IDF's weights of the text vocabulary's tokens, and the sets of each passage's best tokens.

A passage's tokens are counted as BM25 counts words, but as pieces of the text vocabulary, which a lexical
head weighs. The weight of token t in passage p is idf_t · part_t(p). Where a query weighs its tokens by
idf_t, as an untrained lexical head does, and a set has the parts as impacts, its score is BM25's.

The tokens are counted by a process for each core, shard by shard; the counts lie on disk meanwhile, until the
statistics of the whole collection are known.

Letters in shapes: P passages, M tokens of a set, V text vocabulary, N different tokens of each passage of a
shard, one passage after the other.
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from retrieval_jax.core import npy
from retrieval_jax.core.progress import bar
from retrieval_jax.data import parallel
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.token_sets import IMPACTS, TOKENS, TokenSets, token_dtype

K1, B = 0.9, 0.4  # as the searcher bm25 has them
SHARD = 1 << 15  # passages that are counted at once
SAMPLE = 1 << 18  # passages that `token_idf` counts at most
_AT_ONCE = 1024  # texts that are tokenised at once
LARGEST = np.iinfo(np.uint8).max  # impact


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What weights depend on beside the passage's own counts.

    Attributes:
      idf_V: float32, log(1 + (P - df + 0.5) / (df + 0.5)), as Lucene has it (Robertson and Zaragoza 2009,
        section 3.1, but for the 1, which keeps it above 0).
      mean_length: tokens of a passage, on average.
      largest_count: the most often that a passage has a token.
    """

    idf_V: np.ndarray
    mean_length: float
    largest_count: int


def _bm25_part(counts_N: np.ndarray, lengths_N: np.ndarray, known: Statistics) -> np.ndarray:
    """Computes tf / (tf + k1 (1 - b + b · length / mean length)), which is below 1."""
    return counts_N / (counts_N + K1 * (1 - B + B * lengths_N / known.mean_length))


def _tf_part(counts_N: np.ndarray, lengths_N: np.ndarray, known: Statistics) -> np.ndarray:
    """Computes (1 + log tf) / (1 + log of the largest tf), which is at most 1."""
    return (1 + np.log(counts_N)) / (1 + np.log(known.largest_count))


PARTS: dict[str, Callable[[np.ndarray, np.ndarray, Statistics], np.ndarray]] = {
    "bm25": _bm25_part,
    "tf_idf": _tf_part,
}
"""Name of a weight -> its part that does not depend on the collection's idf, in 0 to 1."""


def token_idf(collection: Collection, vocabulary: Vocabulary) -> np.ndarray:
    """Computes the inverse document frequency of each token, float32 V; see `Statistics`.

    A collection of more than SAMPLE passages is represented by as many of them, evenly spaced: the same ones
    at every call.
    """
    rows = range(0, collection.passage_count, -(-collection.passage_count // SAMPLE))
    frequencies_V = np.zeros(vocabulary.size, np.int64)
    with bar("counting words", len(rows)) as advance:
        for tokens_N, _, _ in _counted(collection, vocabulary, rows):
            np.add.at(frequencies_V, tokens_N, 1)
            advance()
    return _idf(frequencies_V, len(rows))


def _idf(frequencies_V: np.ndarray, passages: int) -> np.ndarray:
    return np.log1p((passages - frequencies_V + 0.5) / (frequencies_V + 0.5)).astype(np.float32)


def write_sets(folder: Path, collection: Collection, name: str, m: int, with_impacts: bool) -> dict:
    """Writes the sets of the tokens with the highest weights.

    Args:
      folder: the folder to write into; temporary files lie in it meanwhile.
      collection: the passages.
      name: a key of `PARTS`.
      m: the most tokens of a set.
      with_impacts: whether tokens have impacts, which are the parts.

    Returns:
      What the folder's manifest shall say.
    """
    vocabulary = Vocabulary(collection.vocabulary_path)
    count = collection.passage_count
    shards = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
    shape, arrays = (count, m), [(TOKENS, token_dtype(vocabulary.size))]
    arrays += [(IMPACTS, np.uint8)] if with_impacts else []
    files = [npy.zeros(folder / name, dtype, shape) for name, dtype in arrays]
    with tempfile.TemporaryDirectory(prefix="counts.", dir=folder) as scratch:
        jobs = [(Path(scratch) / f"{number:06}.npz", rows) for number, rows in enumerate(shards)]
        threads = -1 if len(jobs) == 1 else 1  # a process for each core
        count_shard = functools.partial(_count_shard, collection.folder, threads)
        counted = parallel.map_jobs(count_shard, jobs, f"{name}: counting")
        frequencies, lengths, largest = zip(*counted, strict=True)
        known = Statistics(_idf(sum(frequencies), count), sum(lengths) / count, max(largest))
        choose = functools.partial(_choose_shard, folder, name, known)
        parallel.map_jobs(choose, jobs, f"{name}: choosing tokens")
    facts = 1 / LARGEST, collection.ids, collection.fingerprint, vocabulary.checksum
    return TokenSets(files[0], files[1] if with_impacts else None, *facts).write(folder)


def _counted(
    collection: Collection, vocabulary: Vocabulary, rows: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields of each passage: its different tokens, how often it has each, and the number of all of them."""
    texts = (passage.full_text for passage in collection.passages(rows))
    while some := list(itertools.islice(texts, _AT_ONCE)):
        for tokens in vocabulary.encode_all(some):
            distinct_N, counts_N = np.unique(np.array(tokens, np.int32), return_counts=True)
            is_piece = distinct_N > vocabulary.model.unk_id()
            yield distinct_N[is_piece], counts_N[is_piece], len(tokens)


def _count_shard(
    collection_folder: Path, threads: int, job: tuple[Path, range]
) -> tuple[np.ndarray, int, int]:
    """Writes a shard's counts. Returns (document frequencies V, number of all tokens, the largest count)."""
    path, rows = job
    collection = Collection(collection_folder)
    vocabulary = Vocabulary(collection.vocabulary_path)
    vocabulary.threads = threads
    tokens, counts, lengths = zip(*_counted(collection, vocabulary, rows), strict=True)
    tokens_N, counts_N = np.concatenate(tokens), np.concatenate(counts)
    sizes_P = np.array([len(some) for some in tokens])
    np.savez(path, tokens=tokens_N, counts=counts_N, lengths=np.array(lengths), sizes=sizes_P)
    return np.bincount(tokens_N, minlength=vocabulary.size), sum(lengths), int(counts_N.max(initial=1))


def _choose_shard(folder: Path, name: str, known: Statistics, job: tuple[Path, range]) -> None:
    """Writes a shard's sets into the arrays' files."""
    path, rows = job
    with np.load(path) as counted:
        tokens_N, sizes_P = counted["tokens"], counted["sizes"]
        parts_N = PARTS[name](counted["counts"], np.repeat(counted["lengths"], sizes_P), known)
    passage_N = np.repeat(np.arange(len(sizes_P)), sizes_P)
    order_N = np.lexsort((tokens_N, -known.idf_V[tokens_N] * parts_N, passage_N))
    rank_N = np.arange(len(order_N)) - np.repeat(np.cumsum(sizes_P) - sizes_P, sizes_P)
    for file, values_N in ((TOKENS, tokens_N), (IMPACTS, np.rint(LARGEST * parts_N))):
        if (folder / file).exists():
            array = np.load(folder / file, "r+")
            kept_N = rank_N < array.shape[1]
            array[rows.start + passage_N[kept_N], rank_N[kept_N]] = values_N[order_N[kept_N]]
            array.flush()
