"""What ends a run whose numbers went wrong, or skips an update; and the warning of one that finds nothing."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
from tiny_training import SHAPES, SKIPS, curve, poisoned, spiky, train

from retrieval_jax.checkpoints import checkpoints
from retrieval_jax.core.errors import Diverged, UserError
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.objectives import cross_entropy
from retrieval_jax.training.loss_spike_guard import LossMonitor, LossSpikeGuard
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step


def monitor(folder: Path, unbounded_loss: bool = False, **guard: object) -> LossMonitor:
    return LossMonitor(LossSpikeGuard(**guard), folder, unbounded_loss=unbounded_loss)


@pytest.fixture
def short_window():
    with gin.unlock_config():
        gin.bind_parameter("LossSpikeGuard.window", 4)
    yield
    gin.clear_config()


@pytest.mark.parametrize(
    ("poison", "told"),
    [
        (1, "the loss is .* at step 8, and .* is usual"),
        (2, "the loss is nan"),
        (3, "the gradient_norm is nan"),
    ],
)
def test_a_run_that_went_wrong_stops_with_its_examples_and_keeps_the_checkpoint_before(
    tmp_path: Path, short_window, poison: int, told: str
):
    """The step that goes wrong is one that would be saved."""
    model = spiky()

    def describe_batch(position: int) -> list[dict]:
        return [{"task": "some", "number": 100 * position + row} for row in range(8)]

    with pytest.raises(UserError, match=rf"{told}.*\(some 700, some 701, some 702, …\)") as error:
        train(
            model,
            functools.partial(poisoned, at=8, poison=poison),
            lambda params: {},
            tmp_path,
            steps=20,
            save_every=2,
            describe_batch=describe_batch,
        )
    assert len(str(error.value).splitlines()) == 1
    bad = json.loads((tmp_path / "bad_batch_8.json").read_text())
    assert bad["step"] == 8
    assert [row["number"] for row in bad["examples"]] == list(range(700, 708))
    saved = checkpoints.Checkpoints(tmp_path)
    assert saved.steps() == [6, 4]
    saved.close()


def test_the_model_says_whether_a_spike_is_a_fault(tmp_path: Path, short_window, capsys):
    def rising(*args):
        return cross_entropy(*args)

    rising.unbounded_loss, model = True, spiky()
    model.objective = rising
    batches = functools.partial(poisoned, at=8, poison=1)
    assert train(model, batches, lambda params: {}, tmp_path, steps=10)["step"] == 10
    assert "is usual" in capsys.readouterr().err


def test_a_spike_is_measured_from_the_median_and_can_be_switched_off(tmp_path: Path):
    losses = monitor(tmp_path)
    for step, loss in enumerate([5.0] * 99 + [1e6]):  # nothing is too high before the window is full
        losses.check_step(step, {"loss": loss})
    losses.check_step(100, {"loss": 8.0})
    with pytest.raises(UserError, match=r"the loss is 8.10 at step 101, and 5.00 is usual"):
        losses.check_step(101, {"loss": 8.1})
    off = monitor(tmp_path, threshold=None)
    for step in range(300):
        off.check_step(step, {"loss": 1.0 if step < 200 else 1e9})
    with pytest.raises(UserError, match="the loss is inf at step 300"):
        off.check_step(300, {"loss": float("inf")})


def test_a_spike_may_be_told_of_once_without_an_end_but_what_is_not_finite_ends_the_run(
    tmp_path: Path, capsys
):
    losses = monitor(tmp_path, window=4, unbounded_loss=True)
    for step, loss in enumerate([5.0, 5.0, 5.0, 5.0, 9.0, 9.5, 5.0]):
        losses.check_step(step, {"loss": loss})
    assert capsys.readouterr().err.count("the loss is 9.00 at step 4, and 5.00 is usual") == 1
    with pytest.raises(UserError, match="the gradient_norm is nan at step 7"):
        losses.check_step(7, {"loss": 5.0, "gradient_norm": float("nan")})
    strict = monitor(tmp_path, window=1, unbounded_loss=True, on_spike="stop")
    strict.check_step(1, {"loss": 1.0})
    with pytest.raises(UserError, match=r"the loss is 9.00 at step 2"):
        strict.check_step(2, {"loss": 9.0})
    with pytest.raises(UserError, match="no choice 'go': stop, warn or skip"):
        monitor(tmp_path, on_spike="go")


@pytest.fixture
def skips():
    with gin.unlock_config():
        for name, value in SKIPS.items():
            gin.bind_parameter(name, value)
    yield
    gin.clear_config()


@pytest.mark.parametrize(
    ("poison", "told"),
    [
        (1, r"the loss is \S+ at step 8, and at most \S+ is usual"),
        (2, "the loss is nan at step 8"),
        (3, "the gradient_norm is nan at step 8"),
    ],
)
def test_a_skipped_update_leaves_the_parameters_of_a_training_that_never_saw_it(
    tmp_path: Path, skips, capsys, poison: int, told: str
):
    """To the last bit, also where the run is stopped in between and goes on two steps before."""
    model = spiky()
    run = {
        "batches": functools.partial(poisoned, at=8, poison=poison),
        "evaluator": lambda params: {},
        "log_every": 2,
        "describe_batch": lambda position: [{"task": "some", "number": position}] * 8,
    }
    made = train(model, folder=tmp_path / "whole", steps=12, **run)
    assert made["skipped"] == 1
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(
        f"{told}; its examples \\(some 7, some 7, some 7, …\\) are in .*: this update is skip", err
    )
    points = {p["step"]: p for p in curve(tmp_path / "whole") if "skipped" in p}
    assert [p["skipped"] for p in points.values()] == [0, 0, 0, 1, 0, 0]
    assert 0 < points[8]["loss"] < 6  # that of step 7

    mesh = partitioning.make_mesh()
    abstract = abstract_state(model, mesh, SHAPES)
    state = initial_state(model, abstract, SHAPES, 0)
    step = make_train_step(model, mesh, abstract, 0, can_skip=True)
    for number, batch in zip(range(1, 13), poisoned(0, at=0, poison=0), strict=False):
        if number == 8:
            state = dataclasses.replace(state, step=state.step + 1)
        else:
            state, _ = step(state, batch, np.float32(np.inf))

    train(model, folder=tmp_path / "parts", steps=6, **run)
    assert train(model, folder=tmp_path / "parts", steps=12, **run)["skipped"] == 1
    for name in ("whole", "parts"):
        saved = checkpoints.Checkpoints(tmp_path / name)
        there = saved.restore(12, abstract.params, abstract.optimizer)
        saved.close()
        same = jax.tree.map(np.array_equal, there[:2], (state.params, state.optimizer))
        assert all(jax.tree.leaves(same)), name


def test_updates_that_are_skipped_again_and_again_end_the_run(tmp_path: Path, skips):
    model = spiky()
    bad = functools.partial(poisoned, at=8, poison=2, until=100)
    with pytest.raises(Diverged, match="the loss is nan at step 9, and 2 of the last 2 updates were skipped"):
        train(model, bad, lambda params: {}, tmp_path, steps=20, save_every=100, log_every=1)
    with pytest.raises(UserError, match="max_skipped: 4 of the last 4 steps would never end a run"):
        monitor(tmp_path, on_spike="skip", window=4, max_skipped=4)


def test_the_limit_is_of_the_losses_before_the_step_before_whatever_is_known(tmp_path: Path):
    losses = monitor(tmp_path, window=3, on_spike="skip", max_skipped=1)
    for step, loss in enumerate([9.0, 1.0, 2.0, 3.0], start=1):
        losses.check_step(step, {"loss": loss})
    assert [losses.limit(step) for step in (4, 5, 6)] == [np.inf, 2.0 + 3, 2.0 + 3]
    losses.check_step(5, {"loss": 30.0, "gradient_norm": 1.0, "skipped": 1.0})  # its loss is no measure
    again = monitor(tmp_path, window=3, on_spike="skip", max_skipped=1)
    again.resume(json.loads(json.dumps(losses.state())))
    for one in (losses, again):
        one.check_step(6, {"loss": 4.0, "skipped": 0.0})
        assert [one.limit(step) for step in (7, 8)] == [2.0 + 3, 3.0 + 3]
        with pytest.raises(Diverged, match="2 of the last 3 updates were skipped"):
            one.check_step(7, {"loss": float("inf"), "skipped": 1.0})
    (tmp_path / "settings.json").write_text("other")
    other = monitor(tmp_path, window=3, on_spike="skip", max_skipped=1)
    other.resume(losses.state())
    assert other.limit(8) == np.inf


def test_a_run_that_finds_nothing_is_told_of_once(tmp_path: Path, capsys):
    losses = monitor(tmp_path, warn_if_zero_hits_after=10)
    for step, hits in ((5, 0.0), (10, 0.0), (15, 0.0)):
        losses.check_evaluation(step, {"Hits@10": hits})
    assert capsys.readouterr().err.count("no dev query found its passage by step 10") == 1
    other = monitor(tmp_path, warn_if_zero_hits_after=10)
    for step, hits in ((5, 0.1), (10, 0.0)):
        other.check_evaluation(step, {"Hits@10": hits})
    other.check_evaluation(20, {"loss": 3.0})  # a query generator finds nothing, nor need it
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("before", "told"), [((5, 0.1), 0), ((10, 0.0), 0), ((5, 0.0), 1)])
def test_a_resumed_run_knows_what_was_found_and_told(before, told, tmp_path: Path, capsys):
    step, hits = before
    resumed = monitor(tmp_path, warn_if_zero_hits_after=10)
    resumed.resume({}, [(step, {"Hits@10": hits})])
    resumed.check_evaluation(15, {"Hits@10": 0.0})
    assert capsys.readouterr().err.count("no dev query found its passage") == told
