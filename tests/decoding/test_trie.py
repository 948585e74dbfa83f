import itertools

import jax
import jax.numpy as jnp
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
            symbol, *node = (int(array[edge]) for array in (trie.symbol_E, trie.child_E, trie.degree_E))
            pending.append(((*prefix, int(trie.token_LxS[len(prefix), symbol])), *node))


def tail(trie, row, first):
    """The tokens of a row from a position on, read bit by bit."""
    bits = np.unpackbits(trie.tails.view(np.uint8), bitorder="little")[row * trie.row_bits :]
    tokens = []
    for position in range(first, trie.length):
        at = (position - trie.tail_from) * trie.symbol_bits
        symbol = sum(int(bit) << i for i, bit in enumerate(bits[at : at + trie.symbol_bits]))
        tokens.append(int(trie.token_LxS[position, symbol]))
    return tokens


def check(trie, row_N, table, until=0):
    """The trie holds exactly the docids of the table; before `until` single docids have edges too."""
    table = [(*docid, *[0] * (trie.length - len(docid))) for docid in table]
    assert [table[row] for row in row_N] == table
    assert row_N.tolist() == [table.index(docid) for docid in table]
    rows, used = set(), []
    for prefix, child, degree in walk(trie):
        docids = below(table, prefix)
        if degree:  # two or more docids: the edges `child`, `child` + 1, … are their next tokens
            assert len(docids) > 1 or len(prefix) < until
            edges = range(child, child + degree)
            tokens = trie.token_LxS[len(prefix), trie.symbol_E[edges]].tolist()
            assert tokens == sorted({docid[len(prefix)] for docid in docids})
            assert 0 not in tokens or len(docids) == 1
            assert degree <= trie.fanouts[len(prefix)]
            used += edges
        else:  # one docid: its row is `child`
            (docid,) = docids
            assert table[child] == docid
            assert len(prefix) >= trie.tail_from
            assert tail(trie, child, len(prefix)) == list(docid[len(prefix) :])
            rows.add(child)
    assert rows == set(row_N.tolist())
    assert sorted(used) == list(range(len(used)))  # no edge is stored in vain or belongs to two nodes


@given(TABLES)
@example([(EOS,)])
@example([(2, 3, 4, EOS)])
@example([(2, EOS), (2, EOS), (2, EOS)])
@example([(first, 2, EOS) for first in range(2, 40)])
@example([(2, 3, 2, 3, EOS), (2, 3, 2, 2, EOS), (2, 3, 2, EOS), (2, 3, EOS)])
@settings(deadline=None)
def test_the_arrays_hold_exactly_the_docids(table):
    check(*build_trie(matrix(table)), table)


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([2, 3, 5, 60, 2048]), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_docids_of_one_length_need_no_end(count, length, values, seed):
    """As residual-quantised ones; many tokens a row, so that their bits cross words and rows cross keys."""
    rng = np.random.default_rng(seed)
    tokens = 1 + np.arange(length) * values + rng.integers(0, values, (count, length))
    tokens[:, : length // 2] = tokens[
        rng.integers(0, min(count, 3), count), : length // 2
    ]  # shared beginnings
    check(*build_trie(tokens.astype(np.uint16)), [tuple(row) for row in tokens.tolist()])


@given(TABLES, TABLES)
@settings(deadline=None)
def test_another_state_of_a_table_takes_the_shapes_of_the_first_where_it_fits(table, other):
    first, _ = build_trie(matrix(table))
    check(*build_trie(matrix(other), like=first), other, until=first.tail_from)
    fewer = table[len(table) // 2 :]
    trie, row_N = build_trie(matrix(fewer), like=first)
    check(trie, row_N, fewer, until=first.tail_from)
    assert shapes(trie) == shapes(first)


@given(TABLES)
@settings(deadline=None)
def test_fanouts_are_the_widest_rounded_up_by_an_eighth(table):
    widest = [1] * max(map(len, table))
    for docid in table:
        for depth in range(len(docid)):
            tokens = {other[depth] for other in below(table, docid[:depth])}
            widest[depth] = max(widest[depth], len(tokens))
    fanouts = build_trie(matrix(table))[0].fanouts
    assert len(fanouts) == len(widest)
    for fanout, most in zip(fanouts, widest, strict=True):
        assert most <= fanout <= max(most, most * 9 / 8)


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


def shapes(trie):
    """All that a compiled search depends on."""
    return jax.tree.structure(trie), jax.tree.map(lambda a: (np.shape(a), np.asarray(a).dtype), trie)


def test_a_table_of_similar_size_has_arrays_of_the_same_shapes():
    tables = [random_table(count, seed=0) for count in (5000, 5010)]
    tries = [build_trie(table)[0] for table in tables]
    assert shapes(tries[0]) == shapes(tries[1])


def test_padding_is_at_most_two_percent():
    table = random_table(20_000, seed=0)
    trie, row_N = build_trie(table)
    edges = sum(degree for _, _, degree in walk(trie))
    assert edges < len(trie.symbol_E) <= 1.02 * edges
    bits = 4 * (table.shape[1] - trie.tail_from)  # of ten digits, the end and padding: at most 16 symbols
    assert len(table) * bits <= trie.tails.size * 32 <= 1.02 * len(table) * bits
    assert len(set(row_N.tolist())) == len({tuple(row) for row in table.tolist()})


@pytest.mark.parametrize("children", [2, 255, 256, 257, 65_535, 65_536])
def test_an_edge_holds_any_number_of_children_and_its_symbol(children):
    last = np.arange(1, 1 + children)
    trie, _ = build_trie(np.stack([np.repeat([1, 2], children), np.tile(last, 2)], axis=1))
    assert trie.degree_E[:2].tolist() == [children, children]
    child = trie.child_E[1]
    assert (trie.token_LxS[1][trie.symbol_E[child : child + children]] == last).all()


def test_more_tokens_at_a_position_than_an_edge_can_hold_are_refused():
    tokens = np.stack([np.arange(1, 65_538), np.full(65_537, 1)], axis=1)
    with pytest.raises(ValueError, match=r"65537 tokens at one position"):
        build_trie(tokens)


@pytest.mark.parametrize(("length", "values"), [(3, 2), (8, 5), (8, 256), (7, 2048), (2, 65_000), (33, 256)])
def test_the_search_reads_the_bits_that_were_written(length, values):
    tokens = np.random.default_rng(0).integers(1, 1 + values, (1000, length))
    trie = jax.device_put(build_trie(tokens)[0])
    rows = jnp.arange(len(tokens))
    read = jax.jit(lambda trie, rows, position: trie.token_LxS[position][trie.tail_symbol(rows, position)])
    for position in range(trie.tail_from, length):
        assert read(trie, rows, position).tolist() == tokens[:, position].tolist()
