"""What ends a run early: SIGTERM, numbers that went wrong; and what is told of a run that finds nothing."""

import functools
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import CONFIG, SHAPES, batches, curve, retriever

from retrieval_jax.errors import Preempted, UserError
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.training import checkpoints, partitioning
from retrieval_jax.training.loop import fit
from retrieval_jax.training.optimizers import adamw
from retrieval_jax.training.step import abstract_state
from retrieval_jax.training.watch import Watch


class Poisoned(GenerativeRetriever):
    """Its loss (1, 2) or only its gradient (3) goes wrong where a batch says so, alike in all rows."""

    def loss_fn(self, params, batch, dropout_rng):
        loss, metrics = super().loss_fn(params, batch, dropout_rng)
        leaf = params["decoder"]["logits_dense"]["kernel"][0, 0]
        wrong = jnp.array([0.0, 7.0, jnp.nan, 0.0])[batch["poison"][0]]
        steep = jax.lax.cond(batch["poison"][0] == 3, lambda x: jnp.sqrt(0 * x), lambda x: 0 * x, leaf)
        total, count = metrics["loss"]
        return loss + wrong + steep, {**metrics, "loss": (total + wrong * count, count)}


def poisoned(position: int, at: int, poison: int) -> Iterator[dict[str, np.ndarray]]:
    for number, batch in enumerate(batches(position), start=position + 1):
        yield {**batch, "poison": np.full(8, poison if number == at else 0, np.int32)}


@pytest.fixture
def short_window():
    with gin.unlock_config():
        gin.bind_parameter("Watch.window", 4)
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
    model = Poisoned(CONFIG, adamw(optax.constant_schedule(1e-2)))

    def examples_of(position: int) -> list[dict]:
        return [{"task": "some", "number": 100 * position + row} for row in range(8)]

    with pytest.raises(UserError, match=rf"{told}.*\(some 700, some 701, some 702, …\)") as error:
        fit(
            model,
            functools.partial(poisoned, at=8, poison=poison),
            lambda params: {},
            tmp_path,
            steps=20,
            save_every=2,
            examples_of=examples_of,
        )
    assert len(str(error.value).splitlines()) == 1
    bad = json.loads((tmp_path / "bad_batch_8.json").read_text())
    assert bad["step"] == 8
    assert [row["number"] for row in bad["examples"]] == list(range(700, 708))
    saved = checkpoints.Checkpoints(tmp_path)
    assert saved.steps() == [6, 4]
    saved.close()


def test_a_spike_is_measured_from_the_median_and_can_be_switched_off(tmp_path: Path):
    watch = Watch(tmp_path)
    for step, loss in enumerate([5.0] * 99 + [1e6]):  # nothing is too high before the window is full
        watch.step(step, {"loss": loss})
    watch.step(100, {"loss": 8.0})
    with pytest.raises(UserError, match=r"the loss is 8.10 at step 101, and 5.00 is usual"):
        watch.step(101, {"loss": 8.1})
    off = Watch(tmp_path, spike=None)
    for step in range(300):
        off.step(step, {"loss": 1.0 if step < 200 else 1e9})
    with pytest.raises(UserError, match="the loss is inf at step 300"):
        off.step(300, {"loss": float("inf")})


def test_a_spike_may_be_told_of_once_without_an_end_but_what_is_not_finite_ends_the_run(
    tmp_path: Path, capsys
):
    watch = Watch(tmp_path, window=4, unbounded=True)
    for step, loss in enumerate([5.0, 5.0, 5.0, 5.0, 9.0, 9.5, 5.0]):
        watch.step(step, {"loss": loss})
    assert capsys.readouterr().err.count("the loss is 9.00 at step 4, and 5.00 is usual") == 1
    with pytest.raises(UserError, match="the gradient_norm is nan at step 7"):
        watch.step(7, {"loss": 5.0, "gradient_norm": float("nan")})
    strict = Watch(tmp_path, window=1, unbounded=True, on_spike="stop")
    strict.step(1, {"loss": 1.0})
    with pytest.raises(UserError, match=r"the loss is 9.00 at step 2"):
        strict.step(2, {"loss": 9.0})
    with pytest.raises(UserError, match="no choice 'go': stop or warn"):
        Watch(tmp_path, on_spike="go")


def test_a_run_that_finds_nothing_is_told_of_once(tmp_path: Path, capsys):
    watch = Watch(tmp_path, found_by=10)
    for step, hits in ((5, 0.0), (10, 0.0), (15, 0.0)):
        watch.dev(step, {"Hits@10": hits})
    assert capsys.readouterr().err.count("no dev query found its passage by step 10") == 1
    other = Watch(tmp_path, found_by=10)
    for step, hits in ((5, 0.1), (10, 0.0)):
        other.dev(step, {"Hits@10": hits})
    other.dev(20, {"loss": 3.0})  # a query generator finds nothing, nor need it
    assert not capsys.readouterr().err


def test_sigterm_saves_the_running_step_and_the_same_call_goes_on(tmp_path: Path):
    run = {"dev": lambda params: {}, "steps": 9, "save_every": 100, "log_every": 1}

    def interrupted(position: int) -> Iterator[dict[str, np.ndarray]]:
        for number, batch in enumerate(batches(position), start=position):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    folder = tmp_path / "stopped"
    with pytest.raises(Preempted, match=r"step 5 of 9 is saved"):
        fit(retriever(), interrupted, folder=folder, **run)
    assert signal.getsignal(signal.SIGTERM) is before
    saved = checkpoints.Checkpoints(folder)
    assert saved.latest() == 5
    saved.close()
    fit(retriever(), batches, folder=folder, **run)
    fit(retriever(), batches, folder=tmp_path / "whole", **run)
    losses = [[p["loss"] for p in curve(f) if "loss" in p] for f in (folder, tmp_path / "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9
    assert same_parameters(folder, tmp_path / "whole", 9)


def same_parameters(first: Path, second: Path, step: int) -> bool:
    abstract = abstract_state(retriever(), partitioning.make_mesh(), SHAPES)
    trees = []
    for folder in (first, second):
        saved = checkpoints.Checkpoints(folder)
        trees.append(jax.tree.leaves(saved.restore(step, abstract.params, abstract.optimizer)))
        saved.close()
    return all(itertools.starmap(np.array_equal, zip(*trees, strict=True)))
