"""Dual encoders of sentence-transformers: its vectors of texts are ours, both ways; a golden, and live."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from model_folders import GOLDENS, random_params, same, write_model_folder

from retrieval_jax.checkpoints import sentence_transformers
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.model_folder import load_model, model_checksum
from retrieval_jax.checkpoints.pretrained import open_pretrained
from retrieval_jax.checkpoints.weights import lazy_arrays
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.embeddings.sources import load_embeddings
from retrieval_jax.embeddings.text_encoder import (
    TextEncoder,
    passage_encoder,
    passage_shapes,
    query_encoder,
)
from retrieval_jax.examples.targets import PassageTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.evaluators import DenseEvaluator
from retrieval_jax.training.run import train_dataset
from retrieval_jax.training.settings import TrainSettings
from retrieval_jax.verbs.convert import convert
from retrieval_jax.verbs.export import export

TEXTS = ["Smooth a noisy signal.", "adam with Weight decay", "x", "a longer text than any of the others " * 9]
TEXTS += ["a </s> b<pad> c", "<extra_id_3>", "<unk> and <s> ", "adam</s>"]  # which are text, not symbols


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
    opened = load_model(gtr)
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
    none = {"pooling_mode": None, "pooling_mode_mean_tokens": False}
    for mode in ("max", "weightedmean", "lasttoken", ["mean", "max"]):
        told = f"mean (pooling_mode {mode!r})"
        refused(re.escape(told), "1_Pooling/config.json", lambda c, mode=mode: c.update(pooling_mode=mode))
    refused("mean .no pooling_mode.", "1_Pooling/config.json", lambda c: c.update(none))
    refused("bias True, activation", "2_Dense/config.json", lambda c: c.pop("bias"))
    refused("activation_function 'Tanh'", "2_Dense/config.json", lambda c: c.pop("activation_function"))
    other = {"module_input_name": "token_embeddings"}
    refused("module_input_name 'token_embeddings' is not", "2_Dense/config.json", lambda c: c.update(other))
    cnn = "sentence_transformers.models.CNN"
    refused("modules Transformer, Pooling, CNN", "modules.json", lambda m: m[2].update(type=cnn))
    refused("modules own.Transformer, Pool", "modules.json", lambda m: m[0].update(type="own.Transformer"))
    refused("Pooling, Normalize, Dense", "modules.json", lambda m: m.insert(2, m.pop()))
    refused("Dense, Dense, Normalize", "modules.json", lambda m: m.insert(2, m[2]))
    refused(r"kwargs \['task'\] of .*Dense are", "modules.json", lambda m: m[2].update(kwargs=["task"]))
    for outside in ("../x", "/x", "gs://x/y"):
        told = f"names {outside!r}, which is not in its folder"
        refused(told, "modules.json", lambda m, outside=outside: m[2].update(path=outside))
    for name, field, value in (
        ("config_sentence_transformers.json", "model_type", "SparseEncoder"),
        ("config_sentence_transformers.json", "similarity_fn_name", "euclidean"),
        ("config_sentence_transformers.json", "truncate_dim", 0),
        ("config_sentence_transformers.json", "truncate_dim", True),
        ("sentence_bert_config.json", "transformer_task", "fill-mask"),
        ("config.json", "layer_norm_epsilon", 1e-5),
    ):
        told = re.escape(f"{field} {value!r} is not supported")
        refused(told, name, lambda c, field=field, value=value: c.update({field: value}))


def test_truncated_vectors_are_the_first_dimensions(tmp_path):
    """Of unit length again, as cosines compare them."""
    folder, expected = shutil.copytree(GOLDENS / "gtr", tmp_path / "gtr"), GOLDENS / "gtr" / "expected.npz"
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncate_dim": 4}))
    convert("unused", str(folder), model_dir=str(folder / "model"))
    found = query_encoder(load_model(folder / "model"))(np.load(expected)["texts"].tolist())
    first = np.load(expected)["vectors"][:, :4].astype(np.float64)
    np.testing.assert_allclose(found, first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-5)


def test_truncated_vectors_are_theirs(tmp_path, capsys):
    """As a search compares them: by cosines, or, of vectors that no module normalises, by dot products."""
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    for number, (normalizes, dimensions, similarity) in enumerate(
        [(True, 4, None), (True, 100, "dot"), (False, 3, "dot"), (False, 3, "cosine")]
    ):
        folder = shutil.copytree(GOLDENS / "gtr", tmp_path / str(number))
        for name, change in (
            ("modules.json", lambda modules, n=3 + normalizes: modules[:n]),
            (
                "config_sentence_transformers.json",
                lambda c, d=dimensions, s=similarity: c | {"truncate_dim": d, "similarity_fn_name": s},
            ),
        ):
            (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
        convert("unused", str(folder), model_dir=str(folder / "model"))
        found = query_encoder(load_model(folder / "model"))(TEXTS[:3])
        theirs = library.SentenceTransformer(str(folder))
        assert found.shape[1] == theirs.get_embedding_dimension() == min(dimensions, 9)
        assert (f"truncate_dim: the first {dimensions} of 9 dim" in capsys.readouterr().err) == (
            dimensions < 9
        )
        expected = theirs.similarity(*[theirs.encode(TEXTS[:3])] * 2)
        np.testing.assert_allclose(found @ found.T, expected, atol=1e-5)


def test_parts_of_normalised_vectors_are_not_compared_by_dot_products(tmp_path):
    folder = shutil.copytree(GOLDENS / "gtr", tmp_path / "gtr")
    path = folder / "config_sentence_transformers.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"truncate_dim": 4, "similarity_fn_name": "dot"})
    )
    with pytest.raises(UserError, match="truncate_dim 4 with similarity_fn_name 'dot' is not supported"):
        open_pretrained(folder)


def test_pooling_of_older_and_newer_files():
    by_mean = sentence_transformers.pools_by_mean
    assert by_mean({})
    assert by_mean({"pooling_mode": ["mean"]})
    assert by_mean({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    assert not by_mean({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    assert not by_mean({"pooling_mode_mean_tokens": False})


def test_vectors_for_cosines_are_of_unit_length(tmp_path):
    """Where no module divides by the length, their `similarity` does: so ranks are those of its cosines."""
    folder = tmp_path / "cosine"
    shutil.copytree(GOLDENS / "gtr", folder)
    path = folder / "modules.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:3]))
    assert open_pretrained(folder).settings["normalize"]
    path = folder / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    for similarity in ("cosine", None, "dot"):  # None is read as the library's default
        path.write_text(json.dumps(settings | {"similarity_fn_name": similarity}))
        assert open_pretrained(folder).settings["normalize"] == (similarity != "dot")
    path.unlink()  # as of its early versions
    assert open_pretrained(folder).settings["normalize"]


PROMPTS = {"query": "a query: ", "document": "passages: ", "STS": "unused "}


def with_prompts(folder, prompts: dict, **more: object):
    """GTR's golden with prompts, in a new folder."""
    shutil.copytree(GOLDENS / "gtr", folder)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": prompts, **more}))
    return folder


