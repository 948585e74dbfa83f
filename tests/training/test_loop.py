"""The trainer: resuming, and what it refuses."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tiny_training import CONFIG, SHAPES, batches, curve, retriever, train

from retrieval_jax.checkpoints import checkpoints
from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.training.loss_spike_guard import LossSpikeGuard
from retrieval_jax.training.optimizers import adafactor, adamw
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step


@pytest.mark.parametrize("make", [adamw, adafactor])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, make):
    run = {"batches": batches, "evaluator": lambda params: {"Hits@10": 0.5}, "save_every": 4, "log_every": 2}
    whole = train(retriever(make), folder=tmp_path / "whole", steps=10, **run)
    assert whole["step"] == 10
    train(retriever(make), folder=tmp_path / "parts", steps=4, **run)
    train(retriever(make), folder=tmp_path / "parts", steps=10, **run)
    states = []
    for name in ("whole", "parts"):
        saved = checkpoints.Checkpoints(tmp_path / name)
        abstract = abstract_state(retriever(make), partitioning.make_mesh(), SHAPES)
        states.append(saved.restore(10, abstract.params, abstract.optimizer))
        saved.close()
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(a, b)  # to the last bit: data order and dropout included
    losses = [[p["loss"] for p in curve(tmp_path / name) if "loss" in p] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_the_step_compiles_once_and_finished_training_does_nothing(tmp_path: Path):
    model = retriever()
    mesh = partitioning.make_mesh()
    abstract = abstract_state(model, mesh, SHAPES)
    state = initial_state(model, abstract, SHAPES, 0)
    step = make_train_step(model, mesh, abstract, 0)
    for _, batch in zip(range(3), batches(0), strict=False):
        state, metrics = step(state, batch)
    assert step._cache_size() == 1
    assert int(state.step) == 3
    assert np.isfinite(float(metrics["loss"]))

    train(model, batches, lambda params: {"Hits@10": 0.25}, tmp_path, steps=2)

    def never(*_):
        raise AssertionError("finished training looked at its data")

    assert train(model, never, never, tmp_path, steps=2)["dev/Hits@10"] == 0.25


def test_a_run_of_no_steps_saves_what_it_begins_with_and_may_go_on(tmp_path: Path):
    model, run = retriever(), {"batches": batches, "evaluator": lambda params: {"Hits@10": 0.25}}
    made = train(model, folder=tmp_path, steps=0, **run)
    assert (made["step"], made["dev/Hits@10"]) == (0, 0.25)
    abstract = abstract_state(model, partitioning.make_mesh(), SHAPES)
    begun = initial_state(model, abstract, SHAPES, 0)
    saved = checkpoints.Checkpoints(tmp_path)
    params, _ = saved.restore(0, abstract.params, abstract.optimizer)[:2]
    saved.close()
    jax.tree.map(np.testing.assert_array_equal, params, begun.params)
    whole = train(model, folder=tmp_path / "whole", steps=2, log_every=1, **run)
    assert train(model, folder=tmp_path, steps=2, log_every=1, **run)["step"] == whole["step"] == 2
    losses = [[p["loss"] for p in curve(folder) if "loss" in p] for folder in (tmp_path, tmp_path / "whole")]
    assert losses[0] == losses[1]


def test_metrics_before_and_after_a_change_of_settings_are_one_mean(tmp_path: Path):
    run = {"batches": batches, "evaluator": lambda params: {}, "folder": tmp_path, "log_every": 4}
    train(retriever(), steps=2, spike_guard=LossSpikeGuard(on_spike="skip"), **run)
    train(retriever(), steps=4, **run)
    (point,) = (p for p in curve(tmp_path) if "loss" in p)
    whole = train(retriever(), steps=4, **(run | {"folder": tmp_path / "whole"}))
    assert whole["step"] == 4
    (expected,) = (p for p in curve(tmp_path / "whole") if "loss" in p)
    assert point["loss"] == expected["loss"]
    assert point["skipped"] == 0


def test_an_evaluation_that_a_kill_cut_off_is_made_by_the_same_call(tmp_path: Path):
    run = {"folder": tmp_path, "steps": 4, "save_every": 2, "eval_every": 2, "log_every": 1}
    asked = []

    def killed(params: dict) -> dict[str, float]:
        raise KeyboardInterrupt

    def found(params: dict) -> dict[str, float]:
        asked.append(params)
        return {"MRR@10": 1 / len(asked)}

    with pytest.raises(KeyboardInterrupt):  # the checkpoint of step 2 is saved
        train(retriever(), batches, killed, **run)
    with pytest.raises(KeyboardInterrupt):  # that of step 2 is evaluated, and step 4 saved
        train(retriever(), batches, lambda params: killed(params) if asked else found(params), **run)
    assert [p["step"] for p in curve(tmp_path) if "evaluation_seconds" in p] == [2]

    made = train(retriever(), batches, found, **run)
    assert (made["step"], made["dev/MRR@10"], made["best_step"]) == (4, 0.5, 2)
    points = curve(tmp_path)
    assert [p["step"] for p in points if "loss" in p] == [1, 2, 3, 4]
    assert [p["step"] for p in points if "evaluation_seconds" in p] == [2, 4]
    assert train(retriever(), batches, killed, **run) == made


class Pool:
    """Metrics of a pool of passages."""

    prefix = "dev_pool"

    def __init__(self, passages: int, score: float):
        self.metrics = {"MRR@10": score, "passages": passages}

    def __call__(self, params: dict) -> dict[str, float]:
        return self.metrics


def test_metrics_of_a_pool_have_its_name_and_compare_with_no_others(tmp_path: Path):
    run = {"batches": batches, "folder": tmp_path, "save_every": 1, "eval_every": 1, "keep": 1}
    made = train(retriever(), evaluator=Pool(9, 0.9), steps=1, **run)
    made = train(retriever(), evaluator=Pool(9, 0.5), steps=2, **run)
    assert made["dev_pool/MRR@10"] == 0.5
    assert made["best_step"] == 1
    made = train(retriever(), evaluator=Pool(20, 0.3), steps=3, **run)
    assert made["best_step"] == 3
    assert made["dev_pool/passages"] == 20
    made = train(retriever(), evaluator=lambda params: {"MRR@10": 0.1}, steps=4, **run)
    assert made["best_step"] == 4
    assert made["dev/MRR@10"] == 0.1
    assert not any(name.startswith("dev_pool/") for name in made)
    points = [point for point in curve(tmp_path) if "evaluation_seconds" in point]
    assert [point.get("dev_pool/MRR@10", point.get("dev/MRR@10")) for point in points] == [0.9, 0.5, 0.3, 0.1]


def test_max_minutes_stops_saves_and_stays_stopped(tmp_path: Path):
    first = train(retriever(), batches, lambda params: {}, tmp_path, steps=10**6, max_minutes=0.02)
    assert 0 < first["step"] < 10**6
    saved = checkpoints.Checkpoints(tmp_path)
    assert saved.latest() == first["step"]
    saved.close()
    again = train(retriever(), batches, lambda params: {}, tmp_path, steps=10**6, max_minutes=0.02)
    assert again["step"] == first["step"]


def test_a_loss_that_is_not_a_number_stops_with_the_step(tmp_path: Path):
    model = GenerativeRetriever(CONFIG, adamw(optax.constant_schedule(float("nan"))))
    with pytest.raises(UserError, match="the learning_rate is nan at step 1"):
        train(model, batches, lambda params: {}, tmp_path, steps=5)
