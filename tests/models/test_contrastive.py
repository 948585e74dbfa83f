"""The multi-positive objectives against their closed forms (values and gradients, float64)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.contrastive import info_nce, joint_lh, lse_pair, rand1_lh, sum_marg_lh
from retrieval_jax.models.negatives import NEG_INF

joint_sum = functools.partial(joint_lh, mean=False)
OBJECTIVES = {
    "joint_sum": joint_sum,
    "joint_mean": joint_lh,
    "sum_marg": sum_marg_lh,
    "lse_pair": lse_pair,
    "lse_pair_min": functools.partial(lse_pair, positives="min"),
    "lse_pair_max": functools.partial(lse_pair, positives="max"),
    "rand1": rand1_lh,  # without a key: its expectation
    "info_nce": info_nce,
}


def lse(x) -> float:
    return float(np.log(np.exp(np.asarray(x, np.float64)).sum()))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def closed_form(name: str, pos, neg) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, gradient of the positives' scores, of the negatives'): one query, float64."""
    m, joint = len(pos), lse([*pos, *neg])
    p, n = np.exp(pos - joint), np.exp(neg - joint)
    w, v, u = softmax(pos), softmax(-pos), softmax(neg)
    if name == "joint_sum":
        return m * joint - pos.sum(), m * p - 1, m * n
    if name == "joint_mean":
        return joint - pos.mean(), p - 1 / m, n
    if name == "sum_marg":
        return joint - lse(pos), -w * (1 - p.sum()), n
    if name == "lse_pair":
        pairs = lse(neg) + lse(-pos)
        return np.log1p(np.exp(pairs)), -sigmoid(pairs) * v, sigmoid(pairs) * u
    if name == "rand1":
        q = sigmoid(lse(neg) - pos)
        return np.log1p(np.exp(lse(neg) - pos)).mean(), -q / m, u * q.mean()
    one = {"lse_pair_min": pos.argmin(), "lse_pair_max": pos.argmax(), "info_nce": 0}[name]
    q = sigmoid(lse(neg) - pos[one])
    return np.log1p(np.exp(lse(neg) - pos[one])), -q * (np.arange(m) == one), q * u


