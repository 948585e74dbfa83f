"""SIGTERM ends a run after a step that is saved, and the same call goes on from there."""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_training import SHAPES, batches, curve, retriever, train

from retrieval_jax.checkpoints import checkpoints
from retrieval_jax.core.errors import Preempted
from retrieval_jax.mesh import partitioning
from retrieval_jax.training.step import abstract_state


@pytest.mark.parametrize("log_every", [1, 4])
def test_sigterm_saves_the_running_step_and_the_same_call_goes_on(log_every: int, tmp_path: Path):
    run = {"evaluator": lambda params: {}, "steps": 9, "save_every": 100, "log_every": log_every}

    def interrupted(position: int) -> Iterator[dict[str, np.ndarray]]:
        for number, batch in enumerate(batches(position), start=position):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    folder = tmp_path / "stopped"
    with pytest.raises(Preempted, match=r"step 5 of 9 is saved"):
        train(retriever(), interrupted, folder=folder, **run)
    assert signal.getsignal(signal.SIGTERM) is before
    saved = checkpoints.Checkpoints(folder)
    assert saved.latest() == 5
    saved.close()
    train(retriever(), batches, folder=folder, **run)
    train(retriever(), batches, folder=tmp_path / "whole", **run)
    losses = [[p["loss"] for p in curve(f) if "loss" in p] for f in (folder, tmp_path / "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9 // log_every  # of the mean of four steps, one before the stop
    assert same_parameters(folder, tmp_path / "whole", 9)


def same_parameters(first: Path, second: Path, step: int) -> bool:
    abstract = abstract_state(retriever(), partitioning.make_mesh(), SHAPES)
    trees = []
    for folder in (first, second):
        saved = checkpoints.Checkpoints(folder)
        trees.append(jax.tree.leaves(saved.restore(step, abstract.params, abstract.optimizer)))
        saved.close()
    return all(itertools.starmap(np.array_equal, zip(*trees, strict=True)))
