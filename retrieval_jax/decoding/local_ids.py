"""Local ids: the tokens of docids, numbered position by position, and packed into as few bits as they need.

At each position docids use few of the model's tokens. A token's local id is its index among the tokens that
occur at that position. Letters in shapes: N rows of the docid table, L positions, T positions that are
packed.
"""

import math

import numpy as np

_BLOCK = 1 << 16  # rows worked on at a time: they stay in the processor's cache


def to_local_ids(tokens_NxL: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Numbers the tokens of each position.

    Args:
      tokens_NxL: docids of non-negative integers, padded with 0.

    Returns:
      (for each position, the tokens that occur there, ascending; the docids as local ids N×L, uint8 or
      uint16).

    Raises:
      ValueError: there are no docids, one is empty or has a 0 inside, or more than 65,536 tokens occur at one
        position.
    """
    N, L = tokens_NxL.shape
    if not N:
        raise ValueError("there are no docids")
    occurs_LxV = np.zeros((L, int(tokens_NxL.max()) + 1), bool)
    for first in range(0, N, _BLOCK):
        block = np.asarray(tokens_NxL[first : first + _BLOCK])
        is_token = block != 0
        if not is_token[:, 0].all() or (is_token[:, 1:] & ~is_token[:, :-1]).any():
            raise ValueError("a docid is empty or has a 0 (padding) inside")
        for position in range(L):
            occurs_LxV[position, block[:, position]] = True
    tokens_of = [np.flatnonzero(occurs_V) for occurs_V in occurs_LxV]
    largest = max(map(len, tokens_of))
    if largest > 1 << 16:
        raise ValueError(f"docids have {largest} tokens at one position: at most 65,536 can be searched")
    dtype = np.uint8 if largest <= 1 << 8 else np.uint16
    local_id_LxV = (np.cumsum(occurs_LxV, axis=1) - 1).astype(dtype)
    local_id_NxL = np.empty((N, L), dtype)
    for first in range(0, N, _BLOCK):
        block = np.asarray(tokens_NxL[first : first + _BLOCK])
        for position in range(L):
            local_id_NxL[first : first + _BLOCK, position] = local_id_LxV[position, block[:, position]]
    return tokens_of, local_id_NxL


def pack(local_id_NxT: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Packs the local ids of all rows one after another into uint32 words, `bits` bits each.

    Args:
      local_id_NxT: the local ids from the first position on that the suffixes hold.
      bits: of one local id.
      rows: how many rows there is to be space for; a multiple of 32.
    """
    N, T = local_id_NxT.shape
    row_bits = T * bits
    words = np.zeros(rows // 32 * row_bits, np.uint32)
    # After `period` rows the local ids lie at the same bits of the words again.
    period = 32 // math.gcd(row_bits, 32) if T else 1
    for first in range(0, N if T else 0, _BLOCK):
        block = local_id_NxT[first : first + _BLOCK].astype(np.uint32)
        block = np.pad(block, ((0, -len(block) % 32), (0, 0))).reshape(-1, period, T)
        start = first // 32 * row_bits
        out = words[start : start + block.size * bits // 32].reshape(len(block), -1)
        for row in range(period):
            for column in range(T):
                word, shift = divmod(row * row_bits + column * bits, 32)
                out[:, word] |= block[:, row, column] << np.uint32(shift)
                if shift + bits > 32:
                    out[:, word + 1] |= block[:, row, column] >> np.uint32(32 - shift)
    return words