def encoders(folder, prompts: dict = PROMPTS):
    """(query encoder, passage encoder, model folder) of what `convert` makes of the golden with prompts."""
    model = folder / "model"
    convert("unused", str(with_prompts(folder / "theirs", prompts)), model_dir=str(model))
    opened = load_model(model)
    return query_encoder(opened), passage_encoder(opened, partitioning.make_mesh()), model


def test_prompts_come_before_queries_and_passages_there_and_back(gtr, tmp_path):
    plain = query_encoder(load_model(gtr))
    texts = ["vectors of queries", "A docid", ""]
    of_queries, of_passages, model = encoders(tmp_path)
    for encode, prompt in ((of_queries, PROMPTS["query"]), (of_passages, PROMPTS["document"])):
        np.testing.assert_allclose(encode(texts), plain([prompt + text for text in texts]), atol=1e-6)
        assert np.abs(encode(texts) - plain(texts)).max() > 0.01
    export("unused", model_dir=str(model), format="sentence_transformers", output=str(tmp_path / "out"))
    again = open_pretrained(tmp_path / "out").settings
    assert (again["query_prompt"], again["passage_prompt"]) == (PROMPTS["query"], PROMPTS["document"])


def test_a_prompt_is_a_part_of_what_the_model_is(gtr, tmp_path):
    checksums = set()
    for number, prompts in enumerate([{}, {"query": "x "}, {"document": "x "}, {"query": "y "}]):
        *_, model = encoders(tmp_path / str(number), prompts)
        checksums.add(model_checksum(model, 0, json.loads((model / "model.json").read_text())))
    assert len(checksums) == 4
    described = json.loads((gtr / "model.json").read_text())
    assert model_checksum(gtr, 0, described) in checksums
    assert model_checksum(gtr, 0, described | {"symbols": {"</s>": 1}}) not in checksums


def test_prompts_that_cannot_be_followed_are_refused(tmp_path):
    def refused(match: str, path, change: dict) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=match):
            open_pretrained(path.parents[path.parent.name == "1_Pooling"])

    excluded = {"include_prompt": False}
    folder = with_prompts(tmp_path / "a", PROMPTS)
    refused("1_Pooling: include_prompt: leaves the prompt out", folder / "1_Pooling/config.json", excluded)
    folder = with_prompts(tmp_path / "b", {"query": ["list"]})
    refused("the prompt 'query' is no text", folder / "config_sentence_transformers.json", {})
    folder = with_prompts(tmp_path / "c", {})
    path = folder / "1_Pooling/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | excluded))
    assert open_pretrained(folder)  # there is nothing to leave out
    refused("do_lower_case", folder / "sentence_bert_config.json", {"do_lower_case": True})


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        (PROMPTS, None),
        ({"query": "a ", "passage": "passages: "}, None),
        ({"other": "trie "}, "other"),
        ({}, None),
    ],
)
def test_prompts_are_those_of_encode_query_and_encode_document(prompts, default, tmp_path, capsys):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    folder = with_prompts(tmp_path / "theirs", prompts, default_prompt_name=default)
    model, output = str(tmp_path / "model"), str(tmp_path / "out")
    convert("unused", str(folder), model_dir=model)
    said = capsys.readouterr().err
    for name in ("passage", "other"):
        assert (f"prompts {name} are not used" in said) == (name in prompts)
    export("unused", model_dir=model, format="sentence_transformers", output=output)
    texts = ["vectors of queries", "A docid names a passage, and a trie holds all docids.", "x"]
    opened = load_model(model)
    ours = query_encoder(opened)(texts), passage_encoder(opened, partitioning.make_mesh())(texts)
    for path in (str(folder), output):
        theirs = library.SentenceTransformer(path)
        for found, expected in zip(
            ours, (theirs.encode_query(texts), theirs.encode_document(texts)), strict=True
        ):
            cosines = (
                np.sum(found * expected, 1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
            )
            assert cosines.min() > 0.9999


def test_a_matrix_that_is_pickled_is_not_read(tmp_path):
    folder = shutil.copytree(GOLDENS / "gtr", tmp_path / "gtr")
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"2_Dense: no safetensors here, and pickled weights are not read"):
        open_pretrained(folder)


