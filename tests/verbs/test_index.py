"""The verb `index`: which searchers it makes by default, and what it refuses before any work."""

import dataclasses

import gin
import pytest
from model_folders import random_params, write_model_folder

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.search import searcher as registry
from retrieval_jax.search.index_inputs import IndexSettings
from retrieval_jax.search.planned import PlannedSearcher
from retrieval_jax.search.searcher import register_searcher, searcher_class, searcher_kinds
from retrieval_jax.verbs.index import IndexConfig, check_settings, make_index, make_own_index, unread

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


@pytest.mark.parametrize(
    ("kind", "setting", "words"),
    [
        ("generative", {"parts": ("bm25",)}, "only a fused searcher has parts, and this is of the kind gen"),
        ("exact", {"plan_size": 5}, "only a planned searcher has plan_size, and this is of the kind exact"),
        ("exact", {"fit_split": "train"}, "only a fused or planned searcher has fit_split"),
        ("fused", {"sets": "bm25"}, "only a planned or lexical searcher has sets"),
        ("planned", {"dimensions": 8}, "only a searcher of vectors has dimensions"),
    ],
)
def test_settings_that_only_other_kinds_read_are_refused(kind: str, setting: dict, words: str):
    with pytest.raises(UserError, match=f"^make_index.{next(iter(setting))}: {words}"):
        check_settings(IndexConfig(source="x", **setting), searcher_class(kind))


def test_each_kind_reads_settings_that_there_are():
    names = {field.name for field in dataclasses.fields(IndexSettings)}
    assert all(names.issuperset(searcher_class(kind).reads_settings) for kind in searcher_kinds())


def test_a_kind_from_outside_reads_what_the_kind_that_it_extends_reads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))

    @register_searcher
    class Own(PlannedSearcher):
        kind = "own"

    assert unread(Own) == unread(PlannedSearcher)
    check_settings(IndexConfig(source="x", plan_size=5, sets="bm25", fit_split="train"), Own)


def test_what_gin_sets_for_other_kinds_keeps_no_searcher_of_several_from_being_made(own_work: Workspace):
    gin.parse_config("make_index.plan_size = 5\nmake_index.vector_dtype = 'int8'")
    given = {"source": "x", "work_dir": str(own_work.folder), "model_dir": None}
    with pytest.raises(UserError, match=r"^make_index.vector_dtype: only a searcher of vectors has"):
        make_index(kind="bm25", **given)
    assert make_own_index("bm25", **given)["searcher"] == str(own_work.searcher("bm25"))
    both = {"parts": ("bm25", "bm25~typo"), "fit_split": None}
    assert make_own_index("fused", **given, **both)["kind"] == "fused"
