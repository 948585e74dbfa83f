"""Damaged checkpoints: each file of one torn, lost or changed, and what training and searching make of it."""

import os
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import CONFIG, SHAPES, batches, retriever

from retrieval_jax import storage
from retrieval_jax.errors import UserError
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training import checkpoints, checksums, model_folder, partitioning
from retrieval_jax.training.loop import fit
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


def test_training_goes_on_from_the_whole_one_and_saves_the_step_again(trained, tmp_path: Path, capsys):
    folder, _ = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    truncate(tmp_path / "checkpoints" / "2" / "params" / "manifest.ocdbt")
    run = {"batches": batches, "dev": lambda params: {}, "folder": tmp_path, "save_every": 1}
    assert fit(retriever(), steps=2, **run)["step"] == 2  # although a checkpoint of step 2 was there
    told = capsys.readouterr().err
    assert "manifest.ocdbt has" in told
    assert "going on from step 1" in told
    saved = checkpoints.Checkpoints(tmp_path)
    assert [saved.latest(), saved.fault(2)] == [2, None]
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
    assert model_folder.open_model(tmp_path).step == 2
    flip(tmp_path / "checkpoints" / "2" / "params" / "_sharding")
    opened = model_folder.open_model(tmp_path)
    assert opened.step == 1
    assert opened.model.config == T5Config(**vars(CONFIG))
    assert same(opened.params, states[1][0])
    assert "the one of step 1 is taken" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"checkpoints/2: damaged \(params/_sharding is not what was written"):
        model_folder.open_model(tmp_path, step=2)
    assert (tmp_path / "checkpoints" / "2").exists()  # a reader moves nothing
