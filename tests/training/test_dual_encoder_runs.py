"""Dual encoders trained by the verbs: labels of an LLM, then of people; a teacher's scores."""

import json
from pathlib import Path

import pytest
from teacher import random_scores, write_scores

from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection

LIBRARY = Path(__file__).parents[1] / "data" / "library"
SIZES = {"emb_dim": 32, "mlp_dim": 32, "num_heads": 2, "head_dim": 16}


def test_a_curriculum_with_mined_negatives(cli, tmp_path: Path):
    here = [f"--gin.COLLECTION='{LIBRARY}'", f"--gin.WORK_DIR='{tmp_path}'", "--gin.LLM_STEPS=2"]
    here += [f"--gin.T5Config.{name}={value}" for name, value in SIZES.items()]
    assert cli("import", *here[:2], f"--gin.VOCABULARY='{LIBRARY / 'sentencepiece.model'}'")[0] == 0
    assert cli("index", *here[:2])[0] == 0
    assert cli("mine", *here[:2], "--gin.mine.depth=5")[0] == 0
    files = ["--gin_file=runs/dual_encoder.gin", "--gin_file=tasks/llm_then_human.gin"]
    settings = [
        "STEPS=4",
        "train.batch_size=4",
        "train.log_every=1",
        "NEGATIVES='bm25'",
        "train.save_every=4",
    ]
    settings += [
        "DualEncoder.objective=@lse_pair",
        "DualEncoder.gradcache_chunk_size=8",
        "DualEncoder.learn_scale=True",
    ]
    settings += ["DualEncoder.shared_towers=False", "DataConfig.passage_length=16"]
    settings += ["DataConfig.token_dropout={}"]
    status, made, error = cli("train", *files, *here, *(f"--gin.{setting}" for setting in settings))
    assert status == 0, error
    assert made["step"] == 4
    folder = Workspace(tmp_path).model("dual_encoder")
    points = [json.loads(line) for line in (folder / "learning_curve.jsonl").read_text().splitlines()]
    losses = [point["loss"] for point in points if "loss" in point]
    assert len(losses) == 4
    assert losses[-1] == pytest.approx(losses[0], rel=2)  # finite, of the same kind
    opened = load_model(folder)
    assert {"left_tower", "right_tower", "log_scale"} == set(opened.params)
    assert opened.params["log_scale"] != 0
    status, made, error = cli(
        "index", *here[:2], f"--gin.MODEL_DIR='{folder}'", "--gin.make_index.kind='exact'"
    )
    assert status == 0, error
    query = Collection(Workspace(tmp_path).collection).queries("test")[0]
    status, found, error = cli("search", *here[:2], "--gin.SEARCHER='exact'", f"--gin.QUERY={query.text!r}")
    assert status == 0, error
    assert found["passages"]


def test_a_teacher_short_vectors_and_a_decoder(cli, tmp_path: Path):
    """The distillation alone, at two sizes, of decoder states; then the shorter size is searched."""
    here = [f"--gin.COLLECTION='{LIBRARY}'", f"--gin.WORK_DIR='{tmp_path}'"]
    assert cli("import", *here, f"--gin.VOCABULARY='{LIBRARY / 'sentencepiece.model'}'")[0] == 0
    work = Workspace(tmp_path)
    write_scores(work, "teacher", random_scores(Collection(work.collection)))
    settings = {"STEPS": 3, "train.batch_size": 8, "train.log_every": 1, "DataConfig.passage_length": 16}
    settings |= {f"T5Config.{name}": value for name, value in SIZES.items()}
    settings |= {
        "DualEncoder.pooling": "'decoder'",
        "DualEncoder.vector_dim": None,
        "DualEncoder.matryoshka": (8,),
    }
    settings |= {"DualEncoder.objective_weight": 0.0, "DualEncoder.distillation": "@dense_margin_mse"}
    settings |= {"DualEncoder.normalize": False, "DualEncoder.scale": 1.0, "SCORES": "'teacher'"}
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    status, _, error = cli("train", "--gin_file=runs/dual_encoder_distilled.gin", *here, *flags)
    assert status == 0, error
    folder = work.model("dual_encoder")
    curve = [json.loads(line) for line in (folder / "learning_curve.jsonl").read_text().splitlines()]
    points = [point for point in curve if "loss" in point]
    assert len(points) == 3
    for point in points:
        assert point["loss"] == pytest.approx(point["distillation"] + point["distillation_first/8"], rel=1e-5)
    model = load_model(folder).model
    assert model.settings.items() >= {"pooling": "decoder", "vector_dim": 32, "matryoshka": [8]}.items()

    index = ["--gin.make_index.kind='exact'", "--gin.make_index.dimensions=8"]
    status, made, error = cli("index", *here, f"--gin.MODEL_DIR='{folder}'", *index)
    assert status == 0, error
    assert made["dimensions"] == 8
    assert "was not trained for" not in error
    query = Collection(work.collection).queries("test")[0]
    status, found, error = cli("search", *here, "--gin.SEARCHER='exact'", f"--gin.QUERY={query.text!r}")
    assert status == 0, error
    assert found["passages"]
