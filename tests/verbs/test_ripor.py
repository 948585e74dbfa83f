"""`ripor`: its stages in order, each skipped where its work is there; a round goes on from the last one."""

import json
import shutil
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
from model_folders import random_params, write_model_folder
from staged import command, made, stages

from retrieval_jax.checkpoints.model_folder import lazy_params
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.residual import Codebooks
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.verbs.ripor import RiporConfig

STEPS = {"dense": 3, "seq2seq": 0, "rank": 2}


def given(source: Path, folder: Path, **ripor: object) -> list[str]:
    tiny = {"kl.prefix_lengths": (1, 2), "ripor.mining_beams": 4, "ripor.steps": STEPS}
    return command("ripor", source, folder, tiny | {f"ripor.{name}": value for name, value in ripor.items()})


@pytest.mark.slow
def test_each_round_begins_where_the_last_one_ended(source: Path, tmp_path: Path, cli):
    work = Workspace(tmp_path / "work")
    status, told, err = cli(*given(source, work.folder, rounds=1))
    assert status == 0, err
    assert [line.split(" ", 1)[0] for line in stages(err)] == [f"{n}/8" for n in range(1, 9)]
    assert {"bm25", "ripor_dense", "ripor_teacher", "ripor_1"} == told["search"]["metrics"].keys()

    # The retriever begins as the dense encoder, its codes as the centroids times the scale.
    (_, _, before), (_, _, after) = (lazy_params(work.model(name)) for name in ("ripor_dense", "ripor_1"))
    for name, array in before.items():
        np.testing.assert_allclose(after[name].read(), array.read(), rtol=1e-6)
    centroids = Codebooks.open(work.docids("rq_2x8")).vectors_LxVxE.reshape(-1, 16)
    kernel = after["decoder/logits_dense/kernel"].read()
    np.testing.assert_allclose(kernel[:, 2 : 2 + len(centroids)].T, 1.25 * centroids, rtol=1e-5, atol=1e-7)
    assert DocidTable.open(work.docids("rq_2x8")).length >= 2

    # The same command makes nothing anew; another round makes only what is its own.
    there = made(work)
    assert cli(*given(source, work.folder, rounds=1))[0] == 0
    assert made(work) == there
    status, told, err = cli(*given(source, work.folder, rounds=2))
    assert status == 0, err
    later = made(work)
    assert {path: later[path] for path in there} == there
    names = (
        "negatives/ripor_2",
        "scores/ripor_2",
        "models/ripor_2",
        "searchers/ripor_1_beams",
        "searchers/ripor_2",
    )
    assert all(any(name in path for name in names) for path in later.keys() - there.keys())
    mined = [storage.read_manifest(work.negatives(f"ripor_{n}"), "mine")["recipe"] for n in (1, 2)]
    assert "prefix" in json.dumps(mined[1])
    description = json.loads((work.model("ripor_2") / "model.json").read_text())
    assert description["initial_checkpoint"] == str(work.model("ripor_1"))
    assert description["settings"]["score"] == "logits"


@pytest.mark.slow
def test_cross_entropy_may_come_before_the_ranking(source: Path, tmp_path: Path, cli):
    work = Workspace(tmp_path / "work")
    steps = "{'dense': 3, 'seq2seq': 2, 'rank': 2}"
    status, told, err = cli(*given(source, work.folder, rounds=1), f"--gin.ripor.steps={steps}")
    assert status == 0, err
    assert [line.split(" ", 1)[0] for line in stages(err)] == [f"{n}/9" for n in range(1, 10)]
    assert {"ripor_0", "ripor_1"} <= told["search"]["metrics"].keys()
    began = {
        name: json.loads((work.model(name) / "model.json").read_text())["initial_checkpoint"]
        for name in ("ripor_0", "ripor_1")
    }
    assert began == {"ripor_0": str(work.model("ripor_dense")), "ripor_1": str(work.model("ripor_0"))}
    curve = (work.model("ripor_0") / "learning_curve.jsonl").read_text().splitlines()
    assert json.loads(curve[-1])["step"] == 2


def test_a_training_of_no_steps_is_left_out_and_some_training_is_left():
    config = RiporConfig(source="x", steps=STEPS, rounds=2)
    assert config.generative == ["ripor_1", "ripor_2"]
    whole = RiporConfig(source="x", rounds=1)
    assert whole.generative == ["ripor_0", "ripor_1"]
    assert len(whole.stages()) == len(RiporConfig(source="x", steps=STEPS, rounds=1).stages()) + 1


def test_nothing_to_train_is_refused(source: Path, tmp_path: Path, cli):
    status, _, err = cli(*given(source, tmp_path, rounds=0))
    assert status == 2
    assert err.splitlines()[-1].startswith("retrieval-jax: ripor.rounds: 0")


def test_its_own_dense_encoder_may_be_the_teacher_and_docids_may_begin_at_random():
    RiporConfig(source="x", steps=STEPS, teacher="ripor_dense").check()
    gin.parse_config("InitialCheckpoint.docid_centroids = False")
    RiporConfig(source="x", steps=STEPS, docids="semantic").check()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"docids": "atomic"}, "DOCIDS: atomic docids have no centroids"),
        ({"teacher": "nobody"}, "searchers/nobody: nothing finished here"),
    ],
)
def test_what_a_later_stage_lacks_is_told_before_anything_is_made(
    source: Path, tmp_path: Path, cli, settings, words
):
    status, _, err = cli(*given(source, tmp_path, **settings))
    assert status == 2
    assert words in err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_rounds_without_train_queries_end_after_the_import(source: Path, tmp_path: Path, cli):
    folder, work = tmp_path / "unlabelled", Workspace(tmp_path / "work")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.train.tsv"))
    status, _, err = cli(*given(folder, work.folder))
    assert status == 2
    assert err.splitlines()[-1].endswith("add queries.train.tsv, or --gin.ripor.rounds=0")
    assert not work.model("ripor_dense").exists()


def test_a_model_that_began_with_other_weights_is_refused(collection: Collection, tmp_path: Path):
    """Whether it is trained is told by its checkpoints: what has none yet begins anew."""
    config, work = RiporConfig(source="x", work_dir=str(tmp_path)), Workspace(tmp_path)
    model = DualEncoder(T5Config(1024, 8, 1, 8, 8, 0, 1))

    def write(scale: float) -> None:
        shutil.rmtree(work.model("ripor_dense"), ignore_errors=True)
        params = jax.tree.map(lambda x: scale * x, random_params(model))
        write_model_folder(work.model("ripor_dense"), model, params, collection)
        config.note_beginning("ripor_0", "ripor_dense")

    write(1.0)
    write(2.0)
    (work.model("ripor_0") / "checkpoints" / "3").mkdir(parents=True)
    (work.model("ripor_0") / "model.json").write_text("{}")
    write(2.0)
    with pytest.raises(UserError, match=r"ripor_0: began with other weights of ripor_dense than"):
        write(1.0)
    write(2.0)
