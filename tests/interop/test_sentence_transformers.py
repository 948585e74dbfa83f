"""Dual encoders of sentence-transformers: its vectors of texts are ours, both ways; a golden, and live."""

import json
import shutil

import jax
import numpy as np
import pytest
from model_folders import GOLDENS, random_params, same, write_model_folder

from retrieval_jax.errors import UserError
from retrieval_jax.interop import sentence_transformers
from retrieval_jax.interop.convert import convert
from retrieval_jax.interop.export import export
from retrieval_jax.interop.pretrained import open_pretrained
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.encoding import query_encoder
from retrieval_jax.training.model_folder import open_model
from retrieval_jax.training.weights import arrays_of

TEXTS = ["Smooth a noisy signal.", "adam with Weight decay", "x", "a longer text than any of the others " * 9]


@pytest.fixture(scope="module")
def gtr(tmp_path_factory):
    """GTR's golden as a model folder."""
    folder = tmp_path_factory.mktemp("models") / "gtr"
    made = convert("unused", str(GOLDENS / "gtr"), model_dir=str(folder))
    assert made["format"] == "sentence-transformers"
    assert made["retriever"] == "DualEncoder"
    return folder


def test_vectors_are_theirs(gtr):
    expected = np.load(GOLDENS / "gtr" / "expected.npz")
    opened = open_model(gtr)
    assert opened.description["input_length"] == opened.description["passage_length"] == 12
    found = query_encoder(opened)(expected["texts"].tolist())
    np.testing.assert_allclose(found, expected["vectors"], rtol=0, atol=1e-5)
    apart = np.abs(expected["vectors"] @ expected["vectors"].T - np.eye(3)).max()
    assert apart < 0.99


def test_other_encoders_are_refused(tmp_path):
    folder = tmp_path / "other"

    def refused(match: str, name: str, change) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDENS / "gtr", folder)
        path = folder / name
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=match):
            open_pretrained(folder)

    refused("pools otherwise", "1_Pooling/config.json", lambda c: c.update(pooling_mode="cls"))
    older = {"pooling_mode": "mean", "pooling_mode_max_tokens": True}
    refused("pools otherwise", "1_Pooling/config.json", lambda c: c.update(older))
    refused("has a bias", "2_Dense/config.json", lambda c: c.update(bias=True))
    tanh = {"activation_function": "torch.nn.modules.activation.Tanh"}
    refused("has a bias or an activation", "2_Dense/config.json", lambda c: c.update(tanh))
    refused("modules Transformer, Pooling, CNN", "modules.json", lambda m: m[2].update(type="a.b.CNN"))


def test_without_a_matrix_vectors_are_the_means(tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(GOLDENS / "gtr", folder)
    path = folder / "modules.json"
    path.write_text(json.dumps([m for m in json.loads(path.read_text()) if not m["type"].endswith("Dense")]))
    pretrained = open_pretrained(folder)
    assert pretrained.settings == {"vector_dim": 16, "normalize": True}
    np.testing.assert_array_equal(pretrained.arrays["projection_layer/kernel"].whole(), np.eye(16))


@pytest.fixture(params=["shared", "separate", "raw"])
def exported(request, tmp_path, collection):
    """(a dual encoder's folder, the folders of sentence-transformers that were made of its towers)."""
    options = {"shared": {}, "separate": {"shared_towers": False}, "raw": {"normalize": False}}
    config = T5Config(1152, 16, 2, 8, 20, 2, 0, scan_layers=request.param == "raw")
    model = DualEncoder(config, vector_dim=6, **options[request.param])
    params = random_params(model)
    if request.param == "separate":
        params["right_tower"] = jax.tree.map(lambda x: 1.1 * x[::-1], params["right_tower"])
    folder = tmp_path / "model"
    write_model_folder(folder, model, params, collection)
    export("unused", model_dir=str(folder), format="sentence_transformers", output=str(tmp_path / "out"))
    names = ("queries", "passages") if request.param == "separate" else ("", "")
    return folder, [tmp_path / "out" / name for name in names]


def test_written_and_read_again(exported):
    folder, towers = exported
    params = arrays_of(open_model(folder).params)
    for name, written in zip(("left_tower/", "right_tower/"), towers, strict=True):
        own = {k.removeprefix(name): v for k, v in params.items() if k.startswith(name)} or params
        again = open_pretrained(written)
        assert again.settings["normalize"] == open_model(folder).model.module.normalize
        if "encoder/encoder/mlp/wo/kernel" not in own:
            same(again.arrays, own)


def test_sentence_transformers_opens_ours(exported):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    folder, towers = exported
    opened = open_model(folder)
    for tower, encode in zip(
        towers, (opened.model.encode_queries, opened.model.encode_passages), strict=True
    ):
        theirs = library.SentenceTransformer(str(tower))
        length = theirs.max_seq_length
        tokens = opened.vocabulary.batch(TEXTS, length)
        found = theirs.encode(TEXTS)
        np.testing.assert_allclose(
            found, encode(opened.params, tokens), rtol=0, atol=2e-5 * np.abs(found).max()
        )


def test_the_golden_is_what_sentence_transformers_gives():
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    expected = np.load(GOLDENS / "gtr" / "expected.npz")
    model = library.SentenceTransformer(str(GOLDENS / "gtr"))
    np.testing.assert_allclose(model.encode(expected["texts"].tolist()), expected["vectors"], atol=1e-5)


def test_is_model_needs_its_list(tmp_path):
    assert sentence_transformers.is_model(GOLDENS / "gtr")
    assert not sentence_transformers.is_model(GOLDENS / "t5_1_1")
