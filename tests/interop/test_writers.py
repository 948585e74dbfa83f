"""What a writer of exported folders gives, and what it refuses; whole exports: tests/verbs/test_export.py."""

from pathlib import Path

import pytest
from model_folders import random_params, same, write_model_folder

from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.checkpoints.weights import lazy_arrays
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.interop.writers import WRITERS, Subject, layers_of, write_model
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.models.query_generator import QueryGenerator

SIZES = T5Config(1152, 16, 2, 8, 32, 2, 2)


@pytest.fixture(params=[DualEncoder, QueryGenerator])
def subject(request, tmp_path: Path, collection: Collection) -> Subject:
    model = request.param(SIZES)
    write_model_folder(tmp_path / "model", model, random_params(model), collection)
    return Subject(tmp_path / "model", None)


def test_a_model_is_written_as_it_is(subject: Subject, tmp_path: Path):
    opened = subject.open()
    write_model(tmp_path / "copy", subject.model_dir, opened)
    same(lazy_arrays(load_model(tmp_path / "copy").params), lazy_arrays(opened.params))
    assert "encoder/layers_1/pre_mlp_layer_norm/scale" in layers_of(opened.params)


def test_a_format_of_another_kind_of_model_is_refused(subject: Subject, tmp_path: Path):
    dense = isinstance(subject.open().model, DualEncoder)
    format, other = ("huggingface", "sentence_transformers")[:: 1 if dense else -1]
    with pytest.raises(UserError, match=f"{subject.model_dir}: .*--gin.export.format=\"'{other}'\""):
        WRITERS[format](tmp_path, subject)
    with pytest.raises(UserError, match="no searcher: name one"):
        WRITERS["searcher"](tmp_path, subject)


def test_vectors_of_a_decoder_are_no_sentence_transformers(tmp_path: Path, collection: Collection):
    model = DualEncoder(SIZES, pooling="decoder")
    write_model_folder(tmp_path / "model", model, random_params(model), collection)
    for format in ("sentence_transformers", "huggingface"):
        with pytest.raises(UserError, match=r"--gin.export.format=\"'stablehlo'"):
            WRITERS[format](tmp_path, Subject(tmp_path / "model", None))


def test_a_lexical_encoder_is_exported_as_a_searcher_alone(tmp_path: Path, collection: Collection):
    """Its vectors are as wide as the vocabulary, and no other program has its head."""
    model = LexicalEncoder(T5Config(1152, 16, 2, 8, 20, 0, 1))
    write_model_folder(tmp_path / "model", model, random_params(model), collection)
    for format in WRITERS.keys() - {"searcher"}:
        with pytest.raises(UserError, match=r"model: a lexical encoder, .*--gin.export.format=\"'searcher'"):
            WRITERS[format](tmp_path, Subject(tmp_path / "model", None))


def test_bm25_has_no_weights(tmp_path: Path):
    for format in WRITERS.keys() - {"searcher", "stablehlo"}:
        with pytest.raises(UserError, match="BM25 has no weights"):
            WRITERS[format](tmp_path, Subject(None, None, tmp_path))
