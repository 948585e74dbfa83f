"""Generative retrievers that are trained to rank, by the command line."""

import dataclasses
import functools
import json
from pathlib import Path

import optax
import pytest
from teacher import random_scores, write_scores
from tiny_training import CONFIG

from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.models.distillation import dense_margin_mse
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.joint_ranking import joint_ranking
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.models.objectives import rdrop
from retrieval_jax.models.ranking import kl
from retrieval_jax.training.optimizers import adamw
from retrieval_jax.training.run import train_dataset


@pytest.fixture
def run(own_work: Workspace, collection: Collection, arguments: list[str], cli, tmp_path: Path):
    """`run(file, *flags)` trains with a gin file; a teacher prefers each query's positives to four others."""
    ids = collection.ids.to_pylist()
    scores = {
        query.id: dict.fromkeys(ids[n % 90 : n % 90 + 4], 0.0) | dict.fromkeys(query.positives, 3.0 + n % 3)
        for n, query in enumerate(collection.queries("train"))
    }
    write_scores(own_work, "teacher", scores)
    here = [*arguments, f"--WORK_DIR={own_work.folder}", f"--MODEL_DIR={tmp_path / 'model'}"]
    assert cli("docids", *here, "--DOCIDS=naive_digits")[0] == 0

    def train(file: str, *flags: str):
        files = ["--gin_file=runs/naive.gin", "--gin_file=docids/naive_digits.gin", f"--gin_file={file}"]
        return cli("train", *here, *files, "--gin.RetrievalEvaluator.max_queries=4", *flags)

    return train


def test_a_model_learns_the_teachers_order(run, tmp_path: Path):
    flags = ["--SCORES=teacher", "--STEPS=40", "--gin.margin_mse.prefix_lengths=(1, 3)"]
    status, _, told = run("tasks/margin_mse.gin", *flags)
    assert status == 0, told
    curve = [point for point in read_curve(tmp_path / "model" / "learning_curve.jsonl") if "loss" in point]
    first, last = curve[0], curve[-1]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["ordered_at/3"] > max(first["ordered_at/3"], 0.8)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["settings"] == {"score": "logits"}
    recorded = json.loads((tmp_path / "model" / "settings.json").read_text())
    assert recorded["margin_mse.prefix_lengths"] == "(1, 3)"
    status, _, told = run("tasks/margin_mse.gin", *flags, "--gin.DataConfig.negatives=2")
    assert status == 2
    assert "DataConfig.negatives was 8 and is 2" in told


def test_scores_that_teach_nothing_or_what_is_wrong_are_refused(run, own_work, collection, tmp_path: Path):
    """Those of positives alone; for DPO those that are known to be no log-probabilities of docids."""
    queries = collection.queries("train")
    write_scores(own_work, "positives", {query.id: dict.fromkeys(query.positives, 1.0) for query in queries})
    status, _, told = run("tasks/margin_mse.gin", "--SCORES=positives")
    assert (status, len(told.strip().splitlines())) == (2, 1)
    assert "labelled: the teacher scored no negative of any query" in told
    manifest_path = own_work.scores("teacher") / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    for scored_by, refused in (
        ({"kind": "bm25"}, True),
        ({"kind": "generative", "score": "logits"}, True),
        ({"kind": "generative", "score": "log_prob"}, False),
    ):
        manifest["recipe"]["scored_by"] = scored_by
        manifest_path.write_text(json.dumps(manifest))
        status, _, told = run("tasks/ddro.gin", "--SCORES=teacher", "--STEPS=1")
        assert status == (2 if refused else 0), told
        assert ("dpo: " in told) == refused
        assert (tmp_path / "model" / "learning_curve.jsonl").exists() != refused


def test_what_is_not_read_is_told_and_a_distillation_needs_negatives(own_work, collection, capsys):
    write_scores(own_work, "t", random_scores(collection))
    config, optimizer = DataConfig({"labelled": 1.0}, scores="t"), adamw(optax.constant_schedule(1e-3))
    encoder = DualEncoder(CONFIG, optimizer, distillation=dense_margin_mse)
    with pytest.raises(UserError, match=r"negatives: 0, and DualEncoder.distillation compares"):
        train_dataset(config, own_work, collection, encoder, None)
    train_dataset(dataclasses.replace(config, negatives=1), own_work, collection, encoder, None)
    train_dataset(config, own_work, collection, GenerativeRetriever(CONFIG, optimizer), None)
    assert "SCORES=t: not read, as the model learns one docid a query" in capsys.readouterr().err
    train_dataset(config, own_work, collection, DualEncoder(CONFIG, optimizer), None)
    assert "SCORES=t: not read, as DataConfig.negatives is 0" in capsys.readouterr().err
    train_dataset(
        dataclasses.replace(config, negatives=1), own_work, collection, DualEncoder(CONFIG, optimizer), None
    )  # what was scored is negative
    assert "not read" not in capsys.readouterr().err
    with_sets = dataclasses.replace(config, negatives=1, sets="s")
    for model in (encoder, GenerativeRetriever(CONFIG, optimizer, kl)):
        with pytest.raises(UserError, match=r"^DataConfig.sets: s, and this training .* no sets: leave"):
            train_dataset(with_sets, own_work, collection, model, None)
    repeated = functools.partial(rdrop, objective=joint_ranking)
    for model in (LexicalEncoder(CONFIG, optimizer), GenerativeRetriever(CONFIG, optimizer, repeated)):
        train_dataset(with_sets, own_work, collection, model, None)


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        (
            "tasks/margin_mse.gin",
            [],
            "margin_mse: needs a teacher's scores: `retrieval-jax score`, then --SCORES",
        ),
        ("tasks/ddro.gin", [], "dpo: needs a teacher's scores"),
        (
            "tasks/ltrgr.gin",
            ["--gin.DataConfig.negatives=0"],
            "pairwise_margin: ranks several docids of a query",
        ),
        (
            "tasks/ltrgr.gin",
            ["--gin.DataConfig.pack=2"],
            "DataConfig.pack: 2: only queries with one docid each",
        ),
        (
            "docids/naive_digits.gin",
            ["--gin.DataConfig.negatives=1"],
            "learns one docid a query: choose one that ranks",
        ),
    ],
)
def test_what_a_run_lacks_is_said_before_it_begins(run, tmp_path: Path, file: str, flags: list, message: str):
    status, _, told = run(file, *flags)
    assert (status, len(told.strip().splitlines())) == (2, 1)
    assert message in told
    assert not (tmp_path / "model" / "learning_curve.jsonl").exists()
