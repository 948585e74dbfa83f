"""kill -9 while training, also during a save: the same command ends with the same numbers, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.core.workspace import Workspace

STEPS = 240
IN_BACKGROUND = """
import sys
from retrieval_jax.main import main
from retrieval_jax.checkpoints import checkpoints
checkpoints.in_background = lambda: True
sys.exit(main(sys.argv[1:]))
"""


def ends(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def killed_in_a_save(process: subprocess.Popen, folder: Path) -> bool:
    """Kills it while Orbax's temporary folder of a checkpoint is there; gives whether it still is."""
    seen = set(folder.glob("*tmp*"))
    while not (saving := set(folder.glob("*tmp*")) - seen):
        assert process.poll() is None, "ended before it was killed"
    ends(process)
    # Orbax renames the folder when it is whole: what is still there was being written.
    return any(path.exists() for path in saving)


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_as_if_it_had_not_been(
    work: Workspace, arguments: list[str], cli, tmp_path
):
    assert cli("docids", *arguments)[0] == 0

    def argv(model: Path) -> list[str]:
        return [
            "train",
            *arguments,
            "--gin_file=runs/naive.gin",
            f"--gin.MODEL_DIR='{model}'",
            "--gin.train.save_every=3",
            "--gin.train.eval_every=1000",
            "--gin.train.log_every=1",
            "--gin.T5Config.dropout_rate=0.1",
            "--gin.DataConfig.token_dropout={'firstp': 0.2}",
            f"--gin.STEPS={STEPS}",
        ]

    assert cli(*argv(tmp_path / "whole"))[0] == 0

    model = tmp_path / "killed"
    folder = model / "checkpoints"
    draw = random.Random(0)
    in_saves = 0
    for attempt in range(8):
        background = attempt % 4 > 1  # as on a TPU or GPU
        command = [sys.executable, *(["-c", IN_BACKGROUND] if background else ["-m", "retrieval_jax.main"])]
        process = subprocess.Popen([*command, *argv(model)], stderr=subprocess.PIPE)
        began = checkpoints_of(folder)
        while checkpoints_of(folder) <= began:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        if attempt % 2:
            in_saves += killed_in_a_save(process, folder)
        else:
            time.sleep(draw.uniform(0, 0.7))
            ends(process)
        process.stderr.close()
    assert in_saves >= 2

    status, result, err = cli(*argv(model))
    assert status == 0
    assert result["step"] == STEPS
    assert "going on from step" in err
    assert losses(model) == losses(tmp_path / "whole")
    first, second = (model_folder.load_model(tmp_path / name) for name in ("killed", "whole"))
    assert first.step == second.step == STEPS
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not (model / "damaged_checkpoints").exists()


def checkpoints_of(folder: Path) -> int:
    """The newest checkpoint's step, or -1."""
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=-1)


def losses(model: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient's norm) of each point of the learning curve: none lost, none twice."""
    points = [json.loads(line) for line in (model / "learning_curve.jsonl").read_text().splitlines()]
    found = [(p["step"], p["loss"], p["gradient_norm"]) for p in points if "loss" in p]
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    return found
