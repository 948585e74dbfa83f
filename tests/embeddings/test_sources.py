"""Passages' vectors from each source, and what is said of those that do not fit."""

import sys
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.embeddings import encoding
from retrieval_jax.embeddings import sources as embeddings
from retrieval_jax.embeddings.sources import load_embeddings


@pytest.fixture
def here(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "work")


@pytest.fixture
def vectors(collection: Collection) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(collection.passage_count, 6)).astype(np.float32)


def test_a_npy_file_is_mapped(vectors, here, collection, tmp_path, monkeypatch):
    np.save(tmp_path / "v.npy", vectors)
    found, fingerprint = load_embeddings(str(tmp_path / "v.npy"), here, collection)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, vectors)
    monkeypatch.setattr(embeddings, "_BLOCK", 100)  # however it is read
    assert load_embeddings(str(tmp_path / "v.npy"), here, collection)[1] == fingerprint
    vectors[3, 2] += 1
    np.save(tmp_path / "v.npy", vectors)
    assert load_embeddings(str(tmp_path / "v.npy"), here, collection)[1] != fingerprint
    assert not here.folder.exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_become_float32_on_disk(vectors, here, collection, tmp_path, dtype):
    save_file({"x": vectors.astype(dtype)}, tmp_path / "v.safetensors")
    found, _ = load_embeddings(str(tmp_path / "v.safetensors"), here, collection)
    assert found.dtype == np.float32
    assert found.filename == here.embeddings("v") / "vectors.npy"
    assert np.array_equal(found, vectors.astype(dtype).astype(np.float32))


def test_a_safetensors_file_is_mapped(vectors, here, collection, tmp_path):
    save_file({"a": np.zeros(3, np.float32), "embeddings": vectors}, tmp_path / "v.safetensors")
    found, _ = load_embeddings(str(tmp_path / "v.safetensors"), here, collection)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, vectors)


