"""Settings are plain values; gin fills only the spike guard's constructor."""

import dataclasses

import gin
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.training.loss_spike_guard import LossSpikeGuard
from retrieval_jax.training.settings import TrainSettings


def test_settings_are_values_that_do_not_change():
    settings = TrainSettings(steps=7)
    assert settings == dataclasses.replace(TrainSettings(), steps=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.steps = 8


def test_the_guard_is_gins_unless_it_is_given():
    with gin.unlock_config():
        gin.bind_parameter("LossSpikeGuard.window", 4)
        gin.bind_parameter("LossSpikeGuard.on_spike", "skip")
        gin.bind_parameter("LossSpikeGuard.max_skipped", 3)
    try:
        assert TrainSettings().spike_guard == LossSpikeGuard(3.0, 4, 1000, "skip", 3)
        given = LossSpikeGuard(window=9, on_spike="stop")
        assert TrainSettings(spike_guard=given).spike_guard.window == 9
        with gin.unlock_config():
            gin.bind_parameter("LossSpikeGuard.max_skipped", 4)
        with pytest.raises(UserError, match="4 of the last 4 steps would never end a run"):
            TrainSettings()
    finally:
        gin.clear_config()
