"""Sorts docids lexicographically and counts the tokens that neighbours share, for tries and statistics."""

from collections.abc import Iterator

import numpy as np

_BLOCK = 1 << 16  # rows packed at a time: they stay in the processor's cache
_PART = 1 << 22  # rows sorted at a time, if their first values differ: 32 bytes each beside the results


def order(values_NxL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts rows of non-negative integers lexicographically.

    Millions of rows take seconds, because several columns are packed into one number and compared at once.
    Rows are sorted in parts, by ranges of their first values, so that little more than the results is held.

    Args:
      values_NxL: non-negative integers, less than 2^31 rows.

    Returns:
      (rows_N int32: the rows in lexicographic order; equal rows stay in the order in which they were;
      shared_N int16: how many leading values each row has in common with the row before it in that order; 0
      for the first, L if both are equal).
    """
    N = len(values_NxL)
    bits = max(int(values_NxL.max(initial=0)).bit_length(), 1)
    rows_N, shared_N, done = np.empty(N, np.int32), np.empty(N, np.int16), 0
    for part in _parts(values_NxL[:, 0], max(bits - 16, 0)):
        at = slice(done, done + len(part))
        rows_N[at], shared_N[at] = _order_part(values_NxL, part, bits)
        done += len(part)
    return rows_N, shared_N


def _parts(first_N: np.ndarray, shift: int) -> Iterator[np.ndarray]:
    """Yields the rows of each range of first values: at most _PART, unless more have the same first value.

    Args:
      first_N: the first value of each row.
      shift: the low bits of a value that are left out: rows that differ in these alone stay together.
    """
    value_N, counts = np.empty(len(first_N), np.uint16), np.zeros(1 << 16, np.int64)
    for start in range(0, len(first_N), _BLOCK):
        at = slice(start, start + _BLOCK)
        value_N[at] = first_N[at] >> shift
        counts += np.bincount(value_N[at], minlength=len(counts))
    after = np.cumsum(counts)  # rows up to each value
    begin = done = 0
    while done < len(value_N):
        end = max(int(np.searchsorted(after, done + _PART, side="right")), begin + 1)
        rows = np.flatnonzero((value_N >= begin) & (value_N <= end - 1))
        if len(rows):
            yield rows.astype(np.int32)
        begin, done = end, done + len(rows)


def _order_part(values_NxL: np.ndarray, part_M: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts some rows; see `order`.

    Args:
      values_NxL: all rows.
      part_M: those to sort, ascending.
      bits: of a value.
    """
    M, L = len(part_M), values_NxL.shape[1]
    columns = min(64 // bits, L)
    key_M = _pack(values_NxL, part_M, 0, columns, bits)
    sorted_M = np.argsort(key_M, kind="stable")
    key_M, rows_M = key_M[sorted_M], part_M[sorted_M]
    shared_M = np.zeros(M, np.int16)
    shared_M[1:] = _equal_columns(key_M, columns, bits)
    del key_M, sorted_M
    first = columns
    while first < L:
        same_M = shared_M == first  # equal to the row before, in the columns compared so far
        tied = same_M.copy()
        tied[:-1] |= same_M[1:]
        tied = np.flatnonzero(tied)
        if not len(tied):
            break
        columns = min(64 // bits, L - first)
        key = _pack(values_NxL, rows_M[tied], first, columns, bits)
        again = np.lexsort((key, np.cumsum(~same_M[tied])))
        rows_M[tied] = rows_M[tied][again]
        equal = np.r_[0, _equal_columns(key[again], columns, bits)]
        inner = same_M[tied]
        shared_M[tied[inner]] = first + equal[inner]
        first += columns
    return rows_M, shared_M


def _pack(values_NxL: np.ndarray, rows: np.ndarray, first: int, columns: int, bits: int) -> np.ndarray:
    """Packs `columns` values of some rows, from column `first` on, side by side into a uint64."""
    key = np.zeros(len(rows), np.uint64)
    for start in range(0, len(rows), _BLOCK):
        at = slice(start, start + _BLOCK)
        block = values_NxL[rows[at]]
        for column in range(first, first + columns):
            key[at] <<= np.uint64(bits)
            key[at] |= block[:, column].astype(np.uint64)
    return key


def _equal_columns(key_N: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """Counts the leading columns that each key shares with the one before it, int16, N - 1."""
    different = key_N[1:] ^ key_N[:-1]
    equal = np.zeros(len(different), np.int16)
    for column in range(columns):
        equal += different >> np.uint64(bits * (columns - 1 - column)) == 0
    return equal
