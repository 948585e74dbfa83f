"""The verb `index`: which searchers it makes by default, and what it refuses before any work."""

import pytest
from model_folders import random_params, write_model_folder

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator

EXPANSION = "--gin.make_index.expansion='words'"


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("--gin.make_index.expansion='nothing'", ["synthetic/nothing", "retrieval-jax generate-queries"]),
        ("--gin.MODEL_DIR='models/naive'", ["make_index.expansion", "MODEL_DIR=None"]),
    ],
)
def test_an_expansion_that_cannot_be(work: Workspace, arguments, cli, binding: str, words: list[str]):
    status, _, err = cli("index", *arguments, EXPANSION, binding)
    assert status == 2
    for word in words:
        assert word in err


@pytest.fixture(scope="module")
def models(collection, tmp_path_factory):
    """Folders of a dual encoder and of a query generator, with random weights."""
    config, folders = T5Config(1152, 16, 2, 8, 20, 1, 1), {}
    for name, model in {
        "dense": DualEncoder(config, None, vector_dim=8),
        "doc2query": QueryGenerator(config),
    }.items():
        folders[name] = tmp_path_factory.mktemp("models") / name
        write_model_folder(folders[name], model, random_params(model, 0), collection)
    return folders


def test_the_default_kind_is_the_models(models, work: Workspace, arguments, cli):
    assert cli("index", *arguments)[1]["kind"] == "bm25"
    status, made, err = cli("index", *arguments, f"--gin.MODEL_DIR='{models['dense']}'")
    assert status == 0, err
    assert (made["kind"], made["searcher"]) == ("scann", str(work.searcher("scann")))


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        (None, "exact", "MODEL_DIR: the searcher exact needs a model"),
        ("dense", "bm25", "MODEL_DIR: the searcher bm25 has no model: --MODEL_DIR=None"),
        ("dense", "generative", "holds a dual encoder model, not one for the searcher generative"),
        ("doc2query", None, "holds a query generator, which finds no passages: name a retriever's"),
        ("doc2query", "scann", "holds a query generator model, not one for the searcher scann"),
    ],
)
def test_a_kind_that_does_not_go_with_the_model(models, arguments, cli, model, kind, words):
    bindings = [f"--gin.MODEL_DIR='{models[model]}'"] if model else []
    bindings += [f"--gin.make_index.kind='{kind}'"] if kind else []
    status, _, err = cli("index", *arguments, *bindings)
    assert status == 2
    assert words in err
