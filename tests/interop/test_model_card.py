"""Model cards: what they say, their header as the hub reads it, and their code, which is run."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from model_folders import random_params, write_model_folder

from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.embeddings.text_encoder import query_encoder
from retrieval_jax.interop import model_card
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.verbs.export import export

CONFIG = T5Config(1152, 16, 2, 8, 20, 1, 1)
INITIAL = "hf:google/t5-v1_1-base@" + "0" * 40


@pytest.fixture(scope="module")
def models(collection, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in {
        "generator": QueryGenerator(CONFIG),
        "dense": DualEncoder(CONFIG, vector_dim=6, query_prompt="it's a query: ", passage_prompt="passage: "),
        "towers": DualEncoder(CONFIG, vector_dim=6, shared_towers=False, matryoshka=(2, 4)),
    }.items():
        write_model_folder(folder / name, model, random_params(model), collection, initial_checkpoint=INITIAL)
    points = [{"step": 3, "dev/MRR@10": 0.1}, {"step": 7, "loss": 2.0}, {"step": 7, "dev/MRR@10": 0.25}]
    curve = folder / "dense" / "learning_curve.jsonl"
    curve.write_text("".join(json.dumps(point) + "\n" for point in points))
    return folder


def exported(models: Path, name: str, format: str, folder: Path) -> str:
    """The card of an exported model."""
    export("unused", model_dir=str(models / name), format=format, output=str(folder))
    return (folder / "README.md").read_text()


def run(card: str, folder: Path) -> dict:
    """Runs the code of a card in its folder; what its names are then."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    with contextlib.chdir(folder):
        exec(code, names)
    return names


def test_what_it_says(models, tmp_path):
    card = exported(models, "dense", "t5x", tmp_path / "made")
    for line in (
        "# dense",
        "| collection | small_docs |",
        "| training steps | 7 |",
        f"| initial weights | {INITIAL} |",
        "| network | T5, width 16, 1 encoder and 1 decoder layers |",
        "| tokens at most | 24 of queries, 32 of passages |",
        "| metric | dev |",
        "| MRR@10 | 0.250 |",
    ):
        assert line in card.splitlines(), line
    assert "A dual encoder: " in card


def test_metrics_of_a_pool_are_said_to_be_of_it(tmp_path):
    point = {"step": 7, "dev_pool/MRR@10": 0.25, "dev_pool/passages": 5000, "dev_pool/pool_digest": 5}
    (tmp_path / "learning_curve.jsonl").write_text(json.dumps(point) + "\n")
    metrics = model_card.dev_metrics(tmp_path, 7)
    assert metrics == {"dev, in a pool of 5,000 passages": {"MRR@10": 0.25}}
    assert model_card.dev_metrics(tmp_path, 8) == {}


def test_the_header_is_the_hubs(models, tmp_path):
    ModelCard = pytest.importorskip("huggingface_hub").ModelCard
    card = exported(models, "dense", "sentence_transformers", tmp_path / "dense")
    assert ModelCard(card).data.to_dict() == {
        "library_name": "sentence-transformers",
        "base_model": "google/t5-v1_1-base",
        "pipeline_tag": "sentence-similarity",
        "tags": ["retrieval_jax", "information-retrieval", "dense-retrieval"],
    }
    card = exported(models, "generator", "huggingface", tmp_path / "generator")
    assert ModelCard(card).data.library_name == "transformers"


@pytest.mark.parametrize(
    ("initial", "told"),
    [
        (None, "random"),
        ("/home/somebody/t5/checkpoint_1000000/", "checkpoint_1000000"),
        ("gs://t5-data/t5_1_1_base", "gs://t5-data/t5_1_1_base"),
        (INITIAL, INITIAL),
    ],
)
def test_initial_weights_have_a_name_that_others_can_use(tmp_path, initial, told):
    model_card.write(tmp_path, "mine", "searcher", {"initial_checkpoint": initial}, {}, {})
    assert f"| initial weights | {told} |" in (tmp_path / "README.md").read_text().splitlines()


def test_of_bm25_and_of_kinds_that_it_does_not_know(tmp_path):
    metrics = {"test": {"MRR@10": 0.5, "Hits@1": 0.25}}
    model_card.write(tmp_path, "words", "searcher", {}, {"kind": "bm25", "step": None}, metrics)
    card = (tmp_path / "README.md").read_text()
    assert "A BM25 index: " in card
    assert "| metric | test |\n|---|---|\n| MRR@10 | 0.500 |\n| Hits@1 | 0.250 |" in card
    assert "initial weights" not in card
    model_card.write(tmp_path, "mine", "searcher", {}, {"kind": "of_a_package"}, {})
    assert "A of_a_package of retrieval_jax." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "format", "needs"),
    [
        ("generator", "huggingface", ("torch", "transformers")),
        ("dense", "sentence_transformers", ("torch", "sentence_transformers")),
        ("towers", "sentence_transformers", ("torch", "sentence_transformers")),
        ("dense", "t5x", ()),
        ("dense", "stablehlo", ()),
    ],
)
def test_its_code_runs(models, tmp_path, capsys, name, format, needs):
    for package in needs:
        pytest.importorskip(package)
    names = run(exported(models, name, format, tmp_path / "made"), tmp_path / "made")
    printed = capsys.readouterr().out
    assert printed.strip()
    if format == "sentence_transformers":
        assert (names["queries"] @ names["passages"].T).shape == (1, 2)
    if name == "towers":  # their first dimensions, as its comment says
        model = names["SentenceTransformer"](str(tmp_path / "made" / "queries"))
        short = model.encode_query([model_card._QUERY], truncate_dim=2, normalize_embeddings=True)
        ours = query_encoder(load_model(models / name), None, 2)([model_card._QUERY])
        np.testing.assert_allclose(short, ours, rtol=0, atol=1e-5)
        assert (
            "encode_…(…, truncate_dim=2, normalize_embeddings=True)"
            in (tmp_path / "made" / "README.md").read_text()
        )
    if format == "stablehlo":
        expected = query_encoder(load_model(models / name))([model_card._QUERY])
        np.testing.assert_allclose(names["vectors"], expected, rtol=0, atol=1e-5)
    if format == "t5x":
        assert "projection_layer/kernel (16, 6)" in printed


def test_people_may_edit_it(models, tmp_path):
    exported(models, "dense", "t5x", tmp_path / "made")
    manifest = storage.read_manifest(tmp_path / "made", "export")
    (tmp_path / "made" / "README.md").write_text("# Mine")
    (tmp_path / "made" / ".gitattributes").write_text("*.safetensors filter=lfs")
    for name in (".git/config", ".cache/huggingface/download/model.json.metadata"):  # of a copy from the hub
        storage.atomic_write(tmp_path / "made" / name, b"x")
    storage.check_files(tmp_path / "made", manifest)
    storage.atomic_write(tmp_path / "made" / "more" / ".git" / "config", b"x")
    with pytest.raises(UserError, match=r"more/\.git/config was added"):
        storage.check_files(tmp_path / "made", manifest)
