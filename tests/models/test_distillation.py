"""Distillation against its formulas, query by query and pair by pair in float64; gradients by differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_jax.models.distillation import dense_kl, dense_margin_mse

B, G = 6, 5
CASES = {
    "margin_mse": dense_margin_mse,
    "margin_mse_scaled": functools.partial(dense_margin_mse, teacher_scale=4.0),
    "kl": dense_kl,
    "kl_sharp": functools.partial(dense_kl, temperature=0.25),
}


def random_group(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, teacher's scores with gaps, positives. The last three queries: no pair, one score, no score."""
    rng = np.random.default_rng(seed)
    scores, teacher = rng.normal(size=(2, B, G)).astype(np.float32)
    positive = np.arange(G) < rng.integers(1, 4, (B, 1))
    teacher[rng.random((B, G)) < 0.2] = np.nan
    teacher[:3, [0, -1]] = rng.normal(size=(3, 2))
    teacher[3, positive[3]] = np.nan
    teacher[4] = [np.nan] * (G - 1) + [1.5]
    teacher[5] = np.nan
    return scores, teacher, positive


def by_hand(name: str, scores, teacher, positive) -> tuple[float, bool]:
    """(the loss of one query, whether it counts), in float64."""
    s, t = np.asarray(scores, np.float64), np.asarray(teacher, np.float64)
    known = [i for i in range(G) if not np.isnan(t[i])]
    if name.startswith("margin_mse"):
        t = t * (4 if name.endswith("scaled") else 1)
        pairs = [(i, j) for i in known for j in known if positive[i] and not positive[j]]
        errors = [((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i, j in pairs]
        return float(np.mean(errors)) if pairs else 0.0, bool(pairs)
    if len(known) < 2:
        return 0.0, False
    p, q = (np.exp(x[known]) / np.exp(x[known]).sum() for x in (t / (0.25 if name == "kl_sharp" else 1), s))
    return float(np.sum(p * np.log(p / q))), True


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_by_hand(name: str):
    scores, teacher, positive = random_group()
    losses, counts = CASES[name](jnp.asarray(scores), teacher, positive)
    expected = [by_hand(name, *query) for query in zip(scores, teacher, positive, strict=True)]
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=1e-5, atol=1e-6)
    assert counts.tolist() == [known for _, known in expected]
    assert counts.tolist() == [True] * 3 + [not name.startswith("margin"), False, False]

    gradient = jax.grad(lambda s: jnp.sum(CASES[name](s, teacher, positive)[0]))(scores)
    step = 1e-6
    for b in range(B):
        for g in range(G):
            up, down = (scores[b].astype(np.float64) + sign * step * (np.arange(G) == g) for sign in (1, -1))
            slope = by_hand(name, up, teacher[b], positive[b])[0]
            slope -= by_hand(name, down, teacher[b], positive[b])[0]
            np.testing.assert_allclose(gradient[b, g], slope / (2 * step), rtol=1e-4, atol=1e-5)


def test_the_teachers_own_scores_have_no_loss():
    """Also if a constant is added for each query, which no margin and no softmax sees."""
    _, teacher, positive = random_group()
    student = np.where(np.isnan(teacher), 7.0, teacher) + np.arange(B)[:, None]
    for distillation in (dense_margin_mse, dense_kl):
        losses, _ = distillation(jnp.asarray(student, jnp.float32), teacher, positive)
        np.testing.assert_allclose(losses, 0, atol=1e-6)
