"""The verb `cache`: which examples it writes, for which retriever."""

import json
import shutil
from pathlib import Path

import numpy as np
from model_folders import GOLDENS

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Prompts
from retrieval_jax.examples.cached import CachedExamples
from retrieval_jax.examples.targets import PassageTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset


def test_docids_are_needed_where_they_are_written(arguments: list[str], cli):
    status, _, err = cli("cache", *arguments, "--DOCIDS=None")
    assert (status, err.count("\n")) == (2, 1)
    assert "cache: docids of no kind: --DOCIDS=naive, or --gin.cache.retriever=@DualEncoder" in err


def test_a_dual_encoders_examples_are_groups_of_passages_after_its_prompts(
    arguments: list[str], work: Workspace, collection: Collection, cli
):
    settings = ["--gin.DataConfig.mixture={'labelled': 1}", "--gin.DataConfig.passage_length=16"]
    retriever = ["--DOCIDS=None", "--gin.cache.retriever=@DualEncoder"]
    prompts = ["--gin.DualEncoder.query_prompt='find: '", "--gin.DualEncoder.passage_prompt='text: '"]
    assert cli("cache", *arguments, *settings, *retriever, *prompts)[0] == 0
    assert (work.cache("small_docs.passages.labelled") / "COMPLETED").exists()
    data = DataConfig({"labelled": 1}, passage_length=16)
    trained = TrainDataset(data, work, collection, PassageTargets, prompts=Prompts("find: ", "text: "))
    cached = trained.examples("labelled")
    assert isinstance(cached, CachedExamples)
    query, vocabulary = collection.queries("train")[3], trained.vocabulary
    found = cached(3, np.random.default_rng(0))
    assert [*found["inputs"]] == vocabulary.encode(f"find: {query.text}")
    (passage,) = collection.get([*found["passage"]])
    assert [*found["targets"]] == vocabulary.batch([f"text: {passage.full_text}"], 16)[0].tolist()
    plain = TrainDataset(data, work, collection, PassageTargets)
    assert not isinstance(plain.examples("labelled"), CachedExamples)


def test_a_dual_encoder_inherits_the_prompts_of_its_initial_weights(
    arguments: list[str], work: Workspace, cli, tmp_path: Path
):
    folder = shutil.copytree(GOLDENS / "gtr", tmp_path / "gtr")
    path = folder / "config_sentence_transformers.json"
    theirs = {"prompts": {"query": "of the weights: ", "document": ""}}
    path.write_text(json.dumps(json.loads(path.read_text()) | theirs))
    settings = ["--gin.DataConfig.mixture={'labelled': 1}", "--gin.DataConfig.passage_length=16"]
    retriever = ["--DOCIDS=None", "--gin.cache.retriever=@DualEncoder", f"--INITIAL_CHECKPOINT={folder}"]
    assert cli("cache", *arguments, *settings, *retriever)[0] == 0
    manifest = storage.read_manifest(work.cache("small_docs.passages.labelled"), "cache")
    assert manifest["recipe"]["prompts"] == ["of the weights: ", ""]


def test_queries_with_typos_are_not_cached(own, cli, tmp_path: Path):
    assert cli("import", *own)[0] == 0
    data = ["--gin.DataConfig.mixture={'labelled': 1, 'firstp': 1}", "--gin.DataConfig.passage_length=16"]
    retriever = ["--DOCIDS=None", "--gin.cache.retriever=@LexicalEncoder"]  # a dual encoder, too
    status, made, err = cli("cache", *own, *data, *retriever, "--gin.DataConfig.typos=0.2")
    assert status == 0
    assert made["examples"].keys() == {"small_docs.passages.firstp"}
    assert "labelled: not cached, as training draws its typos in each epoch (DataConfig.typos)" in err
    assert [path.name for path in (tmp_path / "work" / "cache").iterdir()] == ["small_docs.passages.firstp"]
