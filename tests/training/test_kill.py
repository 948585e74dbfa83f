"""kill -9 while training: the next run goes on from the last checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from retrieval_jax.work import Work


@pytest.mark.slow
def test_a_killed_training_goes_on(work: Work, arguments: list[str], cli, tmp_path):
    assert cli("docids", *arguments)[0] == 0
    model = tmp_path / "killed"
    argv = [
        "train",
        *arguments,
        "--gin_file=runs/naive.gin",
        f"--gin.MODEL_DIR='{model}'",
        "--gin.train.save_every=10",
        "--gin.train.eval_every=1000",
        "--gin.STEPS=400",
    ]
    process = subprocess.Popen([sys.executable, "-m", "retrieval_jax.main", *argv])
    deadline = time.monotonic() + 120
    while not (model / "checkpoints" / "20").exists():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    status, result, err = cli(*argv)
    assert status == 0
    assert result["step"] == 400
    assert "going on from step" in err
    steps = [json.loads(line)["step"] for line in (model / "learning_curve.jsonl").read_text().splitlines()]
    losses = [step for step in steps if step % 10 == 0]
    assert sorted(set(losses)) == list(range(10, 401, 10))  # none lost, none but the last (dev) twice
    assert len(losses) <= 41
