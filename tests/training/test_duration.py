"""The estimate of a step's time, against its FLOPs counted by hand."""

import itertools
from types import SimpleNamespace

import pytest
import tiny_training

from retrieval_jax.training import duration
from retrieval_jax.training.duration import (
    BESIDE_STEPS,
    EFFICIENCY,
    EMBEDDING_FLOPS,
    OPTIMIZER_FLOPS,
    product_speed,
    step_seconds,
    training_seconds,
)
from retrieval_jax.training.flops import model_flops


def test_a_step_takes_its_products_and_its_optimizer():
    model, shapes = tiny_training.retriever(), {
        **tiny_training.SHAPES, "decoder_target_tokens": (8, 3), "decoder_loss_weights": (8, 3)
    }  # fmt: skip
    seconds = step_seconds(model, shapes, 1e9)
    emb, mlp, vocab, heads = 16, 32, 64, 16
    attention, gated = 4 * emb * heads, 3 * emb * mlp
    buckets, norms = 2 * 32 * 2, 7 * emb
    parameters = 2 * vocab * emb + 3 * attention + 2 * gated + buckets + norms
    flops = model_flops(model, shapes) + OPTIMIZER_FLOPS * parameters + EMBEDDING_FLOPS * 8 * 6 * emb
    expected = flops / (EFFICIENCY * 1e9)
    assert seconds == pytest.approx(expected, rel=1e-6)
    assert step_seconds(model, shapes, 2e9, devices=4) == pytest.approx(seconds / 8)
    assert training_seconds(model, shapes, 100, 1e9) == pytest.approx(100 * seconds + BESIDE_STEPS)


def test_the_speed_of_a_product_is_its_flops_over_the_median_time(monkeypatch: pytest.MonkeyPatch):
    ends = [(10 * n, 10 * n + seconds) for n, seconds in enumerate([0.5] * 6 + [8.0] * 4)]
    times = itertools.chain.from_iterable(ends)
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert product_speed() == pytest.approx(2 * 2048 * 256 * 4096 / 0.5)
    assert next(times, None) is None  # ten products, each timed for itself
