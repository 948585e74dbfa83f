"""The verb `cache`: which examples it writes, for which retriever."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
from model_folders import GOLDENS

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Prompts
from retrieval_jax.examples.batches import batches
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
    assert "labelled: not cached, as training draws its examples again in each epoch: typos, " in err
    assert [path.name for path in (tmp_path / "work" / "cache").iterdir()] == ["small_docs.passages.firstp"]


def test_a_cache_freezes_nothing_that_training_draws(own, cli, tmp_path: Path):
    """A query with more positives than its group has others in the next epoch, as without a cache."""
    qrels = tmp_path / "small_docs" / "qrels.train.tsv"
    (query, passage), other = (line.split()[:2] for line in qrels.read_text().splitlines()[:2])
    qrels.write_text(f"{query}\t{other[1]}\t1\n{qrels.read_text()}")
    assert cli("import", *own)[0] == 0
    work = Workspace(tmp_path / "work")
    config = DataConfig({"firstp": 1, "labelled": 1}, input_length=10, passage_length=16)
    collection = Collection(work.collection)

    def opened() -> TrainDataset:
        return TrainDataset(config, work, collection, PassageTargets)

    def take() -> list[dict]:
        data = opened()
        count = 20 * len(data.computed("labelled")) // 16
        return list(itertools.islice(batches(data.stages(), data.targets, {}, 32, seed=0), count))

    before = take()
    tokens = opened().vocabulary.batch([collection.queries("train")[0].text], 10)[0]
    of_query = [batch["passage"][(batch["left_encoder_input_tokens"] == tokens).all(1)] for batch in before]
    rows = {collection.find_rows([one])[0] for one in (passage, other[1])}
    assert {*np.concatenate(of_query).ravel().tolist()} == rows
    names = ("mixture", "input_length", "passage_length")
    settings = [f"--gin.DataConfig.{name}={getattr(config, name)}" for name in names]
    status, made, err = cli("cache", *own, *settings, "--DOCIDS=None", "--gin.cache.retriever=@DualEncoder")
    assert status == 0
    assert "labelled: not cached" in err
    assert [*made["examples"]] == ["small_docs.passages.firstp"]
    assert isinstance(opened().examples("firstp"), CachedExamples)
    for a, b in zip(before, take(), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
