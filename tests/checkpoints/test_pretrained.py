"""Weights of every format are told apart, and what is known of their models is read."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from model_folders import GOLDENS, random_params, write_model_folder

from retrieval_jax.checkpoints import t5x_checkpoints
from retrieval_jax.checkpoints.pretrained import fingerprint, network_of, open_pretrained
from retrieval_jax.checkpoints.weights import LazyArray, lazy_arrays
from retrieval_jax.core.errors import UserError
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config

CONFIG = T5Config(40, 12, 2, 5, 18, 3, 2)


def test_each_format_is_recognised(tmp_path, collection):
    model = GenerativeRetriever(CONFIG)
    (tmp_path / "t5x" / "checkpoint_7").mkdir(parents=True)
    t5x_checkpoints.write(tmp_path / "t5x" / "checkpoint_7", lazy_arrays(random_params(model)), 7)
    dense = DualEncoder(dataclasses.replace(CONFIG, num_decoder_layers=0), vector_dim=4)
    write_model_folder(tmp_path / "own", dense, random_params(dense), collection)
    found = {
        name: open_pretrained(path)
        for name, path in {
            "t5x": tmp_path / "t5x",
            "own": tmp_path / "own",
            "t5": GOLDENS / "t5_1_1",
            "gtr": GOLDENS / "gtr",
        }.items()
    }
    assert {name: (x.format, x.step, x.length) for name, x in found.items()} == {
        "t5x": ("T5X", 7, None),
        "own": ("retrieval_jax", 7, 24),
        "t5": ("Hugging Face", 0, None),
        "gtr": ("sentence-transformers", 0, found["gtr"].length),
    }
    assert found["gtr"].length == json.loads((GOLDENS / "gtr" / "sentence_bert_config.json").read_text()).get(
        "max_seq_length", found["gtr"].length
    )
    assert found["t5x"].vocabulary is None
    assert found["gtr"].vocabulary == GOLDENS / "gtr" / "spiece.model"
    assert found["own"].settings["vector_dim"] == 4


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        T5Config(50, 12, 4, 3, 20, 3, 2, mlp_activations=("relu",), logits_via_embedding=True),
        dataclasses.replace(CONFIG, num_decoder_layers=0),
        dataclasses.replace(CONFIG, output_size=9),
        dataclasses.replace(CONFIG, output_size=9, separate_target_embedding=True),
        dataclasses.replace(CONFIG, relpos_buckets=8),
    ],
)
def test_the_network_is_inferred_from_shapes(config):
    """As far as shapes tell: the same model is built from what was inferred."""
    model = GenerativeRetriever(config) if config.num_decoder_layers else DualEncoder(config, vector_dim=4)
    arrays = lazy_arrays(random_params(model))
    inferred = network_of(Path("there"), arrays)
    assert {name: value for name, value in vars(config).items() if name in inferred} == inferred


def test_arrays_that_are_no_t5s():
    arrays = {"encoder/conv/kernel": LazyArray.from_numpy(np.zeros((3, 4)))}
    with pytest.raises(UserError, match=r"^there: has no '\S+': it is no T5 of T5X's names"):
        network_of(Path("there"), arrays)


def test_the_fingerprint_follows_the_content(tmp_path):
    folder = shutil.copytree(GOLDENS / "gtr", tmp_path / "gtr")
    before = fingerprint(open_pretrained(folder))
    assert fingerprint(open_pretrained(GOLDENS / "gtr")) == before  # wherever it lies
    (folder / "README.md").write_text("# a card that people edit")
    assert fingerprint(open_pretrained(folder)) == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert fingerprint(open_pretrained(folder)) != before
