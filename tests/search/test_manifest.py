"""A searcher whose model or collection is no longer what it was made of; parts are in test_fused.py."""

import shutil
from pathlib import Path

import pytest
from model_folders import random_params, write_model_folder
from tables import stand_in

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.manifest import searcher_manifest
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.run import docid_softmax


def test_a_generative_model_that_is_another_at_the_same_step_is_noticed(own, collection, tmp_path, cli):
    assert cli("import", *own)[0] == 0
    assert cli("docids", *own, "--gin.DOCIDS='atomic'")[0] == 0
    table, folder = DocidTable.open(tmp_path / "work/docids/atomic"), tmp_path / "model"
    model = GenerativeRetriever(T5Config(1152, 16, 2, 8, 20, 1, 1, **docid_softmax(table)))

    def trained(seed: int) -> None:
        facts = {"docids": "atomic", "docids_fingerprint": table.fingerprint()}
        write_model_folder(folder, model, random_params(model, seed), collection, **facts)

    index = ["index", *own, f"--gin.MODEL_DIR='{folder}'"]
    search = ["search", *own, "--gin.SEARCHER='atomic'"]
    export = ["export", *own, "--gin.SEARCHER='atomic'"]
    trained(0)
    for command in (index, search, export):
        assert cli(*command)[0] == 0
    first = (tmp_path / "work/runs/atomic.test.trec").read_text()
    exported = shutil.copytree(tmp_path / "work/exports/atomic", tmp_path / "carried")
    found = Searcher.open(exported).search(["smooth a signal"], 5)

    trained(1)
    for command in (search, export, ["mine", *own, "--gin.SEARCHER='atomic'"]):
        status, _, err = cli(*command)
        assert status == 2
        assert "not the model (of step 7) that" in err
        assert "`retrieval-jax index`" in err
    for command in (index, search, export):
        assert cli(*command)[0] == 0
    assert (tmp_path / "work/runs/atomic.test.trec").read_text() != first
    # What was exported holds all that it answers with; exported again it is the new model's.
    assert Searcher.open(exported).search(["smooth a signal"], 5) == found
    again = Searcher.open(tmp_path / "work/exports/atomic").search(["smooth a signal"], 5)
    assert again == Searcher.open(tmp_path / "work/searchers/atomic").search(["smooth a signal"], 5) != found


def test_a_searcher_of_another_collection_is_told(tmp_path: Path):
    now, before = stand_in(["a", "b"]), stand_in(["a"])
    now.folder = tmp_path / "collection"
    for of in (now, before):
        folder = tmp_path / f"bm25_{len(of.ids)}"
        storage.build_once(folder, {"collection": of.fingerprint}, lambda _: {"kind": "bm25"})
    assert searcher_manifest(tmp_path / "bm25_2", now)["kind"] == "bm25"
    with pytest.raises(UserError, match=r"bm25_1: made of another collection than .*: `retrieval-jax index`"):
        searcher_manifest(tmp_path / "bm25_1", now)


def test_weights_that_were_chosen_with_other_queries_are_told(tmp_path: Path):
    of = stand_in(["a", "b"])
    of.folder, of.query_fingerprints = tmp_path / "collection", {"train": "t", "dev": "now"}
    for then in ("now", "then"):
        recipe = {"collection": of.fingerprint, "queries": {"dev": then}}
        storage.build_once(tmp_path / then, recipe, lambda _: {"kind": "fused"})
    assert searcher_manifest(tmp_path / "now", of)["kind"] == "fused"
    with pytest.raises(UserError, match=r"then: its weights were chosen with other dev queries than "):
        searcher_manifest(tmp_path / "then", of)
    part = {"recipe": {"collection": of.fingerprint, "queries": {"dev": "then"}}}
    recipe = {"collection": of.fingerprint, "parts": [part]}
    storage.build_once(tmp_path / "whole", recipe, lambda _: {"kind": "fused"})
    with pytest.raises(UserError, match="whole: its weights were chosen with other dev queries than "):
        searcher_manifest(tmp_path / "whole", of)
