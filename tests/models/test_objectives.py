"""Objectives against their definitions, in float64; and one from outside of the package."""

import dataclasses
import functools
import importlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import compiled
from small_t5 import CONFIG, loss_and_metrics, parameters, random_batch
from test_t5 import jit

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.objectives import rdrop, symmetric_kl, token_cross_entropy, token_metrics
from retrieval_jax.models.softmax import softmax_stats


def smoothed(logits, target, smoothing, z_loss) -> float:
    """T5X's loss of one token by its definition, in float64: distance from a softened target, and z-loss."""
    log_z = np.log(np.exp(logits).sum())
    wanted = np.full(len(logits), smoothing / (len(logits) - 1))
    wanted[target] = 1 - smoothing
    entropy = -(wanted[wanted > 0] * np.log(wanted[wanted > 0])).sum()
    return -(wanted * (logits - log_z)).sum() - entropy + z_loss * log_z**2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_equals_its_definition(smoothing: float, z_loss: float):
    logits, targets = np.random.default_rng(1).normal(size=(4, 7)), np.array([0, 6, 3, 3])
    softmax = softmax_stats(jnp.array(logits), jnp.array(targets))
    losses = token_cross_entropy(softmax, z_loss, smoothing, 7, jnp.array(logits.sum(1)))
    expected = [smoothed(x, t, smoothing, z_loss) for x, t in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def kl(p, q) -> np.ndarray:
    """KL(p‖q) of float64 probabilities."""
    return (p * np.log(p / q)).sum(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 20))
def test_divergence_is_the_mean_of_both_directions(seed: int, spread: float):
    a, b = spread * np.random.default_rng(seed).normal(size=(2, 3, 5))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = (kl(p, q) + kl(q, p)) / 2
    np.testing.assert_allclose(symmetric_kl(jnp.array(a), jnp.array(b)), expected, rtol=2e-3, atol=1e-4)


def test_divergence_stays_finite_where_that_of_probabilities_does_not():
    a, b = jnp.array([[300.0, 0.0, -50.0]]), jnp.array([[0.0, 200.0, 40.0]])
    p, q = jax.nn.softmax(a), jax.nn.softmax(b)
    assert not np.isfinite(jnp.sum(p * jnp.log(p / q)))  # as the loss is usually written
    value, gradient = jax.value_and_grad(lambda a: symmetric_kl(a, b)[0])(a)
    assert value == pytest.approx((300 + 200) / 2, rel=1e-6)  # all of p is at 0, all of q at 1
    assert np.isfinite(gradient).all()


RDROP = functools.partial(rdrop, weight=3.0)


def log_probs(model: GenerativeRetriever, params: dict, batch: dict) -> np.ndarray:
    """The targets' log-probabilities B×T in float64."""
    logits = np.asarray(compiled(model, "logits")(params, batch), np.float64)
    chosen = np.take_along_axis(logits, batch["decoder_target_tokens"][..., None], -1)[..., 0]
    return chosen - np.log(np.exp(logits).sum(-1))


@pytest.fixture
def contributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files of CONTRIBUTING.md's example, in a folder from which Python imports."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    section = text[text.index("### Add an objective") :]
    python, config = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "focal.py").write_text(python)
    (tmp_path / "focal.gin").write_text(config)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("focal")
    del sys.modules["focal"]


def test_an_objective_of_another_package_trains_and_is_part_of_a_runs_settings(
    contributed, work, arguments, cli, tmp_path: Path
):
    batch, weights = random_batch(), random_batch()["decoder_loss_weights"]
    whole = GenerativeRetriever(CONFIG, objective=contributed.focal_loss)
    blocks = GenerativeRetriever(CONFIG, objective=contributed.focal_loss, max_logits_per_block=100)
    params = parameters(whole)
    p = log_probs(whole, params, batch)
    expected = (-((1 - np.exp(p)) ** 2.0) * p * weights).sum() / weights.sum()
    for model in (whole, blocks):
        loss, metrics = jax.jit(model.loss_fn)(params, batch, None)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert metrics["accuracy"][1] == weights.sum()

    assert cli("docids", *arguments, "--DOCIDS=atomic")[0] == 0
    folder = tmp_path / "model"
    focal = ["--gin_file=runs/atomic.gin", f"--gin_file={tmp_path / 'focal.gin'}", f"--MODEL_DIR={folder}"]
    assert cli("train", *arguments, *focal, "--gin.train.steps=1")[0] == 0
    recorded = json.loads((folder / "settings.json").read_text())
    assert recorded["GenerativeRetriever.objective"] == "focal_loss"
    assert recorded["focal_loss.gamma"] == "1.5"
    status, _, told = cli("train", *arguments, *focal, "--gin.train.steps=2", "--gin.focal_loss.gamma=3.0")
    assert status == 2
    assert "focal_loss.gamma was '1.5' and is '3.0'" in told


