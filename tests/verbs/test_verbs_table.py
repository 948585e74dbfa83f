"""Every verb of the table is known to gin, and its --help has all its settings."""

import importlib
import inspect
import re

import gin
import pytest

from retrieval_jax.core import configuration
from retrieval_jax.main import documentation
from retrieval_jax.verbs.table import DEFAULT_FILES, VERBS, configure_verbs


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_every_setting(verb: str):
    module, name = VERBS[verb]
    importlib.import_module(module)
    settings = inspect.signature(gin.get_configurable(name)).parameters
    documented = re.findall(r"^ *(\w+): ", documentation(verb)[1], re.MULTILINE)
    assert set(settings) <= set(documented)


def test_every_verb_is_configured_whichever_runs():
    configure_verbs([], ["SEED=3"])
    assert gin.query_parameter("%SEED") == 3
    for _, name in VERBS.values():
        gin.get_configurable(name)  # raises ValueError for a name that gin does not know
    for files in DEFAULT_FILES.values():
        configuration.configure(files, [])
