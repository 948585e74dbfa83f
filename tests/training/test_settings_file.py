"""Going on with other settings: told and refused, or accepted and written anew."""

import json
from pathlib import Path

import pytest
from tiny_training import curve

from retrieval_jax.checkpoints.model_folder import DESCRIPTION
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.training import settings_file


def test_a_run_goes_on_with_more_steps_unasked_and_with_other_settings_only_if_accepted(
    work, arguments, cli, tmp_path: Path
):
    assert cli("docids", *arguments, "--gin.DOCIDS='atomic'")[0] == 0
    folder = tmp_path / "model"
    here = [
        *arguments,
        "--gin_file=runs/atomic.gin",
        f"--gin.MODEL_DIR='{folder}'",
        "--gin.train.log_every=1",
    ]
    # train.steps is the schedule's number of steps too, whatever STEPS is: with 2, the rate would end at 0.
    here.append("--gin.STEPS=2")
    here.append("--gin.learning_rate.warmup=1")

    def train(steps: int, *more: str) -> tuple[int, str]:
        status, _, err = cli("train", *here, f"--gin.train.steps={steps}", *more)
        return status, str(err)

    assert train(4)[0] == 0
    rates = [p["learning_rate"] for p in curve(folder) if "learning_rate" in p]
    assert rates[1:] == pytest.approx([1e-4, 1e-4 * 2 / 3, 1e-4 / 3])  # 1e-4 is the peak

    free = ["--gin.train.microbatches=2"]
    assert (
        train(
            5,
            *free,
            "--gin.train.save_every=7",
            "--gin.T5Config.remat='full'",
            "--gin.LossSpikeGuard.window=9",
        )[0]
        == 0
    )
    assert "STEPS = 5" in (folder / "config.gin").read_text()

    other = [
        "--gin.SEED=3",
        "--gin.train.batch_size=24",
        "--gin.learning_rate.peak=2e-4",
        "--gin.DataConfig.mixture={'labelled': 1.0}",
        "--gin.GenerativeRetriever.objective=@rdrop",
        "--gin.rdrop.weight=0.5",
        "--gin.train.random_bits='rbg'",
    ]
    status, told = train(6, *other)
    assert status == 2
    for change in (
        "train.seed was 0 and is 3",
        "train.batch_size was 32 and is 24",
        "learning_rate.peak was '0.0001' and is '0.0002'",
        "DataConfig.mixture was",
        "train.random_bits was 'threefry2x32' and is 'rbg'",
        "GenerativeRetriever.objective was 'cross_entropy' and is 'rdrop'",
        "rdrop.weight was None and is '0.5'",
    ):
        assert change in told
    assert "SEED = 3" not in (folder / "config.gin").read_text()
    assert curve(folder)[-1]["step"] == 5

    status, _ = train(6, *other[:4], "--gin.train.on_change='accept'")
    assert status == 0
    assert "SEED = 3" in (folder / "config.gin").read_text()
    position = folder / "checkpoints" / "6" / "position" / "metadata"
    position = json.loads(position.read_text())
    assert position["examples"] == 5 * 32 + 24
    assert [step for step, _ in position["losses"]] == [6]  # those with other settings are no measure
    assert train(6)[0] == 2  # with the first settings, which now are the other ones

    # A checkpoint that is not the newest can be indexed.
    indexed = [*arguments, f"--gin.MODEL_DIR='{folder}'", "--gin.make_index.name='of_5'"]
    assert cli("index", *indexed, "--MODEL_STEP=5")[0] == 0
    assert storage.read_manifest(work.searcher("of_5"), "index")["step"] == 5
    assert cli("index", *indexed, "--MODEL_STEP=3")[0] == 2

    # Numbers that go wrong have a status of their own: the same command would meet them again.
    steep = [*other[:4], "--gin.train.on_change='accept'", "--gin.learning_rate.peak=1e38"]
    status, told = train(9, *steep)
    assert status == 3
    assert (
        "lower the learning rate, or leave such updates out with --gin.LossSpikeGuard.on_spike=\"'skip'\""
        in told
    )
    assert curve(folder)[-1]["step"] == 6


def begin(folder: Path) -> None:
    """Makes a folder of which a training has saved something."""
    (folder / DESCRIPTION).write_text("{}")
    (folder / "checkpoints" / "1").mkdir(parents=True)


def test_a_run_that_never_saved_anything_may_begin_with_other_settings(tmp_path: Path):
    """What refuses to train, an R-Drop in blocks for example, is changed and trained in the same folder."""
    settings_file.keep(tmp_path, {"objective": "rdrop"}, "refuse", "")
    settings_file.keep(tmp_path, {"objective": "cross_entropy"}, "refuse", "")
    assert storage.read_json(tmp_path / settings_file.NAME, "") == {"objective": "cross_entropy"}
    begin(tmp_path)
    with pytest.raises(UserError, match="objective was 'cross_entropy' and is 'rdrop'"):
        settings_file.keep(tmp_path, {"objective": "rdrop"}, "refuse", "")


def test_what_is_compared_is_what_json_holds(tmp_path: Path):
    begin(tmp_path)
    settings_file.keep(tmp_path, {"a": (1, 2), "b": None}, "refuse", "")
    settings_file.keep(tmp_path, {"a": [1, 2], "b": None}, "refuse", "")
    with pytest.raises(UserError, match=r"settings: a was \[1, 2\] and is \[1\]; c was None and is 4: set"):
        settings_file.keep(tmp_path, {"a": [1], "c": 4}, "refuse", "")
    with pytest.raises(UserError, match="no choice 'yes': refuse or accept"):
        settings_file.keep(tmp_path, {}, "yes", "")
    assert storage.read_json(tmp_path / settings_file.NAME, "") == {"a": [1, 2], "b": None}


def test_microbatches_that_were_not_noted_are_taken(tmp_path: Path):
    """Earlier versions compared them for dual encoders alone."""
    begin(tmp_path)
    settings_file.keep(tmp_path, {"a": 1}, "refuse", "")
    settings_file.keep(tmp_path, {"a": 1, "train.microbatches": 4}, "refuse", "")
    with pytest.raises(UserError, match=r"train.microbatches was 4 and is 2"):
        settings_file.keep(tmp_path, {"a": 1, "train.microbatches": 2}, "refuse", "")
