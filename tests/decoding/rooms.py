"""Room for all tries of a test file, so that one compilation serves them."""

import numpy as np

from retrieval_jax.decoding.trie import Trie


def room(tokens: int, rows: int, max_branching: tuple[int, ...], local_id_bits: int) -> Trie:
    """A trie of which only the shapes and bounds count: `build_trie` pads others to it.

    Args:
      tokens: tokens of a position, at most.
      rows: docids, at most; a multiple of 32.
      max_branching: see `Trie`, one number for each position.
      local_id_bits: see `Trie`.
    """
    length = len(max_branching)
    return Trie(
        token_LxI=np.zeros((length, tokens), np.int32),
        local_id_E=np.zeros(512, np.uint8),
        num_children_E=np.zeros(512, np.uint8),
        first_child_E=np.zeros(512, np.int32),
        suffixes=np.zeros(rows // 32 * length * local_id_bits, np.uint32),
        root_num_children=np.int32(0),
        max_branching=max_branching,
        suffix_start=0,
        local_id_bits=local_id_bits,
    )
