"""Programs: the training loop runs the very function that preflight compiles."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from tiny_training import SHAPES, batches, retriever

from retrieval_jax.core import configuration
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.mesh import partitioning
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training import loop
from retrieval_jax.training.program import DoesNotDivide, bytes_per_device, plan_train_step
from retrieval_jax.training.settings import TrainSettings
from retrieval_jax.training.step import initial_state
from retrieval_jax.verbs.preflight import configured

CHOICES = [
    "--gin.LossSpikeGuard.on_spike='skip'",
    "--gin.train.microbatches=2",
    "--gin.train.random_bits='rbg'",
    "--gin.SEED=3",
    "--gin.STEPS=2",
]


@pytest.mark.parametrize("choices", [[], CHOICES])
def test_train_runs_the_program_that_preflight_compiles(
    arguments, work, cli, tmp_path, monkeypatch, choices: list[str]
):
    """One is planned from the batches of a collection, the other from shapes: both lower to the same text."""
    assert cli("docids", *arguments, "--gin.DOCIDS='naive'")[0] == 0
    planned, calls = [], []

    def recording(*args, **kwargs):
        program = plan_train_step(*args, **kwargs)
        planned.append(program)

        def function(*args):
            calls.append([x.aval for x in jax.tree.leaves(args)])
            return program.function(*args)

        function.trace = program.function.trace  # the loop traces it first
        return dataclasses.replace(program, function=function)

    monkeypatch.setattr(loop, "plan_train_step", recording)
    given = [*arguments, "--gin.STEPS=2", *choices]
    status, _, err = cli("train", *given, "--gin_file=runs/naive.gin", f"--gin.MODEL_DIR='{tmp_path}'")
    assert status == 0, err
    (trained,) = planned

    bindings = [argument.removeprefix("--gin.") for argument in given]
    configuration.configure(["runs/naive.gin"], bindings)
    plan = configured(search=False, passages=None, vocab_size=None)
    compiled = plan.program(partitioning.make_mesh())
    assert jax.tree.structure(compiled.arguments) == jax.tree.structure(trained.arguments)
    assert compiled.arguments == trained.arguments  # shapes, dtypes and shardings
    texts = [program.function.lower(*program.arguments).as_text() for program in (trained, compiled)]
    assert texts[0] == texts[1]
    # The loop calls the planned function with arrays of the planned shapes.
    expected = [(x.shape, x.dtype) for x in jax.tree.leaves(trained.arguments)]
    assert [[(x.shape, x.dtype) for x in call] for call in calls] == [expected] * 2
    assert DocidTable.open(work.docids("naive")).length == plan.shapes["decoder_target_tokens"][1]


def test_a_planned_step_runs_on_what_its_arguments_say():
    shapes = SHAPES | {"decoder_target_tokens": (8, 3), "decoder_loss_weights": (8, 3)}
    mesh = partitioning.all_devices()
    model, settings = retriever(), TrainSettings()
    program = plan_train_step(model, shapes, settings, mesh)
    state = initial_state(model, program.arguments[0], shapes, settings.seed)
    state, metrics = program.function(
        state, jax.device_put(next(batches(0)), partitioning.batch_sharding(mesh))
    )
    assert int(state.step) == 1
    assert np.isfinite(float(metrics["loss"]))
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    held = program.argument_bytes()
    assert held["parameters"] == 4 * parameters
    assert held["batch"] == 4 * sum(np.prod(shape) for shape in shapes.values())
    assert 2 * held["parameters"] < held["optimizer"] < 2 * held["parameters"] + 64


def test_what_does_not_divide_is_told():
    mesh = partitioning.all_devices()
    sharding = partitioning.batch_sharding(mesh)
    assert (
        bytes_per_device({"a": jax.ShapeDtypeStruct((6, 2), np.int16, sharding=sharding)}) == 24 // mesh.size
    )
    abstract = jax.sharding.AbstractMesh((4, 1), partitioning.MESH_AXES)
    place = jax.sharding.NamedSharding(abstract, jax.sharding.PartitionSpec("data"))
    assert bytes_per_device([jax.ShapeDtypeStruct((8, 2), np.float32, sharding=place)]) == 16
    with pytest.raises(DoesNotDivide, match=r"an array of 6×2 does not divide as P"):
        bytes_per_device([jax.ShapeDtypeStruct((6, 2), np.float32, sharding=place)])


@pytest.mark.parametrize("kind", ["naive_digits", "atomic"])
def test_a_searcher_runs_the_search_that_preflight_compiles(arguments, work, cli, tmp_path, kind: str):
    """A searcher of a trained model, opened on one device, and the plan of gin's values alone."""
    kinds = [
        f"--gin.DOCIDS='{kind}'",
        f"--gin.MODEL_DIR='{tmp_path / 'model'}'",
        "--gin.STEPS=1",
        "--gin.K=7",
    ]
    given, file = [*arguments, *kinds], "runs/atomic.gin" if kind == "atomic" else "runs/naive.gin"
    assert cli("docids", *given)[0] == 0
    for verb in ("train", "index"):
        status, made, err = cli(verb, *given, f"--gin_file={file}", "--gin.make_index.name='planned'")
        assert status == 0, err
    searcher = Searcher.open(made["searcher"])
    lowered = []
    decode = searcher._decode

    def recording(*args, **planning):
        lowered.append(decode.lower(*args, **planning).as_text())
        return decode(*args, **planning)

    searcher._decode = recording
    assert len(searcher.search(["how do I sort a list?"], 7)[0]) == 7

    configuration.configure([file], [re.sub(r"^--(gin\.)?", "", argument) for argument in given])
    plan = configured(search=True, passages=None, vocab_size=None, k=7)
    program = plan.program(partitioning.all_devices())
    assert lowered == [program.function.lower(*program.arguments).as_text()]
    assert program.memory["batch"]["encoder_input_tokens"].shape == (8, 32)
