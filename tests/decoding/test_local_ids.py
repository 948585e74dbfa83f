"""The numbering of tokens and the packing of bits: what a trie refuses, and what a search reads of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_jax.decoding.trie import build_trie

EOS = 1


@pytest.mark.parametrize("wrong", [(), (0, EOS), (2, 0, EOS), (2, 0, 0, EOS)])
@pytest.mark.parametrize("others", [[], [(2, 3, EOS)], [(3, 2, 2, 2, EOS), (2, EOS)]])
def test_empty_docids_and_zeros_inside_are_refused(wrong, others):
    tokens = np.zeros((1 + len(others), 5), np.int32)
    for row, docid in zip(tokens, [wrong, *others], strict=True):
        row[: len(docid)] = docid
    with pytest.raises(ValueError, match="empty or has a 0"):
        build_trie(tokens)


def test_no_docids_are_refused():
    with pytest.raises(ValueError, match="there are no docids"):
        build_trie(np.zeros((0, 3), np.int32))


def test_more_tokens_at_a_position_than_an_edge_can_hold_are_refused():
    tokens = np.stack([np.arange(1, 65_538), np.full(65_537, 1)], axis=1)
    with pytest.raises(ValueError, match=r"65537 tokens at one position"):
        build_trie(tokens)


@pytest.mark.parametrize(("length", "values"), [(3, 2), (8, 5), (8, 256), (7, 2048), (2, 65_000), (33, 256)])
def test_the_search_reads_the_bits_that_were_written(length, values):
    tokens = np.random.default_rng(0).integers(1, 1 + values, (1000, length))
    trie = jax.device_put(build_trie(tokens)[0])
    rows = jnp.arange(len(tokens))
    read = jax.jit(
        lambda trie, rows, position: trie.token_LxI[position][trie.suffix_local_id(rows, position)]
    )
    for position in range(trie.suffix_start, length):
        assert read(trie, rows, position).tolist() == tokens[:, position].tolist()
