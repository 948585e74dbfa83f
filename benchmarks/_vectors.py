"""Vectors without a trained model: of real passages, by latent semantic analysis, or generated."""

import collections
import gzip
import re
from pathlib import Path

import numpy as np
import scipy.sparse

_WORD = re.compile(r"[a-z0-9]+")
OVERSAMPLED = 32
MIXED = (0.8, 0.6)  # of two passages: a unit vector again, where these are orthogonal


def read(folder: Path, split: str) -> tuple[list[str], list[str]]:
    """The texts of passages and of a split's queries of a folder in (compressed) TSV layout."""
    with gzip.open(folder / "docs.tsv.gz", "rt") as docs:
        passages = [line.rstrip("\n").split("\t", 1)[1] for line in docs]
    with gzip.open(folder / f"queries.{split}.tsv.gz", "rt") as lines:
        queries = [line.rstrip("\n").split("\t", 1)[1] for line in lines]
    return passages, queries


def latent_semantic_analysis(
    passages: list[str], queries: list[str], dimensions: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 unit vectors of passages N×E and queries Q×E: (1 + log tf) · idf, projected on the first right
    singular vectors, which a randomised range finder with a power iteration finds (Halko et al. 2011, 4.4).

    Texts without a word that a passage has are left out of the queries, and are 0 among the passages.
    """
    rng = np.random.default_rng(seed)
    words = [_WORD.findall(text.lower()) for text in passages]
    known = collections.Counter(word for text in words for word in set(text))
    column = {word: i for i, word in enumerate(word for word, count in known.items() if count > 1)}
    idf = np.log(len(passages) / np.array([known[word] for word in column])).astype(np.float32)
    passages_NxV = _tf_idf(words, column, idf)
    queries_QxV = _tf_idf([_WORD.findall(text.lower()) for text in queries], column, idf)
    queries_QxV = queries_QxV[np.diff(queries_QxV.indptr) > 0]

    width = min(dimensions + OVERSAMPLED, len(column))
    sample_NxR = passages_NxV @ rng.standard_normal((len(column), width), np.float32)
    basis_NxR = _orthonormal(passages_NxV @ (passages_NxV.T @ _orthonormal(sample_NxR)))
    small_VxR = passages_NxV.T @ basis_NxR
    _, left_RxR = np.linalg.eigh(small_VxR.T @ small_VxR)
    directions_VxE = _orthonormal(small_VxR @ left_RxR[:, ::-1][:, :dimensions])
    return _unit(passages_NxV @ directions_VxE), _unit(queries_QxV @ directions_VxE)


def _tf_idf(texts: list[list[str]], column: dict[str, int], idf: np.ndarray) -> scipy.sparse.csr_array:
    counts = [collections.Counter(word for word in text if word in column) for text in texts]
    ends = np.cumsum([0, *map(len, counts)])
    columns = np.array([column[word] for count in counts for word in count], np.int32)
    tf = np.array([n for count in counts for n in count.values()], np.float32)
    values = (1 + np.log(tf)) * idf[columns]
    return scipy.sparse.csr_array((values, columns, ends), (len(texts), len(column)))


def _orthonormal(x_NxR: np.ndarray) -> np.ndarray:
    """Another basis of what the columns span, by the inverse root of their products: faster than QR."""
    values, vectors = np.linalg.eigh((x_NxR.T @ x_NxR).astype(np.float64))
    values = np.maximum(values, 1e-7 * values[-1])
    return x_NxR @ ((vectors / np.sqrt(values)) @ vectors.T).astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)).astype(np.float32)


def grow(vectors_NxE: np.ndarray, count: int, path: Path, seed: int) -> None:
    """Writes `count` vectors to a .npy file: the given ones, then mixtures of two of them, at random."""
    rng = np.random.default_rng(seed)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (count, vectors_NxE.shape[1]))
    N = min(len(vectors_NxE), count)
    out[:N] = vectors_NxE[:N]
    for first in range(N, count, 1 << 16):
        size = min(1 << 16, count - first)
        a, b = (vectors_NxE[rng.integers(0, len(vectors_NxE), size)] for _ in range(2))
        out[first : first + size] = _unit(MIXED[0] * a + MIXED[1] * b)
    out.flush()


def clustered(count: int, dimensions: int, path: Path, queries: int, seed: int) -> np.ndarray:
    """Writes unit vectors around topics to a .npy file, block by block, and returns some queries for them.

    The centres of topics, of 300 vectors each on average, are normal with variance 1/d in dimension d; a
    vector is its topic's centre and 0.7 times such a normal vector, a query is a vector and 0.6 times one.
    """
    rng = np.random.default_rng(seed)
    deviation_E = (np.arange(1, dimensions + 1) ** -0.5).astype(np.float32)

    def normal(n: int, times: float) -> np.ndarray:
        return rng.standard_normal((n, dimensions), np.float32) * (np.float32(times) * deviation_E)

    centres = normal(max(count // 300, 1), 1)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (count, dimensions))
    for first in range(0, count, 1 << 15):
        size = min(1 << 15, count - first)
        out[first : first + size] = _unit(normal(size, 0.7) + centres[rng.integers(0, len(centres), size)])
    out.flush()
    scale = np.linalg.norm(deviation_E) * (1 + 0.7**2) ** 0.5  # of vectors before they were of length 1
    some = np.sort(rng.choice(count, queries, replace=False))
    return _unit(rng.permutation(out[some]) + normal(queries, 0.6) / scale)
