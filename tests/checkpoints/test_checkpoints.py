"""Damaged checkpoints: each file of one torn, lost or changed, and what training and searching make of it."""

import os
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_training import CONFIG, SHAPES, batches, retriever, train

from retrieval_jax.checkpoints import checkpoints, checksums, model_folder
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.optimizers import adafactor
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step


@pytest.fixture(scope="module")
def abstract():
    return abstract_state(retriever(), partitioning.make_mesh(), SHAPES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, abstract) -> tuple[Path, dict]:
    """A model folder with checkpoints of steps 1 and 2, and what they hold."""
    folder, states = tmp_path_factory.mktemp("model"), {}
    model, mesh = retriever(), partitioning.make_mesh()
    state, step = initial_state(model, abstract, SHAPES, 0), make_train_step(model, mesh, abstract, 0)
    saved = checkpoints.Checkpoints(folder)
    for number, batch in zip((1, 2), batches(0), strict=False):
        state, _ = step(state, batch)
        saved.save(number, state.params, state.optimizer)
        states[number] = jax.device_get((state.params, state.optimizer))
    saved.close()
    return folder, states


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def restored(folder: Path, abstract) -> tuple:
    saved = checkpoints.Checkpoints(folder)
    try:
        return saved.restore_newest(abstract.params, abstract.optimizer)
    finally:
        saved.close()


def same(tree: object, expected: object) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(expected)))


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip])
def test_whichever_file_is_damaged_the_numbers_are_those_of_a_whole_checkpoint(
    trained, abstract, tmp_path: Path, damage
):
    folder, states = trained
    newest = folder / "checkpoints" / "2"
    files = sorted(p.relative_to(folder) for p in newest.rglob("*") if p.is_file())
    assert len(files) > 20
    steps = Counter()
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        damage(copy / file)
        params, optimizer, step = restored(copy, abstract)
        assert same((params, optimizer), states[step]), file
        assert (copy / "damaged_checkpoints" / "2").exists() == (step == 1)
        assert (copy / "checkpoints" / "2").exists() == (step == 2)
        steps[step] += 1
    # Only without its checksums is a checkpoint still what it was.
    assert steps == ({1: len(files) - 1, 2: 1} if damage is Path.unlink else {1: len(files)})


def test_a_checkpoint_without_checksums_is_left_where_orbax_cannot_read_it(
    trained, abstract, tmp_path: Path, capsys
):
    """As after a kill between the save and the checksums."""
    folder, states = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "2" / checksums.NAME).unlink()
    truncate(tmp_path / "checkpoints" / "2" / "params" / "manifest.ocdbt")
    params, optimizer, step = restored(tmp_path, abstract)
    assert step == 1
    assert same((params, optimizer), states[1])
    assert f"{tmp_path}/checkpoints/2: damaged (" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [2, 3])
def test_checksums_that_a_kill_cut_off_are_written_by_the_next_call(trained, tmp_path: Path, steps: int):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "2"
    (newest / checksums.NAME).unlink()
    opened = checkpoints.Checkpoints(tmp_path, read_only=True)
    assert opened.latest() == 1  # what reads passes over it
    opened.close()
    run = {"batches": batches, "evaluator": lambda params: {}, "folder": tmp_path, "save_every": 1}
    assert train(retriever(), steps=steps, **run)["step"] == steps
    assert (newest / checksums.NAME).is_file() == newest.is_dir()
    opened = checkpoints.Checkpoints(tmp_path, read_only=True)
    assert [opened.latest(), opened.find_damage(steps)] == [steps, None]
    opened.close()


def test_training_goes_on_from_the_whole_one_and_saves_the_step_again(trained, tmp_path: Path, capsys):
    folder, _ = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    truncate(tmp_path / "checkpoints" / "2" / "params" / "manifest.ocdbt")
    run = {"batches": batches, "evaluator": lambda params: {}, "folder": tmp_path, "save_every": 1}
    assert train(retriever(), steps=2, **run)["step"] == 2  # although a checkpoint of step 2 was there
    told = capsys.readouterr().err
    assert "manifest.ocdbt has" in told
    assert "going on from step 1" in told
    assert train(retriever(), steps=1, **run)["step"] == 2
    assert "has 2 steps already, more than STEPS=1" in capsys.readouterr().err
    saved = checkpoints.Checkpoints(tmp_path)
    assert [saved.latest(), saved.find_damage(2)] == [2, None]
    saved.close()


def test_where_nothing_can_be_restored_it_is_told_in_one_line_and_nothing_moves(
    trained, abstract, tmp_path: Path
):
    folder, _ = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    other = abstract_state(retriever(adafactor), partitioning.make_mesh(), SHAPES)
    with pytest.raises(UserError, match=r"checkpoints/2: does not fit this configuration .*: use the optimi"):
        restored(tmp_path, other)
    for step in "12":
        (tmp_path / "checkpoints" / step / "position" / "metadata").unlink()
    with pytest.raises(UserError, match=r"checkpoints/2: damaged \(position/metadata: No such file.*delete"):
        restored(tmp_path, abstract)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_opening_a_model_takes_the_newest_whole_checkpoint_and_refuses_a_damaged_one(
    trained, tmp_path: Path, collection, capsys
):
    folder, states = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = retriever()
    storage.write_json(tmp_path / "model.json", model_folder.describe(model))
    shutil.copyfile(collection.vocabulary_path, tmp_path / "sentencepiece.model")
    assert model_folder.load_model(tmp_path).step == 2
    flip(tmp_path / "checkpoints" / "2" / "params" / "_sharding")
    opened = model_folder.load_model(tmp_path)
    assert opened.step == 1
    assert opened.model.config == T5Config(**vars(CONFIG))
    assert same(opened.params, states[1][0])
    assert "the one of step 1 is taken" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"checkpoints/2: damaged \(params/_sharding is not what was written"):
        model_folder.load_model(tmp_path, step=2)
    assert (tmp_path / "checkpoints" / "2").exists()  # a reader moves nothing
    assert model_folder.read_description_and_step(tmp_path, 1)[1] == 1
    with pytest.raises(
        UserError, match=r"no checkpoint of step 3 \(any more\), but of 2, 1: `retrieval-jax ind"
    ):
        model_folder.load_model(tmp_path, step=3)


