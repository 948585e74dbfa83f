import itertools

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from retrieval_jax.decoding.trie import build_trie

EOS = 1


def tables(symbols):
    """Lists of docids of 1 to 5 tokens, each ended by EOS, so that none is the beginning of another."""
    docid = st.lists(st.integers(2, 1 + symbols), max_size=4).map(lambda tokens: (*tokens, EOS))
    return st.lists(docid, min_size=1, max_size=40)


TABLES = st.sampled_from([1, 2, 3, 30]).flatmap(tables)


def matrix(docids):
    """Docids as rows, padded with 0."""
    return np.array(list(zip(*itertools.zip_longest(*docids, fillvalue=0), strict=True)), np.int32)


def below(docids, prefix):
    """The docids that begin with a prefix."""
    return {docid for docid in docids if docid[: len(prefix)] == prefix}


def walk(trie):
    """Follows the arrays from the root. Yields (prefix, child, degree) of every node."""
    pending = [((), 0, int(trie.root_degree))]
    while pending:
        prefix, child, degree = pending.pop()
        yield prefix, child, degree
        for edge in range(child, child + degree):
            token, *node = (
                int(array[edge]) for array in (trie.edge_token_E, trie.edge_child_E, trie.edge_degree_E)
            )
            pending.append(((*prefix, token), *node))


@given(TABLES)
@example([(EOS,)])
@example([(2, 3, 4, EOS)])
@example([(2, EOS), (2, EOS), (2, EOS)])
@example([(first, 2, EOS) for first in range(2, 40)])
@example([(2, 3, 2, 3, EOS), (2, 3, 2, 2, EOS), (2, 3, 2, EOS), (2, 3, EOS)])
@settings(deadline=None)
def test_the_arrays_hold_exactly_the_docids(table):
    trie, docid_N = build_trie(matrix(table))
    row_of, used = {}, []
    for prefix, child, degree in walk(trie):
        docids = below(table, prefix)
        if degree:  # two or more docids: the edges `child`, `child` + 1, … are their next tokens
            assert len(docids) > 1
            edges = range(child, child + degree)
            tokens = trie.edge_token_E[edges].tolist()
            assert sorted(tokens) == sorted({docid[len(prefix)] for docid in docids})
            used += edges
        else:  # one docid: its row is `child`
            (docid,) = docids
            length = len(docid)
            assert np.count_nonzero(trie.tokens_NxL[child]) == length
            assert (*trie.tokens_NxL[child, :length].tolist(),) == docid
            assert not trie.tokens_NxL[child, length:].any()
            row_of[docid] = child
    assert row_of.keys() == set(table)
    assert [row_of[docid] for docid in table] == docid_N.tolist()
    assert sorted(used) == list(range(len(used)))  # no edge is stored in vain or belongs to two nodes


@given(TABLES)
@settings(deadline=None)
def test_fanouts_are_the_widest_rounded_up_to_a_power_of_two(table):
    widest = [1] * max(map(len, table))
    for docid in table:
        for depth in range(len(docid)):
            tokens = {other[depth] for other in below(table, docid[:depth])}
            widest[depth] = max(widest[depth], len(tokens))
    fanouts = build_trie(matrix(table))[0].fanouts
    assert len(fanouts) == len(widest)
    for fanout, most in zip(fanouts, widest, strict=True):
        assert fanout.bit_count() == 1
        assert fanout / 2 < most <= fanout


@given(TABLES, st.data())
@settings(deadline=None)
def test_a_docid_that_is_the_beginning_of_another_is_refused(table, data):
    longer = data.draw(st.sampled_from(table))
    assume(len(longer) > 1)
    beginning = longer[: data.draw(st.integers(1, len(longer) - 1))]
    at = data.draw(st.integers(0, len(table)))
    with pytest.raises(ValueError, match="beginning of another"):
        build_trie(matrix([*table[:at], beginning, *table[at:]]))


@pytest.mark.parametrize("wrong", [(), (0, EOS), (2, 0, EOS), (2, 0, 0, EOS)])
@pytest.mark.parametrize("others", [[], [(2, 3, EOS)], [(3, 2, 2, 2, EOS), (2, EOS)]])
def test_empty_docids_and_zeros_inside_are_refused(wrong, others):
    tokens = np.zeros((1 + len(others), 5), np.int32)
    for row, docid in zip(tokens, [wrong, *others], strict=True):
        row[: len(docid)] = docid
    with pytest.raises(ValueError, match="empty or has a 0"):
        build_trie(tokens)


def random_table(count, seed):
    """Random docids of four tokens of ten, then EOS."""
    tokens = np.random.default_rng(seed).integers(2, 12, (count, 4)).astype(np.int32)
    return np.c_[tokens, np.full(count, EOS, np.int32)]


def test_a_table_of_similar_size_has_arrays_of_the_same_shapes():
    tries = [build_trie(random_table(count, seed=count))[0] for count in (1000, 1010)]
    tables = [trie.tokens_NxL[trie.tokens_NxL[:, 0] > 0].tolist() for trie in tries]
    assert len(tables[0]) != len(tables[1])
    assert jax.tree.structure(tries[0]) == jax.tree.structure(tries[1])  # the fan-outs too
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype), trie) for trie in tries]
    assert kinds[0] == kinds[1]


def test_padding_is_at_most_a_quarter():
    trie, _ = build_trie(random_table(5000, seed=0))
    docids = np.count_nonzero(trie.tokens_NxL[:, 0])
    edges = np.count_nonzero(trie.edge_token_E)
    assert docids <= len(trie.tokens_NxL) <= 1.25 * docids
    assert edges < len(trie.edge_token_E) <= 1.25 * edges
