"""A model folder is opened from what was saved with it, or refused in one line."""

import json
from pathlib import Path

import gin
import pytest
from model_folders import random_params, write_model_folder
from tiny_training import batches, retriever, train

from retrieval_jax.checkpoints import checksums
from retrieval_jax.checkpoints.model_folder import (
    DESCRIPTION,
    describe,
    load_model,
    read_description_and_step,
)
from retrieval_jax.core import configuration, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.objectives import cross_entropy, rdrop
from retrieval_jax.training import settings_file

SIZES = (1024, 16, 2, 8, 32, 1, 1)


@pytest.fixture
def folder(tmp_path: Path, collection: Collection) -> Path:
    model = DualEncoder(T5Config(*SIZES), None, vector_dim=8, scale=20.0)
    write_model_folder(tmp_path / "model", model, random_params(model), collection)
    return tmp_path / "model"


def test_gin_changes_nothing_of_a_saved_model(folder: Path, tmp_path: Path, collection: Collection):
    generative = GenerativeRetriever(T5Config(*SIZES), None)
    write_model_folder(tmp_path / "other", generative, random_params(generative), collection)
    with gin.unlock_config():
        for name, value in {
            "T5Config.dropout_rate": 0.5,
            "T5Config.remat": "full",
            "T5Config.emb_dim": 64,
            "DualEncoder.scale": 1.0,
            "DualEncoder.bidirectional": False,
            "GenerativeRetriever.objective": rdrop,
            "GenerativeRetriever.max_logits_per_block": 10,
        }.items():
            gin.bind_parameter(name, value)
    opened = load_model(folder).model
    assert (opened.scale, opened.vector_loss.bidirectional) == (20.0, True)
    assert opened.config == T5Config(*SIZES, dropout_rate=0.1, remat="none")
    before = configuration.texts_of_parameters(settings_file.LEARNING)
    other = load_model(tmp_path / "other").model
    # A run that opens another model does not count that model's parameters among its own.
    assert configuration.texts_of_parameters(settings_file.LEARNING) == before
    assert (other.objective, other.max_logits_per_block) == (cross_entropy, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "of format 3, and 2 is the last known here: upgrade"),
        ({"format": 1}, "made by an earlier version of retrieval_jax: train or convert the model again"),
        ({"retriever": "Oracle"}, "no retriever 'Oracle' is known here"),
        ({"settings": {"vector_dim": 8, "telepathy": 1}}, "settings: telepathy is not known here"),
        ({"network": {"vocab_size": 8, "quantum": 1}}, "network: quantum is not known here"),
    ],
)
def test_what_another_version_wrote_is_one_line(folder: Path, change: dict, message: str):
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_step_that_is_about_to_be_sealed_is_not_taken_yet(tmp_path: Path):
    """A training that runs writes a step's checksums last; what is made of the model is known by them."""
    train(retriever(), batches, lambda params: {}, tmp_path, steps=4, save_every=2)
    storage.write_json(tmp_path / DESCRIPTION, describe(retriever()))
    assert read_description_and_step(tmp_path)[1] == 4
    (tmp_path / "checkpoints" / "4" / checksums.NAME).unlink()
    assert read_description_and_step(tmp_path)[1] == 2
    assert read_description_and_step(tmp_path, 4)[1] == 4  # asked for by name
    (tmp_path / "checkpoints" / "2" / checksums.NAME).unlink()
    assert read_description_and_step(tmp_path)[1] == 4  # as of versions that wrote none
