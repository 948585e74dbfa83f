"""Generative retrievers that are trained to rank, by the command line."""

import json
from pathlib import Path

import pytest
from teacher import write_scores

from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection


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
