"""StableHLO programs of a dual encoder give its vectors; other models are refused."""

from pathlib import Path

import numpy as np
import pytest
from jax import export
from model_folders import random_params, write_model_folder
from safetensors.numpy import load_file

from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core.errors import UserError
from retrieval_jax.embeddings.text_encoder import query_encoder
from retrieval_jax.interop import stablehlo
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator

CONFIG = T5Config(1152, 16, 2, 8, 20, 1, 1)


def loaded(model, folder: Path, collection):
    write_model_folder(folder, model, random_params(model), collection)
    return load_model(folder)


@pytest.mark.parametrize("pooling", ["mean", "decoder"])
def test_vectors_are_the_models(tmp_path, collection, pooling):
    """Of any number of texts, with the prompt that the manifest tells put before each."""
    model = DualEncoder(CONFIG, vector_dim=6, pooling=pooling, query_prompt="query: ", passage_prompt="")
    opened = loaded(model, tmp_path / "model", collection)
    (tmp_path / "out").mkdir()
    facts = stablehlo.write(tmp_path / "out", opened, None, {})
    assert facts["lengths"] == {"queries": 24, "passages": 32}
    assert facts["prompts"] == {"queries": "query: ", "passages": ""}
    program = export.deserialize(bytearray((tmp_path / "out" / "encode_queries.stablehlo").read_bytes()))
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    for texts in (["smooth a signal"], ["print a table", "a", "Adam with weight decay"]):
        prompted = [facts["prompts"]["queries"] + text for text in texts]
        tokens_BxS = opened.vocabulary.batch(prompted, facts["lengths"]["queries"])
        found = program.call(weights, np.asarray(tokens_BxS, np.int32))
        np.testing.assert_allclose(found, query_encoder(opened)(texts), rtol=0, atol=1e-5)
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}


def test_models_that_neither_encode_nor_search_are_refused(tmp_path, collection):
    opened = loaded(QueryGenerator(CONFIG), tmp_path / "model", collection)
    with pytest.raises(UserError, match="only a dual encoder or a searcher"):
        stablehlo.write(tmp_path, opened, None, {})
