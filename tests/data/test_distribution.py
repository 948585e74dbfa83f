"""Distributions of scores: of numbers alone, and none where there are none."""

import math

import numpy as np
import pytest

from retrieval_jax.data.distribution import QUANTILES, describe, log_table


def test_numbers_alone_are_described(capsys):
    values = np.random.default_rng(0).normal(size=101)
    described = describe([math.nan, *values, math.nan])
    assert described.pop("count") == 101
    assert described.pop("mean") == pytest.approx(math.fsum(values) / 101)
    ordered = sorted(values)  # of 101 values, each of these quantiles is one of them
    assert described == {f"{q:.0%}": ordered[round(100 * q)] for q in QUANTILES}
    assert describe([]) == describe([math.nan]) == {}

    log_table({"some": describe([1.0, 3.0]), "none": {}}, "of two")
    title, head, row = capsys.readouterr().err.splitlines()
    assert title == "of two"
    assert head.split() == ["5%", "25%", "50%", "75%", "95%"]
    assert row.split() == ["some", "1.1", "1.5", "2", "2.5", "2.9"]
    assert [*map(len, (head, row))] == [61, 61]
    log_table({"none": {}}, "of none")
    assert capsys.readouterr().err == ""
