"""Sorts docids lexicographically and counts the tokens that neighbours share, for tries and statistics."""

import numpy as np

_BLOCK = 1 << 16  # rows packed at a time: they stay in the processor's cache


def order(values_NxL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts rows of non-negative integers lexicographically.

    Millions of rows take seconds, because several columns are packed into one number and compared at once.

    Args:
      values_NxL: non-negative integers.

    Returns:
      (rows_N int64: the rows in lexicographic order; equal rows stay in the order in which they were;
      shared_N int16: how many leading values each row has in common with the row before it in that order; 0
      for the first, L if both are equal).
    """
    N, L = values_NxL.shape
    bits = max(int(values_NxL.max(initial=0)).bit_length(), 1)
    columns = min(64 // bits, L)
    key_N = _pack(values_NxL, slice(None), 0, columns, bits)
    rows_N = np.argsort(key_N, kind="stable")
    key_N = key_N[rows_N]
    shared_N = np.zeros(N, np.int16)
    shared_N[1:] = _equal_columns(key_N, columns, bits)
    first = columns
    while first < L:
        same_N = shared_N == first  # equal to the row before, in the columns compared so far
        tied = same_N.copy()
        tied[:-1] |= same_N[1:]
        tied = np.flatnonzero(tied)
        if not len(tied):
            break
        columns = min(64 // bits, L - first)
        key = _pack(values_NxL, rows_N[tied], first, columns, bits)
        again = np.lexsort((key, np.cumsum(~same_N[tied])))
        rows_N[tied] = rows_N[tied][again]
        equal = np.r_[0, _equal_columns(key[again], columns, bits)]
        inner = same_N[tied]
        shared_N[tied[inner]] = first + equal[inner]
        first += columns
    return rows_N, shared_N


def _pack(values_NxL: np.ndarray, rows, first: int, columns: int, bits: int) -> np.ndarray:
    """Packs `columns` values of each row, from column `first` on, side by side into a uint64."""
    count = len(values_NxL) if isinstance(rows, slice) else len(rows)
    key_N = np.zeros(count, np.uint64)
    for start in range(0, count, _BLOCK):
        at = slice(start, start + _BLOCK)
        block = values_NxL[at] if isinstance(rows, slice) else values_NxL[rows[at]]
        for column in range(first, first + columns):
            key_N[at] <<= np.uint64(bits)
            key_N[at] |= block[:, column].astype(np.uint64)
    return key_N


def _equal_columns(key_N: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """Counts the leading columns that each key shares with the one before it, int16, N - 1."""
    different = key_N[1:] ^ key_N[:-1]
    equal = np.zeros(len(different), np.int16)
    for column in range(columns):
        equal += different >> np.uint64(bits * (columns - 1 - column)) == 0
    return equal