def test_an_objective_may_compare_several_docids_of_a_query():
    """Margin distillation: rows of a query stand behind one another, with a teacher's score for each."""

    def margin_distillation(predict, batch, rng):
        predictions = predict(batch, rng)
        score_QxG = jnp.sum(predictions.log_probs_BxT * predictions.weights_BxT, axis=1).reshape(-1, 2)
        margin_Q, teacher_QxG = score_QxG[:, 0] - score_QxG[:, 1], batch["teacher_score"].reshape(-1, 2)
        errors_Q = jnp.square(margin_Q - (teacher_QxG[:, 0] - teacher_QxG[:, 1]))
        return {"loss": (jnp.sum(errors_Q), jnp.float32(len(errors_Q)))}

    batch = random_batch(rows=6)
    model = GenerativeRetriever(CONFIG, objective=margin_distillation, max_logits_per_block=100)
    params, teacher = parameters(model), np.random.default_rng(1).normal(size=6)
    scores = (log_probs(model, params, batch) * batch["decoder_loss_weights"]).sum(1)
    expected = np.mean((scores[::2] - scores[1::2] - teacher[::2] + teacher[1::2]) ** 2)
    given = batch | {"teacher_score": teacher.astype(np.float32)}
    loss, gradients = jax.jit(jax.value_and_grad(lambda params: model.eval_fn(params, given)[0]))(params)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert np.abs(gradients["decoder"]["logits_dense"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    "returned",
    [None, 0.5, {}, {"accuracy": (1.0, 2.0)}, {"loss": 0.5}, {"loss": (1.0, 2.0), "accuracy": 0.5}],
)
def test_an_objective_that_returns_no_metrics_is_named(returned):
    def mine(predict, batch, rng):
        return returned

    message, key = r"^objective mine: .*: give \{'loss': \(total, count\), …\}, as", jax.random.key(0)
    with pytest.raises(UserError, match=message):
        GenerativeRetriever(CONFIG, objective=mine).loss_fn({}, random_batch(), key)
    with pytest.raises(UserError, match=message):
        rdrop(lambda *_: None, random_batch(), key, objective=mine)


def test_rdrop_is_the_divergence_of_two_dropout_passes():
    batch, key = random_batch(), jax.random.key(5)
    params = parameters(GenerativeRetriever(CONFIG))
    still = dataclasses.replace(CONFIG, dropout_rate=0.0)
    plain, _ = loss_and_metrics(GenerativeRetriever(still), params, batch, key)
    same, metrics = loss_and_metrics(GenerativeRetriever(still, objective=RDROP), params, batch, key)
    assert same == pytest.approx(float(plain), rel=1e-6)
    assert metrics["rdrop"][0] == pytest.approx(0, abs=1e-6)

    model = GenerativeRetriever(CONFIG, objective=RDROP)
    loss, metrics = loss_and_metrics(model, params, batch, key)
    twice = {name: np.repeat(x, 2, axis=0) for name, x in batch.items()}
    x_BxTxE = jit(model.hidden)(params, twice, key)  # of the same two readings
    log_p = jax.nn.log_softmax(model.module.apply({"params": params}, x_BxTxE, method="logits"))
    p = np.exp(np.asarray(log_p, np.float64))
    weights = batch["decoder_loss_weights"]
    both = [(p[i::2] * np.log(p[i::2] / p[1 - i :: 2])).sum(-1) for i in (0, 1)]
    apart = (np.mean(both, axis=0) * weights).sum() / weights.sum()
    chosen = np.take_along_axis(np.log(p), twice["decoder_target_tokens"][..., None], -1)[..., 0]
    nll = -(chosen * twice["decoder_loss_weights"]).sum() / twice["decoder_loss_weights"].sum()
    assert apart > 1e-3
    assert metrics["rdrop"][0] / metrics["rdrop"][1] == pytest.approx(apart, rel=1e-3)
    assert loss == pytest.approx(nll + 3 * apart, rel=1e-4)
    assert metrics["loss"][0] / metrics["loss"][1] == pytest.approx(float(loss), rel=1e-6)
    blocks = GenerativeRetriever(CONFIG, objective=RDROP, max_logits_per_block=100)
    with pytest.raises(UserError, match="max_logits_per_block=None"):
        jax.eval_shape(blocks.loss_fn, params, batch, key)


def test_rdrop_refuses_an_objective_that_reads_another_batch():
    def halves(predict, batch, rng):
        return token_metrics(predictions := predict({**batch}, rng), -predictions.log_probs_BxT)

    model = GenerativeRetriever(CONFIG, objective=functools.partial(rdrop, objective=halves))
    with pytest.raises(UserError, match=r"rdrop.objective: it predicts on another batch"):
        jax.eval_shape(model.loss_fn, parameters(model), random_batch(), jax.random.key(0))
