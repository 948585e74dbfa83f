import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retrieval_jax.evaluation.significance import (
    compare,
    compare_collections,
    holm_bonferroni,
    randomization_test,
    t_test,
)

VALUES = st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 1.0])  # as of RR: many ties


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=10))
def test_few_queries_are_tested_exactly(pairs):
    ours, theirs = np.array(pairs).T
    whole = np.round(
        60 * np.array(pairs)
    ).T  # sums of whole numbers are exact: SciPy takes no rounding for a rank
    expected = stats.permutation_test(
        (*whole,), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert randomization_test((ours - theirs)[None])[0] == pytest.approx(expected.pvalue)


def test_many_queries_agree_with_scipy():
    random = np.random.default_rng(7)
    base = random.random(60)
    systems = [np.clip(base + random.normal(shift, 0.3, 60), 0, 1) for shift in (0.0, 0.04, 0.08, 0.15)]
    found = randomization_test(np.stack(systems) - base, permutations=20_000, seed=3)
    for ours, p in zip(systems, found, strict=True):
        expected = stats.permutation_test(
            (ours, base),
            lambda a, b, axis: np.mean(a - b, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=20_000,
            rng=11,
        ).pvalue
        # Each is a share of 20,000 draws: five standard errors of their difference.
        assert p == pytest.approx(expected, abs=5 * np.sqrt(2 * expected * (1 - expected) / 20_000) + 1e-4)
    again = randomization_test(np.stack(systems) - base, permutations=20_000, seed=3)
    assert (again == found).all()
    (exact,) = randomization_test((systems[2] - base)[None, :14])
    (drawn,) = randomization_test((systems[2] - base)[None, :14], permutations=2**14 - 1)
    assert drawn == pytest.approx(exact, abs=0.02)


def test_a_small_p_is_never_zero():
    (p,) = randomization_test(np.full((1, 40), 0.5), permutations=2_000)
    assert p == 1 / 2_001  # the chance of 40 equal signs is 2^-39


@settings(deadline=None, max_examples=60)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_procedure_rejects(p):
    corrected = holm_bonferroni(np.array(p))
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for step, system in enumerate(sorted(range(len(p)), key=lambda i: p[i])):  # as Holm (1979) words it
            if p[system] * (len(p) - step) > alpha:
                break
            rejected.add(system)
        assert set(np.flatnonzero(corrected <= alpha)) == rejected


def test_compare_gives_the_published_procedures():
    random = np.random.default_rng(1)
    base = random.random(50)
    systems = {"better": base + random.normal(0.2, 0.3, 50), "same": base, "noise": random.random(50)}
    found = compare(base, systems)
    assert list(found) == list(systems)
    for name in ("better", "noise"):
        expected = stats.ttest_rel(systems[name], base)
        interval = expected.confidence_interval(0.95)
        assert found[name].p_t_test == pytest.approx(expected.pvalue)
        assert (found[name].low, found[name].high) == pytest.approx((interval.low, interval.high))
        assert found[name].mean == pytest.approx(np.mean(systems[name]) - np.mean(base))
        assert found[name].p == pytest.approx(found[name].p_t_test, abs=0.01)  # Smucker et al.: they agree
    assert found["better"].significant
    assert found["better"].p_holm == pytest.approx(3 * found["better"].p)
    same = found["same"]
    assert (same.mean, same.low, same.high, same.p, same.p_t_test, same.p_holm) == (0, 0, 0, 1, 1, 1)
    assert not same.significant
    assert compare(base, {}) == {}


def test_a_single_query_and_equal_differences():
    p, low, _ = t_test(np.array([[0.5]]))
    assert np.isnan(p).all()
    assert np.isnan(low).all()
    assert not compare(np.zeros(1), {"a": np.ones(1)})["a"].significant
    (every,) = compare(np.zeros(8), {"a": np.ones(8)}).values()
    assert (every.mean, every.low, every.high, every.p, every.p_t_test) == (1, 1, 1, 2 / 2**8, 0)


def test_a_value_that_is_not_finite_is_no_difference():
    base, random = np.zeros(30), np.random.default_rng(0)
    fine = random.random(30)
    unknown = {
        name: np.where(np.arange(30) == 3, value, fine) for name, value in (("n", np.nan), ("i", np.inf))
    }
    for queries in (8, 30):  # all assignments of signs, and drawn ones
        systems = {"fine": fine, **unknown}
        found = compare(base[:queries], {name: values[:queries] for name, values in systems.items()})
        for name in unknown:
            assert np.isnan([found[name].p, found[name].p_holm]).all()
            assert not found[name].significant
        assert found["fine"] == compare(base[:queries], {"fine": fine[:queries]})["fine"]


def test_one_collection_is_compared_as_by_itself():
    random = np.random.default_rng(2)
    base, systems = random.random(40), {"a": random.random(40), "b": random.random(40)}
    alone = compare(base, systems)
    for name, found in compare_collections([base], {key: [v] for key, v in systems.items()}).items():
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(alone[name]))


def test_collections_count_the_same_whatever_their_sizes():
    """The mean of two collections' differences d and e is half of d - (-e): Welch's test of d and -e."""
    random = np.random.default_rng(3)
    base = [np.zeros(30), np.zeros(7)]
    d, e = random.normal(0.3, 1.0, 30), random.normal(0.4, 0.5, 7)
    found = compare_collections(base, {"a": [d, e]})["a"]
    welch = stats.ttest_ind(d, -e, equal_var=False)
    assert found.mean == pytest.approx((d.mean() + e.mean()) / 2)
    assert found.p_t_test == pytest.approx(welch.pvalue)
    interval = welch.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low / 2, interval.high / 2))

    # The randomisation test, by all signs of few queries.
    d, e = d[:5], e[:4]
    means = [
        abs(np.dot(d, signs[:5]) / 5 + np.dot(e, signs[5:]) / 4)
        for signs in itertools.product((1, -1), repeat=9)
    ]
    found = compare_collections([np.zeros(5), np.zeros(4)], {"a": [d, e], "same": [np.zeros(5), np.zeros(4)]})
    assert found["a"].p == pytest.approx(np.mean(np.array(means) >= means[0] - 1e-12))
    same = found["same"]
    assert (same.mean, same.low, same.high, same.p, same.p_t_test) == (0, 0, 0, 1, 1)
