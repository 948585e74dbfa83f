"""The passages of a pool, and what an evaluation on it computes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.training.pool import EvaluationCost, pool_rows
from retrieval_jax.training.settings import TrainSettings


@pytest.fixture(scope="module")
def queries(collection):
    return collection.queries("dev")


def test_a_pool_has_the_positives_then_hard_passages_then_others(collection, queries):
    ids = collection.ids.to_pylist()
    positives = {ids.index(passage) for query in queries for passage in query.positives}
    judged = [row for row in range(len(ids)) if row not in positives][:4]
    asked = [dataclasses.replace(queries[0], negatives=tuple(ids[row] for row in judged[:2])), *queries[1:]]
    mined = {asked[1].id: ("not.in.the.collection", ids[judged[3]], ids[judged[2]])}
    size = len(positives) + 6

    rows = pool_rows(collection, asked, mined, size)
    assert len(rows) == len(set(rows.tolist())) == size
    assert rows.tolist() == sorted(rows.tolist())
    assert positives <= {*rows.tolist()}
    assert {*judged[:2], judged[3]} <= {*rows.tolist()}  # three of the six places: each query's hardest first
    np.testing.assert_array_equal(rows, pool_rows(collection, asked, mined, size))

    # Without hard ones all six are drawn. A smaller pool is a part of neither: only positives must be there.
    assert positives <= {*pool_rows(collection, queries, {}, size).tolist()}
    assert {*pool_rows(collection, queries, {}, 1).tolist()} == positives
    for size in (len(ids), len(ids) + 1):
        np.testing.assert_array_equal(pool_rows(collection, queries, {}, size), np.arange(len(ids)))


def test_what_is_drawn_is_spread_over_the_collection_and_depends_on_it_alone(collection):
    class Other:
        passage_count, fingerprint = 10_000, "another"

    rows = pool_rows(Other, [], {}, 2_000)
    assert len(set(rows.tolist())) == 2_000
    counts = np.histogram(rows, bins=10, range=(0, 10_000))[0]
    assert counts.min() > 140  # 200 in the mean, and a standard deviation of 12
    assert counts.max() < 260
    np.testing.assert_array_equal(rows, pool_rows(Other, [], {}, 2_000))
    Other.fingerprint = "changed"
    assert len(np.intersect1d(rows, pool_rows(Other, [], {}, 2_000))) < 600  # 400 in the mean


@settings(max_examples=50, deadline=None)
@given(
    steps=st.integers(1, 10_000), every=st.integers(1, 10_000), batch=st.integers(1, 4096),
    group=st.integers(1, 9), queries=st.integers(0, 256),
)  # fmt: skip
def test_the_evaluations_of_a_run_stay_within_their_share(steps, every, batch, group, queries):
    config = DataConfig(input_length=32, passage_length=96, positives=1, negatives=group - 1)
    cost = EvaluationCost.of(config, TrainSettings(steps, batch, eval_every=every), queries)
    passages = cost.passages_within(0.05)
    evaluations = len({*range(every, steps, every), steps})  # as the loop does them
    trained = 3 * steps * batch * (32 + group * 96)

    def share(passages: int) -> float:
        return evaluations * (queries * 32 + passages * 96) / trained

    assert cost.share(passages) == pytest.approx(share(passages))
    assert passages == 0 or share(passages) <= 0.05 * (1 + 1e-9)
    assert share(passages + 1) > 0.05 * (1 - 1e-9)


def test_a_run_of_no_steps_is_evaluated_as_after_those_between_two_evaluations():
    none, some = (EvaluationCost.of(DataConfig(), TrainSettings(n, 8, eval_every=50), 9) for n in (0, 50))
    assert none == some
    assert none.passages_within(0.05) > 0