def scripted(metric: str, *scores: float):
    """What `dev` gives at each evaluation, one after the other."""
    values = iter(scores)
    return lambda params: {metric: next(values)}


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_the_best_on_dev_stays_beside_the_newest_also_across_a_stop(tmp_path: Path, capsys):
    run = {"batches": batches, "folder": tmp_path, "save_every": 2, "eval_every": 1, "keep": 2}
    # Step 3 is the best of all, but was not saved; step 4 equals 2, and is newer.
    made = train(
        retriever(), evaluator=scripted("MRR@10", 0.1, 0.5, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1), steps=8, **run
    )
    assert steps_of(tmp_path) == [4, 6, 8]
    assert (made["best_step"], made["best/MRR@10"]) == (4, 0.5)
    assert "step 4 was the best on dev: --MODEL_STEP=4 takes that one" in capsys.readouterr().err
    train(retriever(), evaluator=scripted("MRR@10", *[0.3] * 4), steps=12, **run)
    assert steps_of(tmp_path) == [4, 10, 12]
    made = train(retriever(), evaluator=scripted("MRR@10", 0.1, 0.6), steps=14, **run)
    assert steps_of(tmp_path) == [4, 12, 14]  # the best until then would go with the next save
    assert made["best_step"] == 14
    assert capsys.readouterr().err.count("was the best") == 1  # of the run to step 12

    def never(*_):
        raise AssertionError("finished training looked at its data")

    assert train(retriever(), **run | {"batches": never}, evaluator=never, steps=14)["best_step"] == 14


def test_the_best_is_by_the_metric_that_is_named_or_none(tmp_path: Path):
    run = {"batches": batches, "save_every": 1, "eval_every": 1, "steps": 4, "keep": 1}
    scores = (3.0, 2.0, 4.0, 5.0)
    for keep_best, kept in (("loss", [2, 4]), (None, [4]), ("MRR@10", [4])):
        folder = tmp_path / str(keep_best)
        made = train(
            retriever(), evaluator=scripted("loss", *scores), folder=folder, keep_best=keep_best, **run
        )
        assert steps_of(folder) == kept
        assert made.get("best_step") == (2 if keep_best == "loss" else None)


def test_files_that_are_written_while_steps_run_are_what_was_saved(tmp_path: Path, monkeypatch):
    """The steps after a save are given its arrays' memory. All is written when training ends."""
    run = {"batches": batches, "steps": 8, "save_every": 1, "keep": 8, "evaluator": lambda params: {}}
    train(retriever(), folder=tmp_path / "before", **run)
    monkeypatch.setattr(checkpoints, "in_background", lambda: True)
    train(retriever(), folder=tmp_path / "background", **run)
    model = retriever()
    abstract = abstract_state(model, partitioning.make_mesh(), SHAPES)
    saved = [checkpoints.Checkpoints(tmp_path / name, read_only=True) for name in ("before", "background")]
    for step in range(1, 9):
        first, second = (one.restore(step, abstract.params, abstract.optimizer) for one in saved)
        assert same(first, second)
        assert first[2] == step
        assert checksums.find_damage(tmp_path / "background" / "checkpoints" / str(step)) is None
        assert (tmp_path / "background" / "checkpoints" / str(step) / checksums.NAME).exists()
    for one in saved:
        one.close()


def test_what_goes_wrong_in_the_background_ends_the_run(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(checkpoints, "in_background", lambda: True)
    # The kernel's own error of a full disk.
    monkeypatch.setattr(checksums, "write", lambda folder: Path("/dev/full").write_bytes(b"x"))
    run = {"batches": batches, "evaluator": lambda params: {}}
    with pytest.raises(OSError, match="No space left"):  # as the next save begins
        train(retriever(), folder=tmp_path / "next", steps=10**6, save_every=2, **run)
    assert steps_of(tmp_path / "next") == [2]
    with pytest.raises(OSError, match="No space left"):  # as the run ends
        train(retriever(), folder=tmp_path / "end", steps=2, **run)


def test_training_goes_on_from_the_best_alone_and_a_damaged_best_hinders_nothing(tmp_path: Path):
    run = {"batches": batches, "folder": tmp_path, "save_every": 1, "eval_every": 1, "keep": 1}
    train(retriever(), evaluator=scripted("MRR@10", 0.2, 0.3, 0.1), steps=3, **run)
    train(retriever(), evaluator=scripted("MRR@10", 0.9), steps=4, **run)
    assert steps_of(tmp_path) == [2, 4]
    train(retriever(), evaluator=scripted("MRR@10", 0.1, 0.1), steps=6, **run)
    assert steps_of(tmp_path) == [4, 6]
    truncate(tmp_path / "checkpoints" / "6" / "params" / "manifest.ocdbt")
    train(retriever(), evaluator=lambda params: {}, steps=5, **run)
    assert steps_of(tmp_path) == [4, 5]
    truncate(tmp_path / "checkpoints" / "4" / "params" / "manifest.ocdbt")
    made = train(retriever(), evaluator=scripted("MRR@10", 0.1, 0.1), steps=7, **run)
    assert made["step"] == 7
    assert steps_of(tmp_path) == [4, 7]
