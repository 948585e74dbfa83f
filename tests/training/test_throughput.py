"""The throughput meter: tokens and steps a second, and the MFU."""

import time

import numpy as np
import pytest

from retrieval_jax.mesh import hardware, partitioning
from retrieval_jax.training.throughput import ThroughputMeter

BATCH = {
    "encoder_input_tokens": np.array([[5, 6, 0], [7, 0, 0]]),
    "decoder_target_tokens": np.array([[1, 2], [3, 0]]),
    "decoder_input_tokens": np.ones((2, 2), int),  # are the targets, shifted
}


def take_steps(meter: ThroughputMeter, steps: int) -> None:
    for _ in range(steps):
        with meter.step(BATCH):
            time.sleep(0.02)
            with meter.waiting():
                time.sleep(0.02)


def test_the_rates_are_of_the_steps_after_the_first_one():
    meter = ThroughputMeter(partitioning.all_devices(), minutes_before=3.0)
    assert "steps_per_second" not in meter.read()
    with meter.step(BATCH):
        time.sleep(0.5)  # compiles
    take_steps(meter, 4)
    time.sleep(0.3)  # an evaluation, which is part of no step
    rates = meter.read()
    assert 5 < rates["steps_per_second"] <= 25
    assert rates["tokens_per_second"] == pytest.approx(6 * rates["steps_per_second"])
    assert 0.2 < rates["input_wait"] < 0.8
    assert "steps_per_second" not in meter.read()  # each point has its own
    assert meter.minutes > 3.0 + 0.9 / 60


def test_the_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    chip = hardware.find_chip("TPU v4")
    monkeypatch.setattr(hardware, "find_chip", lambda kind: chip)
    mesh = partitioning.all_devices()
    meter = ThroughputMeter(mesh, 0.0, flops_per_step=lambda groups: 1e12)
    with meter.step(BATCH):
        pass
    take_steps(meter, 2)
    rates = meter.read()
    assert rates["mfu"] == pytest.approx(1e12 * rates["steps_per_second"] / (275e12 * mesh.size))
