"""Residual quantisation: codes that come back as vectors, numbers for passages with the same codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core.errors import UserError
from retrieval_jax.docids import clustering, residual
from retrieval_jax.docids.kinds import digits_needed
from retrieval_jax.docids.residual import Codebooks, Settings


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def books(vectors: np.ndarray) -> Codebooks:
    return residual.fit_codebooks(vectors, 4, 16, 0)


def test_codes_stand_for_the_vectors_ever_better(vectors: np.ndarray, books: Codebooks):
    codes, errors = books.encode(vectors)
    assert codes.shape == (2000, 4)
    assert codes.dtype == np.uint8
    assert books.sizes_L.tolist() == [16] * 4
    assert (np.diff(errors) < 0).all()
    np.testing.assert_allclose(errors[0], (vectors**2).sum(-1).mean(), rtol=1e-4)
    decoded = books.vectors_LxVxE[np.arange(codes.shape[1]), codes].sum(1)
    np.testing.assert_allclose(((vectors - decoded) ** 2).sum(-1).mean(), errors[-1], rtol=1e-3)
    assert errors[-1] < 0.3 * errors[0]


def test_each_code_is_the_nearest_to_what_is_left(vectors: np.ndarray, books: Codebooks):
    codes, _ = books.encode(vectors[:100])
    left = vectors[:100].copy()
    for level, book in enumerate(books.vectors_LxVxE):
        chosen = ((left - book[codes[:, level]]) ** 2).sum(-1)
        np.testing.assert_allclose(
            chosen, ((left[:, None] - book) ** 2).sum(-1).min(-1), rtol=1e-4, atol=1e-5
        )
        left -= book[codes[:, level]]


def test_encoding_streams_and_takes_rows(vectors, books, monkeypatch: pytest.MonkeyPatch):
    whole, _ = books.encode(vectors)
    rows = np.array([5, 3, 1999, 3])
    assert np.array_equal(books.encode(vectors, rows)[0], whole[rows])
    monkeypatch.setattr(clustering, "BLOCK", 1 << 10)
    streamed, _ = books.encode(vectors)
    assert np.array_equal(streamed, whole)


def test_the_same_seed_repeats(vectors: np.ndarray, books: Codebooks):
    assert np.array_equal(residual.fit_codebooks(vectors, 4, 16, 0).vectors_LxVxE, books.vectors_LxVxE)


def test_any_seed_will_do(vectors: np.ndarray):
    assert residual.fit_codebooks(vectors[:50], 2, 4, (1 << 32) - 1).vectors_LxVxE.shape == (2, 4, 8)


def test_fewer_distinct_vectors_than_codes(vectors: np.ndarray):
    some = vectors[np.arange(500) % 3]
    books = residual.fit_codebooks(some, 2, 16, 0)
    assert books.sizes_L[0] == 3
    codes, errors = books.encode(some)
    assert len(np.unique(codes, axis=0)) == 3
    assert errors[-1] < 1e-9 * errors[0]


@given(st.integers(1, 60), st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_numbered_docids_are_distinct_and_come_back(count: int, levels: int, size: int, seed: int):
    codes = np.random.default_rng(seed).integers(0, size, (count, levels)).astype(np.uint8)
    numbers = residual.collision_indices(codes, codes[:0], np.zeros(0, np.int64))
    expected = [sum((codes[:row] == codes[row]).all(-1)) for row in range(count)]
    assert numbers.tolist() == expected
    digits = digits_needed(max(expected), size)
    assert size**digits > max(expected)
    assert digits == 0 or size ** (digits - 1) <= max(expected)
    tokens = residual.tokens(codes, numbers, digits, size)
    assert tokens.shape == (count, levels + digits)
    assert len(np.unique(tokens, axis=0)) == count
    position = (tokens.astype(int) - 2) // size
    assert (position == np.arange(levels + digits)).all()  # a position's tokens are its own
    assert tokens.max() < residual.output_size(levels + digits, size)
    again, numbers_again = residual.codes(tokens, levels, size)
    assert np.array_equal(again, codes)
    assert np.array_equal(numbers_again, numbers)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_numbers_go_on(old_count: int, new_count: int, seed: int):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, (old_count + new_count, 2)).astype(np.uint8)
    numbers = residual.collision_indices(codes, codes[:0], np.zeros(0, np.int64))
    there = rng.random(old_count) < 0.7  # the others went before
    old, old_numbers = codes[:old_count][there], numbers[:old_count][there]
    new = residual.collision_indices(codes[old_count:], old, old_numbers)
    for row, number in enumerate(new):
        same = (old == codes[old_count + row]).all(-1)
        before = (codes[old_count : old_count + row] == codes[old_count + row]).all(-1).sum()
        assert number == old_numbers[same].max(initial=-1) + 1 + before


def test_codebooks_come_back_and_broken_ones_are_told(books: Codebooks, tmp_path):
    books.write(tmp_path)
    again = Codebooks.open(tmp_path)
    assert np.array_equal(again.vectors_LxVxE, books.vectors_LxVxE)
    assert np.array_equal(again.sizes_L, books.sizes_L)
    (tmp_path / residual.FILE).write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot be read.*without EXTENDS"):
        Codebooks.open(tmp_path)
    with pytest.raises(UserError, match=r"residual\.shared_codes: no way 'drop'"):
        Settings("drop")
