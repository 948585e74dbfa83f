"""--help has all settings of each verb, with what sets them, also those that a class inherits."""

import importlib
import inspect
import re

import gin
import pytest

from retrieval_jax.verbs.documentation import documentation
from retrieval_jax.verbs.table import VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_every_setting(verb: str):
    module, name = VERBS[verb]
    importlib.import_module(module)
    settings = inspect.signature(gin.get_configurable(name)).parameters
    documented = re.findall(r"^ *(\w+): ", documentation(verb)[1], re.MULTILINE)
    assert set(settings) <= set(documented)


def test_help_names_the_macro_that_sets_a_parameter():
    text = documentation("evaluate")[1]
    assert "  evaluate.split = 'test'   (--SPLIT)\n" in text
    assert "  evaluate.source   (--COLLECTION)\n" in text
    assert "  evaluate.min_relevant_grade = 1\n" in text


def test_a_class_has_the_settings_of_its_base_with_its_own_defaults_and_words():
    text = documentation("pag")[1]
    assert text.startswith("Trains a generative retriever that plans ahead")
    assert "  pag.rounds = 1\n" in text
    assert "  pag.docids = 'rq_8x256'   (--DOCIDS)\n" in text
    assert "pag.verb" not in text
    described = re.findall(r"^  (\w+): ", text.partition("Args:\n")[2], re.MULTILINE)
    assert len(described) == len({*described})
    assert "  teacher: a searcher in searchers/" in text
    ripor = documentation("ripor")[1]
    assert "  ripor.rounds = 2\n" in ripor
    assert "set_weights" not in ripor
