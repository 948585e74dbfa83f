"""BM25's index: built by several processes in little memory, and mapped into memory when it is searched.

The index is a sparse matrix of scores with a row for each passage and a column for each term. Its arrays are
files of the library bm25s, with the same values as the library computes:

    terms.arrow                       the terms in order, one for each column
    bm25/data.csc.index.npy           float32: the scores, column after column
    bm25/indices.csc.index.npy        int32: their rows, which ascend in a column
    bm25/indptr.csc.index.npy         int64: where each column begins, and where the last one ends

The library builds it from the terms of all passages, which it holds in memory as lists of strings. Here a
first round of jobs counts the terms of shards of passages and writes the counts to disk, in the order of the
terms. When the frequency of each term is known, a second round merges the counts of ranges of terms and
writes their parts of the arrays. What grows in memory with the collection is the length of each passage and,
once, the terms of each shard.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import operator
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_jax.core import arrow_ids, npy
from retrieval_jax.core.errors import UserError
from retrieval_jax.data import parallel
from retrieval_jax.search.analysis import analyzer

K1, B = 0.9, 0.4
INDEX_VERSION = 2  # of the files; a searcher's recipe names it
SHARD = 1 << 15  # passages that are counted at once
BLOCK = 1 << 23  # scores that are merged at once, unless a term alone has more
_SCORES, _ROWS, _STARTS = (f"bm25/{name}.csc.index.npy" for name in ("data", "indices", "indptr"))
_TERMS = "terms.arrow"
_NORMS = "norms.npy"  # float64: by row, what a count is divided by beside itself

TextShard = Callable[[], Iterable[str]]
"""A function that returns the texts of a range of passages. It must be picklable if there are several."""


@dataclasses.dataclass(frozen=True)
class Index:
    """An index that is searched. All its arrays are mapped into memory.

    Attributes:
      terms: the terms in order; one for each of C columns.
      starts: int64 C+1, where the scores of each column begin.
      rows: int32 P, the row of each of the P scores.
      scores: float32 P, the scores, which are above 0.
    """

    terms: pa.LargeStringArray
    starts: np.ndarray
    rows: np.ndarray
    scores: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Opens the index in a local folder. Raises OSError or ValueError if a file is missing or damaged."""
        # As plain arrays: to slice a np.memmap takes several microseconds.
        arrays = [np.load(folder / name, "r").view(np.ndarray) for name in (_STARTS, _ROWS, _SCORES)]
        return cls(arrow_ids.read(folder / _TERMS), *arrays)

    def column(self, term: str) -> int | None:
        """Returns the column of a term; None if no passage has it."""
        place = bisect.bisect_left(self.terms, term, key=operator.methodcaller("as_py"))
        found = place < len(self.terms) and self.terms[place].as_py() == term
        return place if found else None

    def postings(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of a column's scores, in ascending order, and the scores."""
        part = slice(self.starts[column], self.starts[column + 1])
        return self.rows[part], self.scores[part]

    def terms_with(self, part: str) -> Iterator[str]:
        """Yields the terms that contain a string."""
        yield from self.terms.filter(pc.match_substring(self.terms, part)).to_pylist()


def write_index(folder: Path, shards: Sequence[TextShard], language: str | None) -> None:
    """Builds the index of texts.

    Args:
      folder: a local folder, which gets the files of the index. Temporary files of up to the same size lie
        in it meanwhile.
      shards: the texts, in order. Several shards are read by several processes.
      language: the language of the analysis.

    Raises:
      UserError: no text has a term.
    """
    with tempfile.TemporaryDirectory(prefix="counts.", dir=folder) as counts:
        _write_index(folder, Path(counts), shards, language)


def _write_index(folder: Path, counts: Path, shards: Sequence[TextShard], language: str | None) -> None:
    """Builds the index of texts by temporary files in the folder `counts`."""
    jobs = [(counts / f"{number:06}", shard) for number, shard in enumerate(shards)]
    counted = parallel.map_jobs(functools.partial(_count, language), jobs, "BM25: counting")
    terms, columns_of_shards = _merge_terms([shard.terms for shard in counted])
    if not len(terms):
        raise UserError(_without_terms(language))
    arrow_ids.write(folder / _TERMS, terms)
    sizes = np.zeros(len(terms), np.int64)
    for (path, _), shard, columns in zip(jobs, counted, columns_of_shards, strict=True):
        sizes[columns] += shard.sizes
        np.save(path / "columns.npy", columns)
        np.save(path / "starts.npy", np.concatenate([[0], np.cumsum(shard.sizes)]))
    lengths = np.concatenate([shard.lengths for shard in counted])
    np.save(counts / _NORMS, K1 * ((1 - B) + B * lengths / lengths.mean()))
    first_rows = np.cumsum([0, *(len(shard.lengths) for shard in counted)])[:-1].tolist()
    parts = [(path, row) for (path, _), row in zip(jobs, first_rows, strict=True)]
    del counted, columns_of_shards, terms, lengths

    (folder / "bm25").mkdir()
    starts = np.concatenate([[0], np.cumsum(sizes)])
    np.save(folder / _STARTS, starts)
    for name, dtype in ((_ROWS, np.int32), (_SCORES, np.float32)):
        with (folder / name).open("wb") as file:
            npy.begin(file, dtype, (int(starts[-1]),))
            file.truncate(file.tell() + int(starts[-1]) * np.dtype(dtype).itemsize)  # jobs fill it in
    merge = functools.partial(_merge_columns, folder, counts / _NORMS, parts)
    parallel.map_jobs(merge, [*_blocks(starts)], "BM25: scoring")


def _without_terms(language: str | None) -> str:
    if language is None:
        return "make_index: no passage has a term: the texts hold no letter or digit: import others"
    return (
        f"make_index.language: no passage has a term in {language!r} but stop words: "
        "index them as they are: --gin.make_index.language=None"
    )


@dataclasses.dataclass(frozen=True)
class _Counted:
    """What is known of a shard whose counts are on disk.

    Attributes:
      terms: its C terms, in order.
      sizes: int64 C, the number of its passages that have each term.
      lengths: int64, the number of terms of each of its passages, with repetitions.
    """

    terms: pa.LargeStringArray
    sizes: np.ndarray
    lengths: np.ndarray


def _count(language: str | None, job: tuple[Path, TextShard]) -> _Counted:
    """Counts the terms of a shard; writes rows and counts, in the order of the terms, then of the rows."""
    folder, texts = job
    analyze = analyzer(language)
    number_of: dict[str, int] = defaultdict(itertools.count().__next__)
    numbers, counts, lengths, distinct = array("i"), array("i"), array("q"), array("i")
    for text in texts():
        terms = analyze(text)
        found = Counter(terms)
        numbers.extend(map(number_of.__getitem__, found))
        counts.extend(found.values())
        lengths.append(len(terms))
        distinct.append(len(found))
    terms = sorted(number_of)
    place_of = np.zeros(len(terms), np.int64)
    place_of[[number_of[term] for term in terms]] = np.arange(len(terms))
    places = place_of[np.asarray(numbers)]
    # The order by term, then row. To sort keys that end in the position is faster than a stable argsort.
    keys = (places << 32) | np.arange(len(places))
    keys.sort()
    order = keys & 0xFFFFFFFF
    folder.mkdir(parents=True)
    rows = np.repeat(np.arange(len(lengths), dtype=np.int32), np.asarray(distinct))
    np.save(folder / "rows.npy", rows[order])
    counts = np.asarray(counts)
    np.save(folder / "counts.npy", counts[order].astype(np.min_scalar_type(counts.max(initial=0))))
    sizes = np.bincount(places, minlength=len(terms))
    return _Counted(arrow_ids.array(terms), sizes, np.array(lengths, np.int64))


def _merge_terms(parts: Sequence[pa.LargeStringArray]) -> tuple[pa.LargeStringArray, list[np.ndarray]]:
    """Returns all terms in order, and for each part the places of its terms in them (int32, ascending)."""
    together = arrow_ids.array(pa.chunked_array(parts, pa.large_string())).dictionary_encode()
    order = pc.sort_indices(together.dictionary)
    place_of = np.zeros(len(order), np.int32)
    place_of[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    places = place_of[together.indices.to_numpy()]
    return together.dictionary.take(order), np.split(places, np.cumsum([*map(len, parts)])[:-1])


def _blocks(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields ranges of columns with at most BLOCK scores each, or of a single column."""
    first, end = 0, len(starts) - 1
    while first < end:
        after = int(np.searchsorted(starts, starts[first] + BLOCK, side="right")) - 1
        yield first, (first := max(after, first + 1))


def _merge_columns(
    folder: Path, norms: Path, parts: Sequence[tuple[Path, int]], block: tuple[int, int]
) -> None:
    """Computes the scores of a range of columns from the counts of all shards, and writes them.

    Args:
      folder: the folder of the index.
      norms: the file of the passages' norms.
      parts: for each shard the folder of its counts and its first row.
      block: the first column, and the one after the last.
    """
    first, end = block
    starts = np.load(folder / _STARTS, "r")[first : end + 1]
    base, total = int(starts[0]), int(starts[-1] - starts[0])
    free = starts[:-1] - base  # where the next score of each column goes
    rows, counts = np.empty(total, np.int32), np.empty(total, np.int32)
    for path, first_row in parts:
        columns = np.load(path / "columns.npy", "r")
        low, high = np.searchsorted(columns, block)
        if low == high:
            continue
        begins = np.load(path / "starts.npy", "r")[low : high + 1]
        part, sizes, columns = slice(begins[0], begins[-1]), np.diff(begins), columns[low:high] - first
        places = np.repeat(free[columns] - begins[:-1], sizes) + np.arange(begins[0], begins[-1])
        rows[places] = np.load(path / "rows.npy", "r")[part] + first_row
        counts[places] = np.load(path / "counts.npy", "r")[part]
        free[columns] += sizes
    norms_N = np.load(norms, "r")
    sizes = np.diff(starts)
    scores = counts / (norms_N[rows] + counts)
    scores *= np.repeat(_inverse_frequencies(sizes, len(norms_N)), sizes)
    scores = scores.astype(np.float32)
    for name, values in ((_ROWS, rows), (_SCORES, scores)):
        offset = np.load(folder / name, "r").offset
        with (folder / name).open("r+b") as file:
            file.seek(offset + base * values.itemsize)
            file.write(values.data)


def _inverse_frequencies(sizes: np.ndarray, passages: int) -> np.ndarray:
    """Returns Lucene's inverse document frequency (float32) of terms that so many passages have."""
    return np.array([math.log(1 + (passages - n + 0.5) / (n + 0.5)) for n in sizes.tolist()], np.float32)
