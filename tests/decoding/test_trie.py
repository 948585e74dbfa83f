import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from retrieval_jax.decoding import trie as trie_module
from retrieval_jax.decoding.trie import build_trie

EOS = 1


def tables(symbols):
    """Lists of docids of 1 to 5 tokens, each ended by EOS, so that none is a prefix of another."""
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
    """Follows the arrays from the root. Yields (prefix, child, num_children) of every node."""
    pending = [((), 0, int(trie.root_num_children))]
    while pending:
        prefix, child, num_children = pending.pop()
        yield prefix, child, num_children
        for edge in range(child, child + num_children):
            local_id, *node = (
                int(array[edge]) for array in (trie.local_id_E, trie.first_child_E, trie.num_children_E)
            )
            pending.append(((*prefix, int(trie.token_LxI[len(prefix), local_id])), *node))


def suffix(trie, row, first):
    """The tokens of a row from a position on, read bit by bit."""
    bits = np.unpackbits(trie.suffixes.view(np.uint8), bitorder="little")[row * trie.suffix_bits :]
    tokens = []
    for position in range(first, trie.length):
        at = (position - trie.suffix_start) * trie.local_id_bits
        local_id = sum(int(bit) << i for i, bit in enumerate(bits[at : at + trie.local_id_bits]))
        tokens.append(int(trie.token_LxI[position, local_id]))
    return tokens


def check(trie, row_N, table, until=0):
    """The trie holds exactly the docids of the table; before `until` single docids have edges too."""
    table = [(*docid, *[0] * (trie.length - len(docid))) for docid in table]
    assert [table[row] for row in row_N] == table
    assert row_N.tolist() == [table.index(docid) for docid in table]
    rows, used = set(), []
    for prefix, child, num_children in walk(trie):
        docids = below(table, prefix)
        if num_children:  # two or more docids: the edges `child`, `child` + 1, … are their next tokens
            assert len(docids) > 1 or len(prefix) < until
            edges = range(child, child + num_children)
            tokens = trie.token_LxI[len(prefix), trie.local_id_E[edges]].tolist()
            assert tokens == sorted({docid[len(prefix)] for docid in docids})
            assert 0 not in tokens or len(docids) == 1
            assert num_children <= trie.max_branching[len(prefix)]
            used += edges
        else:  # one docid: its row is `child`
            (docid,) = docids
            assert table[child] == docid
            assert len(prefix) >= trie.suffix_start
            assert suffix(trie, child, len(prefix)) == list(docid[len(prefix) :])
            rows.add(child)
    assert rows == set(row_N.tolist())
    assert sorted(used) == list(range(len(used)))  # no edge is stored in vain or belongs to two nodes


def test_the_example_of_four_docids():
    result = doctest.testmod(trie_module)
    assert (result.failed, result.attempted) == (0, 8)


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
    tokens[:, : length // 2] = tokens[rng.integers(0, min(count, 3), count), : length // 2]  # shared prefixes
    check(*build_trie(tokens.astype(np.uint16)), [tuple(row) for row in tokens.tolist()])


@given(TABLES, TABLES)
@settings(deadline=None)
def test_another_state_of_a_table_takes_the_shapes_of_the_first_where_it_fits(table, other):
    first, _ = build_trie(matrix(table))
    check(*build_trie(matrix(other), reuse_shapes_of=first), other, until=first.suffix_start)
    fewer = table[len(table) // 2 :]
    trie, row_N = build_trie(matrix(fewer), reuse_shapes_of=first)
    check(trie, row_N, fewer, until=first.suffix_start)
    assert shapes(trie) == shapes(first)


@given(TABLES)
@settings(deadline=None)
def test_max_branching_is_the_widest_rounded_up_by_an_eighth(table):
    widest = [1] * max(map(len, table))
    for docid in table:
        for depth in range(len(docid)):
            tokens = {other[depth] for other in below(table, docid[:depth])}
            widest[depth] = max(widest[depth], len(tokens))
    max_branching = build_trie(matrix(table))[0].max_branching
    assert len(max_branching) == len(widest)
    for bound, most in zip(max_branching, widest, strict=True):
        assert most <= bound <= max(most, most * 9 / 8)


@given(TABLES, st.data())
@settings(deadline=None)
def test_a_docid_that_is_a_prefix_of_another_is_refused(table, data):
    longer = data.draw(st.sampled_from(table))
    assume(len(longer) > 1)
    beginning = longer[: data.draw(st.integers(1, len(longer) - 1))]
    at = data.draw(st.integers(0, len(table)))
    with pytest.raises(ValueError, match="prefix of another"):
        build_trie(matrix([*table[:at], beginning, *table[at:]]))


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
    edges = sum(num_children for _, _, num_children in walk(trie))
    assert edges < len(trie.local_id_E) <= 1.02 * edges
    bits = 4 * (
        table.shape[1] - trie.suffix_start
    )  # of ten digits, the end and padding: at most 16 local ids
    assert len(table) * bits <= trie.suffixes.size * 32 <= 1.02 * len(table) * bits
    assert len(set(row_N.tolist())) == len({tuple(row) for row in table.tolist()})


@pytest.mark.parametrize("children", [2, 255, 256, 257, 65_535, 65_536])
def test_an_edge_holds_any_number_of_children_and_its_local_id(children):
    last = np.arange(1, 1 + children)
    trie, _ = build_trie(np.stack([np.repeat([1, 2], children), np.tile(last, 2)], axis=1))
    assert trie.num_children_E[:2].tolist() == [children, children]
    child = trie.first_child_E[1]
    assert (trie.token_LxI[1][trie.local_id_E[child : child + children]] == last).all()


@given(
    st.integers(1, 2**31 - 1),
    st.integers(1, 64),
    st.integers(1, 16),
    st.data(),
)
@example(138_364_198, 31, 11, None)  # MS MARCO v2, 32 codes of 2,048
@settings(deadline=None, max_examples=50)
def test_no_place_in_the_suffixes_overflows_in_tables_that_are_accepted(rows, positions, bits, data):
    """Of the last row, and of any: in int32 as in Python's integers, which do not overflow."""
    row_bits = positions * bits
    words = -(-rows // 32) * row_bits
    if max(rows, 2 * rows, words) > 2**31 - 2**16:
        with pytest.raises(ValueError, match="that a search counts in 32 bits"):
            trie_module.check_sizes(rows, 2 * rows, words)
        return
    trie_module.check_sizes(rows, 2 * rows, words)
    nothing = np.zeros(1, np.uint32)
    trie = trie_module.Trie(*[nothing] * 6, (1,) * (positions + 1), suffix_start=1, local_id_bits=bits)
    for row in (rows - 1, data.draw(st.integers(0, rows - 1)) if data else 0):
        for position in (1, positions):
            word, bit = trie.suffix_place(jnp.int32(row), position)
            at = row * row_bits + (position - 1) * bits
            assert (int(word), int(bit)) == divmod(at, 32)


def test_ms_marco_v2_is_accepted_and_what_overflows_is_refused():
    passages = 138_364_198
    trie_module.check_sizes(passages, 2 * passages, -(-passages // 32) * 31 * 8)  # 32 codes of 256
    with pytest.raises(ValueError, match=r"2,317,600,752 words of suffixes are more than the 2,147,418,112"):
        trie_module.check_sizes(passages, 2 * passages, -(-passages // 32) * 67 * 8)