@functools.cache
def loss_and_gradients(objective):
    """Of one query's candidates and the scores of its negatives; compiled once for each shape."""

    def loss(candidates, neg, positive):
        return objective(candidates[None], positive[None], jax.nn.logsumexp(neg)[None])[0]

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def of_one_query(objective, pos, neg, before: int = 0, after: int = 0) -> tuple:
    """The same by the code, with so many candidates that are no positives before and after them."""
    positive = np.repeat([False, True, False], [before, len(pos), after])
    candidates = np.float32([3.0] * before + [*pos] + [-3.0] * after)
    value, gradients = loss_and_gradients(objective)(candidates, np.float32(neg), positive)
    of_candidates, of_neg = map(np.asarray, gradients)
    assert not of_candidates[~positive].any()
    return value, of_candidates[positive], of_neg


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 5), spread=st.floats(0.1, 8))
def test_values_and_gradients_are_the_closed_forms(name: str, seed: int, m: int, spread: float):
    rng = np.random.default_rng(seed)
    pos, neg = spread * rng.normal(size=m), spread * rng.normal(size=rng.integers(1, 7))
    before, padded = seed % 3, np.pad(neg, (0, 6 - len(neg)), constant_values=-np.inf)
    value, of_pos, of_neg = of_one_query(OBJECTIVES[name], pos, padded, before, after=8 - before - m)
    got = value, of_pos, of_neg[: len(neg)]
    for a, b in zip(got, closed_form(name, pos, neg), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert got[1].sum() + got[2].sum() == pytest.approx(0, abs=1e-4)


def test_worked_examples():
    pos, neg = np.array([5.0, -5.0]), np.zeros(10)
    expected = {"joint_mean": (0.437, -0.5), "sum_marg": (-0.063, -3e-6), "lse_pair": (-5e-5, -0.999)}
    for name, gradient in expected.items():
        got = of_one_query(OBJECTIVES[name], pos, neg)[1]
        np.testing.assert_allclose(got, gradient, rtol=0.1, atol=6e-4)
    pos, neg = np.log([2.0, 1.0]), np.log([1.0])
    np.testing.assert_allclose(of_one_query(lse_pair, pos, neg)[1], [-1 / 5, -2 / 5], rtol=1e-5)
    np.testing.assert_allclose(of_one_query(rand1_lh, pos, neg)[1], [-1 / 6, -1 / 4], rtol=1e-5)


@pytest.mark.parametrize("positives_compete", [False, True])
def test_with_one_positive_all_are_info_nce(positives_compete: bool):
    rng = np.random.default_rng(0)
    pos, neg = rng.normal(size=1), rng.normal(size=5)
    value = lse([*pos, *neg]) - pos[0]
    for name, objective in OBJECTIVES.items():
        got = of_one_query(
            functools.partial(objective, positives_compete=positives_compete), pos, neg, after=2
        )
        assert got[0] == pytest.approx(value, rel=1e-5), name


def test_other_positives_in_and_out_of_the_denominator():
    """By the definitions, a positive at a time."""
    rng = np.random.default_rng(3)
    pos, neg = rng.normal(size=3), rng.normal(size=4)
    rest = [np.delete(pos, i) for i in range(3)]
    inside = np.array([lse([*neg, *other]) - s for s, other in zip(pos, rest, strict=True)])
    outside = lse(neg) - pos

    def check(objective, positives_compete: bool, expected: float) -> None:
        got = of_one_query(functools.partial(objective, positives_compete=positives_compete), pos, neg)[0]
        assert got == pytest.approx(expected, rel=1e-4)

    check(joint_sum, False, np.log1p(np.exp(outside)).sum())
    check(joint_lh, True, np.log1p(np.exp(inside)).mean())
    check(sum_marg_lh, False, -np.log(sigmoid(-outside).mean()))
    check(lse_pair, True, np.log1p(np.exp(inside).sum()))
    check(rand1_lh, True, np.log1p(np.exp(inside)).mean())
    check(info_nce, True, np.log1p(np.exp(inside[0])))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_comes_of_no_positive_nor_of_no_negative(name: str):
    objective, scores = OBJECTIVES[name], jnp.array([[1.0, 2.0, 3.0]])

    def total(scores, negatives, positive):
        return jnp.sum(objective(scores, positive, negatives))

    for negatives, positive in ((2.0, [[False] * 3]), (NEG_INF, [[True, False, False]])):
        arguments = scores, jnp.array([negatives]), jnp.array(positive)
        value, gradients = jax.value_and_grad(total, (0, 1))(*arguments)
        assert value == 0
        assert all(np.all(np.asarray(g) == 0) for g in gradients)


def test_rand1_takes_each_positive_in_turn_from_a_seeded_start():
    pos, neg = np.array([0.5, -1.0, 2.0]), np.array([0.3])
    scores = jnp.broadcast_to(jnp.float32(pos), (6, 3))
    positive, negatives = jnp.ones((6, 3), bool), jnp.full(6, neg[0], jnp.float32)
    losses = np.log1p(np.exp(neg[0] - pos))
    firsts = []
    for seed in range(30):
        drawn = np.asarray(rand1_lh(scores, positive, negatives, jax.random.key(seed)))
        chosen = np.abs(drawn[:, None] - losses).argmin(1)
        assert list(chosen) == [(chosen[0] + b) % 3 for b in range(6)]
        again = rand1_lh(scores, positive, negatives, jax.random.key(seed))
        assert np.array_equal(drawn, again)
        firsts.append(chosen[0])
    assert min(np.bincount(firsts, minlength=3)) >= 4  # of 10 expected


def test_an_unknown_selector_is_told():
    with pytest.raises(UserError, match=r"lse_pair.positives: no 'most': choose"):
        lse_pair(jnp.ones((1, 1)), jnp.ones((1, 1), bool), jnp.ones(1), positives="most")
