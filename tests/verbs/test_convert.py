"""The verb `convert`: weights of others become models that search and write, or are refused with a reason."""

import json
import shutil

import numpy as np
import pytest
from model_folders import GOLDENS, random_params, write_model_folder
from safetensors.numpy import load_file, save_file

from retrieval_jax.checkpoints.model_folder import check_finite, load_model, read_description
from retrieval_jax.checkpoints.pretrained import open_pretrained
from retrieval_jax.checkpoints.t5x_checkpoints import write
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.interop.writers import layers_of
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.run import docid_softmax


def test_a_dual_encoder_that_came_searches(cli, work, arguments, collection, tmp_path):
    """sentence-transformers' folder → convert → index → search, with no training."""
    folder = tmp_path / "gtr"
    given = [f"--gin.INITIAL_CHECKPOINT='{GOLDENS / 'gtr'}'", f"--gin.MODEL_DIR='{folder}'"]
    status, made, err = cli("convert", *arguments, *given)
    assert status == 0, err
    assert made == {
        "model": str(folder), "format": "sentence-transformers", "retriever": "DualEncoder",
        "parameters": load_model(folder).parameter_count, "not used": 0,
    }  # fmt: skip
    status, made, err = cli(
        "index", *arguments, given[1], "--gin.make_index.kind='exact'", "--gin.make_index.name='gtr'"
    )
    assert status == 0, err
    assert "trained on another collection" not in err
    (ranking,) = Searcher.open(work.searcher("gtr")).search(["smooth a noisy signal"], 5)
    assert len(ranking) == 5
    assert ranking[0][1] > ranking[-1][1]


def test_a_model_of_this_project_keeps_both_lengths(cli, arguments, tmp_path):
    source, lengths = GOLDENS / "gtr", []
    given = ["--gin.convert.input_length=8", "--gin.convert.passage_length=32"]
    for name in ("first", "second"):
        folder = tmp_path / name
        named = [f"--gin.INITIAL_CHECKPOINT='{source}'", f"--gin.MODEL_DIR='{folder}'", *given]
        assert cli("convert", *arguments, *named)[0] == 0
        description = read_description(folder)
        lengths.append((description["input_length"], description["passage_length"]))
        source, given = folder, []
    assert lengths == [(8, 32)] * 2


def test_weights_that_others_replaced_are_converted_anew(cli, arguments, tmp_path):
    """By content: of T5X's, of Hugging Face's files and of a model folder of this project."""
    theirs = shutil.copytree(GOLDENS / "gtr", tmp_path / "gtr")
    name, folder = "encoder/encoder_norm/scale", tmp_path / "model"

    def converted(source, folder) -> tuple[np.ndarray, int]:
        given = [f"--gin.INITIAL_CHECKPOINT='{source}'", f"--gin.MODEL_DIR='{folder}'"]
        status, _, err = cli("convert", *arguments, *given)
        assert status == 0, err
        return open_pretrained(folder).arrays[name].read(), (folder / "manifest.json").stat().st_mtime_ns

    first, made = converted(theirs, folder)
    again, same = converted(theirs, folder)
    assert same == made
    np.testing.assert_array_equal(again, first)
    weights = load_file(theirs / "model.safetensors")
    scale = "encoder.final_layer_norm.weight"
    save_file(weights | {scale: weights[scale] + 1}, theirs / "model.safetensors")
    of_ours, _ = converted(folder, tmp_path / "copy")
    changed, _ = converted(theirs, folder)
    np.testing.assert_allclose(changed, first + 1)
    np.testing.assert_array_equal(of_ours, first)
    np.testing.assert_array_equal(converted(folder, tmp_path / "copy")[0], changed)


def test_a_vocabulary_that_is_not_the_weights_own_is_refused(cli, arguments, collection, tmp_path):
    given = [f"--gin.INITIAL_CHECKPOINT='{GOLDENS / 'gtr'}'", f"--gin.MODEL_DIR='{tmp_path / 'model'}'"]
    status, _, err = cli("convert", *arguments, *given, f"--gin.VOCABULARY='{collection.vocabulary_path}'")
    assert status == 2
    assert "is another vocabulary than that of" in err
    own = tmp_path / "copy.model"
    shutil.copyfile(GOLDENS / "gtr" / "spiece.model", own)
    assert cli("convert", *arguments, *given, f"--gin.VOCABULARY='{own}'")[0] == 0


