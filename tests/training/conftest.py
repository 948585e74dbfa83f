"""Each test here begins without gin bindings, and each program is compiled once, for subprocesses too."""

import atexit
import os
import shutil
import tempfile

import gin
import pytest

# Most tests compile the same small step.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def no_bindings_in_this_module() -> None:
    """A verb that ran in another test left the optimiser's settings behind."""
    gin.clear_config()


@pytest.fixture(autouse=True)
def no_bindings() -> None:
    gin.clear_config()
