import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.decoding.order import order


@given(
    st.integers(1, 60),
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 200, 70_000, 2**31 - 1]),
    st.sampled_from([1, 2, 5]),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_order_is_pythons(count, length, values, sources, seed):
    """Rows that share long beginnings, so that they are told apart beyond the first 64 bits."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, values, (count, length))
    same = rng.integers(0, length + 1, count)  # as a source, up to there
    rows = np.where(
        np.arange(length) < same[:, None], rows[rng.integers(0, min(sources, count), count)], rows
    )
    found, shared = order(rows)
    expected = sorted(range(count), key=lambda row: (rows[row].tolist(), row))
    assert found.tolist() == expected
    for i, common in enumerate(shared.tolist()):
        if i == 0:
            assert common == 0
            continue
        before, row = rows[expected[i - 1]], rows[expected[i]]
        assert (before[:common] == row[:common]).all()
        assert common == length or before[common] != row[common]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_any_integers(dtype):
    rows = np.array([[3, 1], [2, 200], [3, 0]], dtype)
    assert order(rows)[0].tolist() == [1, 2, 0]