def refuses(where: Path | str, here: Workspace, collection: Collection, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        load_embeddings(str(where), here, collection)
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit_are_told(vectors, here, collection, tmp_path):
    path = tmp_path / "v.npy"
    refuses(path, here, collection, r"EMBEDDINGS: .*v\.npy: neither a .npy or .safetensors file that exists")
    path.write_bytes(b"no")
    refuses(path, here, collection, r"v\.npy: not a NumPy file .*numpy\.save")
    np.save(path, vectors[1:])
    count = collection.passage_count
    refuses(path, here, collection, rf"an array of {count - 1} × 6 for {count} passages: give it one row")
    np.save(path, vectors[:, 0])
    refuses(path, here, collection, rf"an array of {count} for {count} passages")
    np.save(path, vectors.astype(int))
    refuses(path, here, collection, "holds int64: write the vectors as float32")
    spoilt = vectors.copy()
    spoilt[7, 1] = np.nan
    np.save(path, spoilt)
    refuses(path, here, collection, "the vector of row 7 has an infinity or NaN")
    path = tmp_path / "v.safetensors"
    path.write_bytes(b"no")
    refuses(path, here, collection, "not a safetensors file")
    save_file({"a": vectors, "b": vectors}, path)
    refuses(path, here, collection, "holds a, b: keep one matrix in it, or name it 'embeddings'")
    save_file({"a": vectors.astype(int)}, path)
    refuses(path, here, collection, "a holds I64: write the vectors as float32")


@pytest.mark.parametrize("family", ["generative", "lexical"])
def test_a_model_that_is_no_dual_encoder_is_told(family, here, collection, tmp_path, monkeypatch):
    (tmp_path / "model.json").write_text("{}")
    opened = types.SimpleNamespace(model=types.SimpleNamespace(family=family))
    monkeypatch.setattr(
        "retrieval_jax.checkpoints.model_folder.load_model", lambda folder, mesh, rules: opened
    )
    refuses(tmp_path, here, collection, f"holds a {family} model: name a dual encoder's")


def test_a_dual_encoder_encodes_the_passages_once(here, collection, tmp_path, monkeypatch):
    from retrieval_jax.checkpoints import model_folder
    from retrieval_jax.data.vocabulary import Vocabulary
    from retrieval_jax.embeddings.text_encoder import TextEncoder, passage_shapes
    from retrieval_jax.models.dual_encoder import DualEncoder
    from retrieval_jax.models.layers import T5Config

    vocabulary = Vocabulary(collection.vocabulary_path)
    config = T5Config(
        vocab_size=vocabulary.size, emb_dim=16, mlp_dim=16, num_heads=2, head_dim=8,
        num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    model = DualEncoder(config, None, vector_dim=8)
    shapes = {name: (1, 2) for name in ("encoder_input_tokens", "left_encoder_input_tokens")}
    params = model.get_initial_variables(jax.random.key(0), shapes | {"decoder_input_tokens": (1, 2)})
    params = jax.tree.map(
        lambda x: getattr(x, "value", x), params["params"], is_leaf=lambda x: hasattr(x, "value")
    )
    opened = model_folder.LoadedModel(model, params, 7, vocabulary, {"passage_length": 24})
    monkeypatch.setattr(model_folder, "load_model", lambda folder, mesh, rules: opened)
    monkeypatch.setattr(encoding, "PART", 40)  # passages in several parts
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/model.json").write_text("{}")
    (tmp_path / "dense/sentencepiece.model").write_bytes(collection.vocabulary_path.read_bytes())
    found, fingerprint = load_embeddings(str(tmp_path / "dense"), here, collection)
    texts = [passage.full_text for passage in collection.passages()]
    expected = TextEncoder(model.encode_passages, params, vocabulary, passage_shapes(24))(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    recipe = storage.read_manifest(here.embeddings("dense"), "docids")["recipe"]
    assert recipe == {
        "model": str(tmp_path / "dense"),
        "step": 7,
        "checksum": model_folder.model_checksum(tmp_path / "dense", 7, opened.description),
        "collection": collection.fingerprint,
    }
    monkeypatch.setattr(encoding, "_encode_parts", None)  # not again
    again, same = load_embeddings(str(tmp_path / "dense"), here, collection)
    assert np.array_equal(again, found)
    assert same == fingerprint


def test_sentence_transformers(here, collection, monkeypatch, hub):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    name = "sentence-transformers:some/model"
    for repo in ("some/model", "sentence-transformers/other", "t5-tiny"):
        hub.push(repo, {"modules.json": b"[]"})
    refuses(name, here, collection, r"pip install 'retrieval_jax\[sentence_transformers\]'")

    class SentenceTransformer:
        def __init__(self, name: str, revision: str):
            if name not in ("some/model", "t5-tiny"):
                raise OSError(f"{name} is not\na model")

        def encode(self, texts: list[str], **_) -> np.ndarray:
            return np.array([[len(text), 1] for text in texts], np.float16)

    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    refuses("sentence-transformers:other", here, collection, r"cannot be opened \(\S+/other is not\): check")
    refuses("sentence-transformers:a/b", here, collection, r"sentence-transformers:a/b: no such repository")
    found, _ = load_embeddings(name, here, collection)
    assert found.filename == here.embeddings("some_model") / "vectors.npy"
    lengths = [len(passage.full_text) for passage in collection.passages()]
    assert np.array_equal(found[:, 0], np.array(lengths, np.float16).astype(np.float32))
    # The hub's first models have no organisation. Vectors that are there need no library.
    load_embeddings("sentence-transformers:t5-tiny", here, collection)
    refuses("sentence-transformers:none", here, collection, r"none: no such repository")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    again, _ = load_embeddings(name, here, collection)
    assert np.array_equal(again, found)


def test_vectors_of_a_sentence_transformer_follow_its_folder(here, collection, monkeypatch, tmp_path):
    class SentenceTransformer:
        def __init__(self, name: str):
            self.number = float((tmp_path / "own/weights").read_text())

        def encode_document(self, texts: list[str], **_) -> np.ndarray:
            return np.full((len(texts), 2), self.number, np.float32)

    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    (tmp_path / "own").mkdir()
    fingerprints = set()
    for number in (1.0, 2.0):
        (tmp_path / "own/weights").write_text(str(number))
        for _ in range(2):
            found, fingerprint = load_embeddings(
                f"sentence-transformers:{tmp_path / 'own'}", here, collection
            )
            assert (found == number).all()
            fingerprints.add(fingerprint)
    assert len(fingerprints) == 2


def test_a_commit_on_the_hub_is_a_model_of_its_own(here, collection, monkeypatch, hub):
    commits = [hub.push("some/other", {"modules.json": b"[]", "number": b"%d" % i}) for i in range(3)]

    class SentenceTransformer:
        def __init__(self, name: str, revision: str):
            assert name == "some/other"
            self.number = float(commits.index(revision))

        def encode_document(self, texts: list[str], **_) -> np.ndarray:
            return np.full((len(texts), 2), self.number, np.float32)

    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    fingerprints = set()
    for name, number in ((f"some/other@{commits[0]}", 0), ("some/other", 2)):
        found, fingerprint = load_embeddings(f"sentence-transformers:{name}", here, collection)
        assert (found == number).all()
        fingerprints.add(fingerprint)
    hub.branches["some/other", "main"] = commits[1]  # the branch moves, and its vectors follow
    found, fingerprint = load_embeddings("sentence-transformers:some/other", here, collection)
    assert (found == 1).all()
    assert len(fingerprints | {fingerprint}) == 3


def test_vectors_that_an_encoder_spoils_are_told(here, collection, monkeypatch, hub):
    hub.push("sentence-transformers/bad", {"modules.json": b"[]"})

    class SentenceTransformer:
        def __init__(self, name: str, revision: str):
            pass

        def encode(self, texts: list[str], **_) -> np.ndarray:
            return np.full((len(texts), 2), np.inf, np.float32)

    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    refuses("sentence-transformers:bad", here, collection, "the vector of row 0 has an infinity or NaN")
    assert not here.embeddings("bad").exists()
