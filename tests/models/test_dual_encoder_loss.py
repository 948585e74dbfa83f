"""The loss of vectors: its parts, their weights and which queries count; networks: test_dual_encoder.py."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
import scipy.special

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.contrastive import joint_lh
from retrieval_jax.models.distillation import dense_kl, dense_margin_mse
from retrieval_jax.models.dual_encoder_loss import VectorLoss

B, G, E = 8, 4, 5


def loss_of(**settings) -> Callable:
    """A `VectorLoss` as one program."""
    defaults = {"objective_weight": 1.0, "bidirectional": True, "in_batch_negatives": True}
    defaults |= {"hardest_negative_only": False, "max_logits_per_block": 1 << 20}
    defaults |= {"distillation": None, "distillation_weight": 1.0}
    return jax.jit(VectorLoss(joint_lh, **{**defaults, **settings}))


def vectors_and_batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict]:
    """Query 2 has no positive (nor has its group a score); query 5 has no score, and 6 one candidate."""
    rng = np.random.default_rng(seed)
    queries, passages = rng.normal(size=(B, E)), rng.normal(size=(B * G, E))
    batch = {
        "passage": np.arange(B * G, dtype=np.int32).reshape(B, G),
        "grade": np.int32([[1, 1, 0, 0]] * B),
        "score": rng.normal(size=(B, G)).astype(np.float32),
    }
    batch["grade"][2], batch["score"][2], batch["score"][5] = 0, np.nan, np.nan
    batch["passage"][6, 1:], batch["grade"][6, 1:] = -1, -1
    return queries.astype(np.float32), passages.astype(np.float32), batch


def rows(batch: dict, which) -> dict:
    return {name: x[which] for name, x in batch.items()}


@pytest.mark.parametrize("distillation", [dense_margin_mse, dense_kl])
def test_the_parts_add_up(distillation):
    given = vectors_and_batch()
    objective = loss_of()(*given, None)
    alone = loss_of(objective_weight=0.0, distillation=distillation)(*given, None)
    both = loss_of(objective_weight=0.5, distillation=distillation, distillation_weight=3.0)(*given, None)
    expected = 0.5 * objective["loss"][0] + 3 * alone["loss"][0]
    assert both["loss"][0] == pytest.approx(float(expected), rel=1e-5)
    assert both["distillation"] == alone["distillation"] == alone["loss"]
    assert "distillation" not in objective
    counts = {name: float(x["loss"][1]) for name, x in {"objective": objective, "alone": alone}.items()}
    assert counts == {"objective": 7, "alone": 5}  # without query 2; without 5 and 6, too
    assert both["loss"][1] == both["accuracy"][1] == 7


def test_a_distillation_alone_is_of_each_query_by_itself():
    """So microbatches are exact: totals and counts add up, and the gradient of each is its own."""
    queries, passages, batch = vectors_and_batch()
    loss = loss_of(objective_weight=0.0, distillation=dense_margin_mse)

    def total(queries, passages, batch):
        return loss(queries, passages, batch, None)["loss"]

    whole, gradient = jax.value_and_grad(total, has_aux=True)(queries, passages, batch)
    for part in (slice(0, 4), slice(4, 8)):
        candidates = passages.reshape(B, G, E)[part].reshape(-1, E)
        own, own_gradient = jax.value_and_grad(total, has_aux=True)(
            queries[part], candidates, rows(batch, part)
        )
        whole = tuple(a - b for a, b in zip(whole, own, strict=True))
        np.testing.assert_allclose(gradient[part], own_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole, 0, atol=1e-4)
    assert np.isfinite(gradient).all()
    assert not gradient[np.array([2, 5, 6])].any()


@pytest.mark.parametrize("max_logits", [1 << 20, 2 * B * G])
def test_self_teaching_is_the_divergence_from_the_querys_scores(max_logits):
    """In float64, over all passages of the batch; whatever number of queries is scored at once."""
    queries, passages, batch = vectors_and_batch()
    copies = queries + np.random.default_rng(1).normal(size=queries.shape).astype(np.float32)
    tokens = np.arange(B * 3, dtype=np.int32).reshape(B, 3)
    batch |= {"left_encoder_input_tokens": tokens, "copy_encoder_input_tokens": tokens + 1}
    batch["copy_encoder_input_tokens"][3] = tokens[3]  # without a typo
    loss = loss_of(self_teaching_weight=2.0, max_logits_per_block=max_logits)

    def total(queries, copies):
        return loss(queries, passages, batch, None, copies)["loss"][0]

    counted = np.flatnonzero(np.arange(B) != 3)

    def expected(copies: np.ndarray) -> float:
        inside = batch["passage"].reshape(-1) >= 0
        s, t = (x.astype(np.float64) @ passages[inside].astype(np.float64).T for x in (copies, queries))
        log_q, log_p = (x - scipy.special.logsumexp(x, axis=1, keepdims=True) for x in (s, t))
        return float(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)[counted].sum())

    objective = loss_of()(queries, passages, batch, None)
    made = loss(queries, passages, batch, None, copies)
    assert made["self_teaching"][1] == B - 1
    assert float(made["self_teaching"][0]) == pytest.approx(expected(copies), rel=1e-5)
    assert float(made["loss"][0]) == pytest.approx(
        float(objective["loss"][0]) + 2 * expected(copies), rel=1e-5
    )
    # Its gradient is that of the copies' scores alone: the query's are the teacher.
    of_queries, of_copies = jax.grad(total, argnums=(0, 1))(queries, copies)
    alone = jax.grad(lambda q: loss_of()(q, passages, batch, None)["loss"][0])(queries)
    np.testing.assert_allclose(of_queries, alone, rtol=1e-5, atol=1e-6)
    step = np.zeros_like(copies, np.float64)
    step[4, 1] = 1e-5
    slope = (expected(copies + step) - expected(copies - step)) / 2e-5
    assert float(of_copies[4, 1]) == pytest.approx(2 * slope, rel=1e-4)
    assert not of_copies[3].any()


def test_a_teacher_is_needed():
    queries, passages, batch = vectors_and_batch()
    del batch["score"]
    with pytest.raises(UserError, match=r"distillation: .* no teacher's scores: .*SCORES=NAME"):
        loss_of(distillation=dense_kl)(queries, passages, batch, None)