def test_a_retriever_that_t5x_trained_searches(cli, work, arguments, collection, tmp_path):
    """T5X's checkpoint → convert → index: it finds what the same weights found here."""
    assert cli("docids", *arguments, "--gin.DOCIDS='naive_digits'")[0] == 0
    table = DocidTable.open(work.docids("naive_digits"))
    model = GenerativeRetriever(T5Config(1152, 16, 2, 8, 20, 2, 1, **docid_softmax(table)))
    params = random_params(model)
    facts = {"docids": "naive_digits", "docids_fingerprint": table.fingerprint()}
    write_model_folder(tmp_path / "ours", model, params, collection, **facts)
    checkpoint = tmp_path / "checkpoint_300"
    checkpoint.mkdir()
    write(checkpoint, layers_of(params), 300)
    flags = ["--gin.DOCIDS='naive_digits'", f"--gin.INITIAL_CHECKPOINT='{checkpoint}'"]
    flags += [f"--gin.VOCABULARY='{collection.vocabulary_path}'", f"--gin.MODEL_DIR='{tmp_path / 'theirs'}'"]
    retriever = "--gin.convert.retriever=@GenerativeRetriever"
    status, _, err = cli("convert", *arguments, *flags)
    assert status == 2
    assert "has a decoder: say what it is by --gin.convert.retriever" in err
    status, _made, err = cli("convert", *arguments, *flags, retriever)
    assert status == 0, err
    assert load_model(tmp_path / "theirs").step == 300
    rankings = []
    for name in ("ours", "theirs"):
        flags = [f"--gin.MODEL_DIR='{tmp_path / name}'", f"--gin.make_index.name='{name}'"]
        assert cli("index", *arguments, *flags)[0] == 0
        rankings.append(Searcher.open(work.searcher(name)).search(["smooth a noisy signal"], 10)[0])
    assert [pid for pid, _ in rankings[0]] == [pid for pid, _ in rankings[1]]
    # By a longer input: the lengths of a T5X checkpoint are not known.
    assert load_model(tmp_path / "theirs").description["input_length"] == 64


def test_what_cannot_be_converted_is_named(cli, arguments, tmp_path):
    model = ["--gin.convert.retriever=@QueryGenerator", f"--gin.MODEL_DIR='{tmp_path / 'm'}'"]

    def refused(match: str, *flags: str) -> None:
        status, _, err = cli("convert", *arguments, *model, *flags)
        assert status == 2
        assert match in err
        assert err.count("\n") == 1
        assert not (tmp_path / "m").exists()

    refused("no weights are named")
    given = f"--gin.INITIAL_CHECKPOINT='{GOLDENS / 't5_1_0'}'"
    refused("no vocabulary lies with it: --VOCABULARY", given)
    small = GOLDENS / "gtr" / "spiece.model"
    assert cli("convert", *arguments, *model, given, f"--gin.VOCABULARY='{small}'")[0] == 0
    shutil.rmtree(tmp_path / "m")
    large = next(a.split("'")[1] for a in arguments if "WORK_DIR" in a) + "/collection/sentencepiece.model"
    refused("pieces, and the weights' embedding 50 rows", given, f"--gin.VOCABULARY='{large}'")
    torn = tmp_path / "torn"
    shutil.copytree(GOLDENS / "t5_1_1", torn)
    index = torn / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    last = value["weight_map"]["shared.weight"]
    (torn / last).unlink()
    refused("cannot be read", f"--gin.INITIAL_CHECKPOINT='{torn}'", f"--gin.VOCABULARY='{small}'")


@pytest.mark.parametrize("kind", ["t5_1_0", "t5_1_1"])
def test_a_query_generator_that_came_writes(cli, work, arguments, collection, tmp_path, kind):
    """As docT5query's released weights would: T5 1.0, its softmax the embedding."""
    folder = tmp_path / "doc2query"
    flags = [f"--gin.INITIAL_CHECKPOINT='{GOLDENS / kind}'", f"--gin.MODEL_DIR='{folder}'"]
    flags += [f"--gin.VOCABULARY='{GOLDENS / 'gtr' / 'spiece.model'}'"]
    status, _, err = cli("convert", *arguments, *flags, "--gin.convert.retriever=@QueryGenerator")
    assert status == 0, err
    few = ["--gin.generate_queries.count=2", f"--gin.generate_queries.name='{kind}'"]
    few += ["--gin.generate_queries.batch_size=64"]
    status, made, err = cli("generate-queries", *arguments, f"--gin.MODEL_DIR='{folder}'", *few)
    assert status == 0, err
    assert made["passages"] == collection.passage_count
    assert made["queries"] > 0
    assert np.isfinite(made["queries"])


def test_weights_that_are_not_finite_are_named(tmp_path):
    params = {"encoder": {"encoder_norm": {"scale": np.array([1.0, np.nan], np.float32)}}, "a": np.ones(2)}
    with pytest.raises(UserError, match="encoder/encoder_norm/scale has an infinity or NaN: train"):
        check_finite(tmp_path, params)
    check_finite(tmp_path, {"a": np.ones(2)})
