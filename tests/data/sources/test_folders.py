"""Files of splits are found by their names."""

import re

import pytest
from reading import read, write
from test_layouts import MSMARCO, PASSAGES, QUERIES, TSV

from retrieval_jax.data.collection import Query
from retrieval_jax.data.sources.layouts import open_source


def test_dev_small_is_dev_unless_there_is_another(tmp_path):
    both = {"qrels.dev.tsv": "q5 0 d1 1\n", "queries.dev.tsv": "q5\twhy?\n"}
    _, queries = read(write(tmp_path, MSMARCO | both))
    assert queries == {
        "train": QUERIES["train"],
        "dev_small": QUERIES["dev"],
        "dev": [Query("q5", "why?", {"d1": 1})],
    }


@pytest.mark.parametrize("spelling", ["validation", "valid", "val", "dev"])
def test_dev_has_four_spellings(tmp_path, spelling):
    files = {name.replace("val", spelling): text for name, text in TSV.items()}
    assert read(write(tmp_path, files)) == (PASSAGES, QUERIES)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("squad_dev", "squad_dev"),
        ("2Wiki", "data_2wiki"),
        ("日本", "data"),
        ("_A..b_", "a_b"),
        ("a/../b", "b"),
    ],
)
def test_names_are_dataset_names(tmp_path, folder, name):
    (tmp_path / "a").mkdir()
    assert open_source(write(tmp_path / folder, TSV)).name == name
    assert re.fullmatch("[a-z][a-z0-9_]*", name)
