"""The tree of clusters and the docids that it gives."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core.errors import UserError
from retrieval_jax.docids import clustering, semantic
from retrieval_jax.docids.semantic import Settings, Tree


def vectors_of(count: int, seed: int = 0, dimensions: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)


def docids(vectors: np.ndarray, clusters_per_node: int, leaf_size: int, two_d: bool = False, seed: int = 0):
    """(tree, leaf of each row, docids as lists of tokens without padding)."""
    tree, leaves = semantic.grow(vectors, Settings(clusters_per_node, leaf_size), seed)
    tokens = semantic.tokens(tree, leaves, tree.take_leaf_indices(leaves), clusters_per_node, two_d)
    return tree, leaves, [row[row > 0].tolist() for row in tokens]


@given(st.integers(1, 128), st.sampled_from([2, 10]), st.integers(1, 60), st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_invariants(count: int, clusters_per_node: int, leaf_size: int, seed: int):
    tree, leaves, found = docids(vectors_of(count, seed), clusters_per_node, leaf_size)
    assert len({tuple(docid) for docid in found}) == count
    texts = sorted(bytes(docid) for docid in found)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(texts))  # no prefix of another
    assert all(docid[-1] == 1 and all(2 <= t < 2 + clusters_per_node for t in docid[:-1]) for docid in found)
    assert np.bincount(leaves).max() <= leaf_size
    assert (tree.children_M[leaves] == 0).all()
    assert (tree.children_M <= clusters_per_node).all()
    assert (tree.children_M != 1).all()
    assert tree.next_index_M.sum() == count


def test_a_docid_is_the_path_then_the_number_in_row_order():
    vectors = vectors_of(300)
    tree, leaves, found = docids(vectors, 10, 20)
    paths, depths = tree.paths()
    seen = {}
    for leaf, docid in zip(leaves.tolist(), found, strict=True):
        node = 0
        for token in docid[: depths[leaf]]:
            node = tree.first_child_M[node] + token - 2
        assert node == leaf
        assert (paths[leaf, : depths[leaf]] + 2).tolist() == docid[: depths[leaf]]
        number = seen[leaf] = seen.get(leaf, -1) + 1
        assert [t - 2 for t in docid[depths[leaf] : -1]] == [int(digit) for digit in str(number)]


def test_rows_are_in_the_cluster_of_the_nearest_centroid():
    vectors = vectors_of(500)
    tree, leaves, _ = docids(vectors, 4, 30)
    assert np.array_equal(tree.descend(vectors, np.arange(500)), leaves)
    centroid = [vectors[leaves == leaf].mean(0) for leaf in np.unique(leaves)]
    np.testing.assert_allclose(tree.centroids_MxE[np.unique(leaves)], centroid, atol=0.5)


def test_two_dimensional_docids_have_the_same_digits():
    vectors = vectors_of(300)
    _, _, flat = docids(vectors, 10, 20)
    _, _, two_d = docids(vectors, 10, 20, two_d=True)
    for a, b in zip(flat, two_d, strict=True):
        assert b == [token + 10 * position for position, token in enumerate(a[:-1])] + [1]
    longest = max(map(len, flat))
    assert max(map(max, two_d)) < semantic.output_size(longest, 10, True)
    assert semantic.output_size(longest, 10, False) == 128


def test_the_same_seed_repeats():
    vectors = vectors_of(300)
    assert docids(vectors, 10, 20)[2] == docids(vectors, 10, 20)[2]
    assert docids(vectors, 10, 20)[2] != docids(vectors, 10, 20, seed=1)[2]


def test_duplicates_are_a_leaf_however_many():
    vectors = vectors_of(200)
    vectors[50:] = vectors[0]
    _, leaves, found = docids(vectors, 10, 20)
    assert len({tuple(docid) for docid in found}) == 200
    assert len(set(leaves[50:])) == 1
    assert np.bincount(leaves).max() >= 150
    sizes = np.bincount(leaves)
    assert (np.sort(sizes)[:-1] <= 20).all()


def test_a_small_collection_is_one_leaf():
    tree, leaves, found = docids(vectors_of(12), 10, 100)
    assert len(tree.children_M) == 1
    assert found == [[2 + int(digit) for digit in str(number)] + [1] for number in range(12)]
    assert not leaves.any()


def test_streaming_equals_in_memory(monkeypatch: pytest.MonkeyPatch):
    vectors = vectors_of(9000)
    _, _, kept = docids(vectors, 10, 500)
    # The root exceeds the memory, its children do not.
    monkeypatch.setattr(clustering, "IN_MEMORY_BYTES", 4 * 8 * 5000)
    _, _, streamed = docids(vectors, 10, 500)
    assert kept == streamed


def test_new_passages_descend_the_tree_and_take_the_next_numbers(tmp_path):
    vectors = vectors_of(300)
    tree, leaves, found = docids(vectors, 10, 20)
    tree.write(tmp_path)
    again = Tree.open(tmp_path)
    assert np.array_equal(again.next_index_M, np.bincount(leaves, minlength=len(tree.next_index_M)))
    added = np.concatenate([vectors[:100], vectors_of(100, seed=9)])
    leaf = again.descend(added, np.arange(200))
    assert np.array_equal(leaf[:100], leaves[:100])
    tokens = semantic.tokens(again, leaf, again.take_leaf_indices(leaf), 10, False)
    new = [tuple(row[row > 0].tolist()) for row in tokens]
    assert len({*new, *map(tuple, found)}) == 500
    assert again.next_index_M.sum() == 500


def test_broken_trees_and_settings_are_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read.*without EXTENDS"):
        Tree.open(tmp_path)
    (tmp_path / semantic.FILE).write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot be read.*without EXTENDS"):
        Tree.open(tmp_path)
    with pytest.raises(UserError, match=r"semantic\.clusters_per_node: 1 is too few"):
        Settings(clusters_per_node=1)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(2, 12))
def test_count_digits(numbers: list[int], base: int):
    for number, count in zip(numbers, semantic.count_digits(np.array(numbers), base).tolist(), strict=True):
        assert number < base**count
        assert number >= base ** (count - 1) or (number, count) == (0, 1)
