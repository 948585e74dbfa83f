"""The docids that a searcher is built from; sets of tokens are in test_search_lexical.py."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tables import KINDS

from retrieval_jax.checkpoints.model_folder import LoadedModel
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.search.index_inputs import IndexInputs


@pytest.fixture
def inputs(collection: Collection, tmp_path: Path) -> IndexInputs:
    """Of a model that was trained on atomic docids, which lie in the work folder."""
    work, table = Workspace(tmp_path), KINDS["atomic"](collection)
    write(work, table)
    description = {
        "docids": "atomic",
        "docids_fingerprint": table.fingerprint(),
        "collection": collection.fingerprint,
        "collection_name": "small_docs",
    }
    model = LoadedModel(None, {}, 1, None, description)
    return IndexInputs(collection, work, tmp_path / "searchers/atomic", model_dir="m", model=model)


def write(work: Workspace, table: DocidTable) -> None:
    storage.build_once(work.docids("atomic"), {"fingerprint": table.fingerprint()}, table.write)


def test_docids_are_those_of_the_training_or_extend_them(inputs: IndexInputs):
    trained = inputs.docids
    assert trained.fingerprint() == inputs.model.description["docids_fingerprint"]
    extended = trained.without([trained.passage_ids[0].as_py()])
    write(inputs.work, extended)
    assert dataclasses.replace(inputs).docids.fingerprint() == extended.fingerprint()


def test_docids_of_other_origin_are_refused(inputs: IndexInputs, collection: Collection):
    trained = inputs.docids
    other = dataclasses.replace(trained, tokens_NxL=np.flip(trained.tokens_NxL, axis=0))
    write(inputs.work, other)
    with pytest.raises(UserError, match=r"docids/atomic: not the docids that m was trained on: train it"):
        _ = dataclasses.replace(inputs).docids
    write(inputs.work, dataclasses.replace(trained, collection="another"))
    with pytest.raises(UserError, match=r"docids/atomic: of another collection than .*`retrieval-jax docids"):
        _ = dataclasses.replace(inputs).docids


def test_a_model_of_another_collection_is_told_before_its_docids_are_missed(inputs: IndexInputs):
    description = inputs.model.description | {"collection": "another"}
    model = dataclasses.replace(inputs.model, description=description)
    elsewhere = Workspace(inputs.work.folder / "elsewhere")
    with pytest.raises(UserError, match=r"^m: trained on another collection \(small_docs, or an earlier"):
        _ = dataclasses.replace(inputs, work=elsewhere, model=model).docids
