"""What the tests of gin_configs/papers share."""

import importlib

import gin
import pytest

from retrieval_jax.verbs.table import CONFIGURABLE, VERBS


@pytest.fixture(autouse=True, scope="module")
def configurables():
    """All that a row may configure is imported."""
    for module in (*(module for module, _ in VERBS.values()), *CONFIGURABLE):
        importlib.import_module(module)
    yield
    gin.clear_config()