def test_embeddings_of_a_folder_have_the_prompt_of_documents(tmp_path, collection):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    folder = with_prompts(tmp_path / "theirs", PROMPTS)
    found, _ = load_embeddings(f"sentence-transformers:{folder}", Workspace(tmp_path / "work"), collection)
    texts = [passage.full_text for passage in collection.passages()]
    expected = library.SentenceTransformer(str(folder)).encode_document(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_training_goes_on_with_the_prompts_of_its_initial_weights(tmp_path, work, collection):
    folder = with_prompts(tmp_path / "theirs", PROMPTS)
    config = T5Config(**open_pretrained(folder).network)
    model = DualEncoder(config, vector_dim=9)
    params = InitialCheckpoint(str(folder)).arrays_for(model)
    assert model.settings["query_prompt"] == PROMPTS["query"]
    own = DualEncoder(config, vector_dim=9, query_prompt="", passage_prompt="mine ")
    InitialCheckpoint(str(folder)).arrays_for(own)
    assert own.prompts == ("", "mine ")

    data = DataConfig(input_length=24, passage_length=32, chunk_length=8, chunks=2)
    examples = train_dataset(data, work, collection, model, None)
    plain = TrainDataset(data, work, collection, PassageTargets)
    assert examples.recipe("firstp") != plain.recipe("firstp")
    vocabulary, rng = plain.vocabulary, np.random.default_rng(0)
    head = vocabulary.encode(PROMPTS["query"])
    for task in ("firstp", "daq"):
        without = plain.computed(task)(3, rng)["inputs"]
        assert examples.computed(task)(3, rng)["inputs"] == [*head, *without]
    made, query = examples.computed("labelled")(0, rng), collection.queries("train")[0]
    assert made["inputs"] == vocabulary.encode(PROMPTS["query"] + query.text)
    (passage,) = collection.get(made["passage"])
    assert made["targets"] == vocabulary.batch([PROMPTS["document"] + passage.full_text], 32)[0].tolist()

    # The search for the dev queries in training is the one after it, whose texts have the prompts in them.
    model = DualEncoder(
        T5Config(1152, 16, 2, 8, 20, 1, 0), vector_dim=6, query_prompt="a ", passage_prompt="the "
    )
    params = random_params(model)
    dev = DenseEvaluator(model, train_dataset(data, work, collection, model, None), TrainSettings())
    dev(params)
    of_passages, of_queries = (
        TextEncoder(encode, params, vocabulary, passage_shapes(length))
        for encode, length in ((model.encode_passages, 32), (model.encode_queries, 24))
    )
    scores = (
        of_queries([f"a {q.text}" for q in dev.queries[:5]])
        @ of_passages([f"the {p.full_text}" for p in collection.passages()]).T
    )
    found = [[passage["score"] for passage in sample["found"]] for sample in dev.samples]
    np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :5], atol=1e-4)


def test_without_a_matrix_vectors_are_the_means(tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(GOLDENS / "gtr", folder)
    path = folder / "modules.json"
    path.write_text(json.dumps([m for m in json.loads(path.read_text()) if not m["type"].endswith("Dense")]))
    pretrained = open_pretrained(folder)
    assert pretrained.settings == {"vector_dim": 16, "normalize": True}
    np.testing.assert_array_equal(pretrained.arrays["projection_layer/kernel"].read(), np.eye(16))


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
    params = lazy_arrays(load_model(folder).params)
    for name, written in zip(("left_tower/", "right_tower/"), towers, strict=True):
        own = {k.removeprefix(name): v for k, v in params.items() if k.startswith(name)} or params
        again = open_pretrained(written)
        assert again.settings["normalize"] == load_model(folder).model.module.normalize
        if "encoder/encoder/mlp/wo/kernel" not in own:
            same(again.arrays, own)


def test_sentence_transformers_opens_ours(exported):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    folder, towers = exported
    opened = load_model(folder)
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
