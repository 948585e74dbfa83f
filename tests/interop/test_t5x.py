"""Under T5X the project's models learn, search and score as under its own trainer and searcher."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import seqio
from tables import KINDS
from teacher import random_scores, write_scores

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.examples.batches import batches
from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.main import configure_verbs, main
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.objectives import cross_entropy
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.training.optimizers import adafactor, adamw
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step
from retrieval_jax.verbs.importing import import_collection

if importlib.util.find_spec("t5x") is None:
    pytest.skip("needs T5X on PYTHONPATH: see retrieval_jax/interop/README.md", allow_module_level=True)

from retrieval_jax.interop.t5x import Model, training_task  # makes the next ones importable

from t5x import models, trainer, utils  # isort: skip
from t5x import partitioning as t5x_partitioning  # isort: skip
from t5x.examples.t5 import network  # isort: skip

ROOT = Path(__file__).parents[2]
SEED = 3


@pytest.fixture(scope="module")
def made(work, arguments):
    """The work folder, with docids."""
    for kind in ("naive", "atomic"):
        assert main(["docids", *arguments, f"--DOCIDS={kind}", "--json"]) == 0
    return work


@pytest.fixture
def settings(arguments):
    """Makes gin say what a training run of the small collection would be told."""

    def configure(file: str, *more: str) -> None:
        bindings = [argument.removeprefix("--gin.") for argument in arguments]
        configure_verbs([file], [*bindings, *more])

    yield configure
    gin.clear_config()


def own_losses(model, first: list[dict], params: dict | None = None) -> tuple[list[float], dict]:
    """The project's own trainer: (each step's loss, the parameters before the first)."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    shapes = {name: x.shape for name, x in first[0].items()}
    abstract = abstract_state(model, mesh, shapes)
    state, losses = initial_state(model, abstract, shapes, SEED), []
    params = jax.device_get(state.params)
    step = make_train_step(model, mesh, abstract, SEED)
    for batch in first:
        state, metrics = step(state, jax.device_put(batch, partitioning.batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return losses, params


def t5x_losses(model: Model, first: list[dict], params: dict, folder: Path) -> list[float]:
    """The same of T5X's, from those parameters."""
    partitioner = t5x_partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=partitioning.axis_rules()
    )
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: x.shape for name, x in first[0].items()},
        input_types={name: x.dtype for name, x in first[0].items()},
        partitioner=partitioner,
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    made = trainer.Trainer(
        model,
        state.replace_params(type(state.params)(params)),
        partitioner,
        [],
        str(folder),
        initializer.train_state_axes,
        jax.random.PRNGKey(SEED),
        learning_rate_fn=lambda step: 0.0,  # only told
        num_microbatches=None,
    )
    with made:
        return [float(made.train(iter([batch]), 1).result()["loss"].value) for batch in first]


CASES = {
    "generative, Adafactor": ("runs/naive.gin", GenerativeRetriever, "naive", adafactor),
    "dual encoder, AdamW": ("runs/dual_encoder.gin", DualEncoder, None, adamw),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_projects_own_trainer(made, settings, tmp_path, case):
    """Of the first steps, dropout and the optimiser's updates included."""
    file, retriever, docids, optimizer = CASES[case]
    settings(file, "T5Config.dropout_rate=0.1", "adafactor.schedule=@learning_rate()")
    model = Model(retriever, str(made.folder), DataConfig(), docids, optimizer)
    stream = batches(model.examples.stages(), model.examples.targets, {}, 32, SEED)
    first = [next(stream) for _ in range(4)]
    expected, params = own_losses(model.model, first)
    assert len(set(expected)) == 4
    assert t5x_losses(model, first, params, tmp_path) == pytest.approx(expected, rel=1e-5)


def test_groups_of_docids_are_ranked_alike(own_work, collection, settings, tmp_path):
    """By T5X's trainer, with the batches that its feature converter is to make."""
    storage.build_once(own_work.docids("naive"), {}, KINDS["naive"](collection).write)
    write_scores(own_work, "teacher", random_scores(collection))
    ranked = ("objective=@margin_mse", "score='logits'")
    settings("runs/naive.gin", "T5Config.dropout_rate=0.1", *(f"GenerativeRetriever.{x}" for x in ranked))
    data = DataConfig({"labelled": 1.0}, negatives=3, scores="teacher", token_dropout={})
    model = Model(GenerativeRetriever, str(own_work.folder), data, "naive", adamw)
    stream = batches(model.examples.stages(), model.examples.targets, {}, 16, SEED)
    first = [next(stream) for _ in range(2)]
    expected, params = own_losses(model.model, first)
    assert t5x_losses(model, first, params, tmp_path) == pytest.approx(expected, rel=1e-5)
    task = seqio.get_mixture_or_task(training_task(model)).get_dataset(model.feature_lengths, "train")
    (made,) = model.FEATURE_CONVERTER_CLS(pack=False)(task, model.feature_lengths).batch(4).take(1)
    assert {name: (x.dtype, x.shape[1:]) for name, x in made.items()} == {
        name: (x.dtype, x.shape[1:]) for name, x in first[0].items()
    }


def test_a_collection_without_train_queries_makes_its_own(source, collection, settings, tmp_path):
    """As under the project's own trainer; what that alone does is told by its name."""
    folder, work = tmp_path / "unlabelled", tmp_path / "work"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.train.tsv"))
    import_collection(str(folder), str(work), vocabulary_path=str(collection.vocabulary_path))
    settings("runs/dual_encoder.gin")
    unlabelled = {"sentence": 3.0, "title": 1.0}
    data = DataConfig({"labelled": 1.0}, unlabelled=unlabelled, unlabelled_dropout={}, token_dropout={})
    model = Model(DualEncoder, str(work), data)
    prefix, mixture = "unlabelled.passages", seqio.get_mixture_or_task(training_task(model))
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {f"{prefix}.sentence": 0.75, f"{prefix}.title": 0.25}
    dropped = dataclasses.replace(data, unlabelled_dropout={"sentence": 0.5})
    with pytest.raises(UserError, match=r"DataConfig.unlabelled_dropout: only the project's own trainer"):
        training_task(Model(DualEncoder, str(work), dropped))


def test_t5xs_own_network_gives_the_same_loss():
    """With the same parameters, under the same names."""
    sizes = {"vocab_size": 64, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    sizes |= {"num_encoder_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0}
    theirs = network.T5Config(**sizes, mlp_activations=("gelu", "linear"), logits_via_embedding=False)
    vocabulary = seqio.PassThroughVocabulary(64)
    model = models.EncoderDecoderModel(
        network.Transformer(theirs),
        vocabulary,
        vocabulary,
        None,
        z_loss=1e-4,
        loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    )
    rng = np.random.default_rng(0)
    tokens = {"inputs": rng.integers(2, 64, (4, 9)), "targets": rng.integers(2, 64, (4, 6))}
    tokens["inputs"][1, 5:] = tokens["targets"][2, 3:] = 0
    batch = DocidTargets.to_batch({name: x.astype(np.int32) for name, x in tokens.items()})
    params = model.get_initial_variables(
        jax.random.PRNGKey(0), {k: x.shape for k, x in batch.items()}, {k: x.dtype for k, x in batch.items()}
    )["params"]
    objective = functools.partial(cross_entropy, z_loss=1e-4)
    ours, _ = GenerativeRetriever(T5Config(**sizes), objective=objective).loss_fn(params, batch, None)
    assert float(ours) == pytest.approx(float(model.loss_fn(params, batch, None)[0]), rel=1e-5)


def test_docids_are_arguments_of_the_search(made, settings):
    """Not constants of its program; T5X's state holds them only where the model searches."""
    settings("runs/naive.gin")
    model = Model(GenerativeRetriever, str(made.folder), DataConfig(), "naive", beams=10)
    batch = {"encoder_input_tokens": np.ones((2, 8), np.int32), "decoder_input_tokens": np.ones((2, 8))}
    shapes = {name: x.shape for name, x in batch.items()}
    variables = jax.eval_shape(lambda key: model.get_initial_variables(key, shapes), jax.random.key(0))
    search = jax.make_jaxpr(model.predict_batch_with_aux)
    params, docids = variables["params"], {"docids": variables["docids"]}
    constants = {x.shape for x in search(params, batch, None, docids).consts}
    assert not constants & {x.shape for x in model.docid_arrays().values() if x.ndim}
    trained = Model(GenerativeRetriever, str(made.folder), DataConfig(), "naive", adamw)
    assert {*trained.get_initial_variables(jax.random.key(0), shapes)} == {"params", "params_axes"}


@pytest.mark.parametrize("kind", ["naive", "atomic"])
def test_docids_along_the_trie_and_of_the_softmax_are_found(made, settings, kind):
    settings(f"runs/{kind}.gin")
    model = Model(GenerativeRetriever, str(made.folder), DataConfig(), kind, beams=10)
    texts, searcher = ["smooth a noisy signal", "progress bar"], model.searcher
    tokens = searcher.vocabulary.batch(texts, searcher.input_length)
    shapes = {"encoder_input_tokens": tokens.shape, "decoder_input_tokens": (2, 1)}
    variables = model.get_initial_variables(jax.random.key(0), shapes)
    docids = {"docids": variables["docids"]}
    rows, aux = model.predict_batch_with_aux(
        variables["params"], {"encoder_input_tokens": tokens}, None, docids
    )
    searcher.params = variables["params"]
    expected = searcher.search(texts, 10)
    for ranking, found, scores in zip(expected, np.asarray(rows), np.asarray(aux["scores"]), strict=True):
        ids, given = zip(*searcher.passages.ranked_list(found, scores.tolist()), strict=True)
        assert [*ids] == [passage for passage, _ in ranking]
        np.testing.assert_allclose(given, [score for _, score in ranking], rtol=1e-5)


def run(mode: str, arguments: list[str], folder: Path, *bindings: str) -> str:
    """T5X's command line; what it told."""
    command = [sys.executable, "-m", "retrieval_jax.interop.t5x", f"--run_mode={mode}"]
    command += [f"--gin_file=t5x/{mode}.gin", *(a for a in arguments if "WORK_DIR" in a or "T5Config" in a)]
    command += [f"--gin.{binding}" for binding in bindings]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_trains_resumes_evaluates_and_searches(made, arguments, settings, tmp_path):
    """By the gin files: what is found, and its scores, are those of the project's own searcher."""
    folder = tmp_path / "model"

    def train(steps: int) -> str:
        few = ("BATCH_SIZE=32", "utils.SaveCheckpointConfig.period=2", "__main__.train.eval_steps=1")
        return run("train", arguments, tmp_path, f"MODEL_DIR={str(folder)!r}", f"TRAIN_STEPS={steps}", *few)

    assert "main loop over steps 0-2" in train(2)
    assert "main loop over steps 2-4" in train(4)
    saved = [ocp.PyTreeCheckpointer().restore(folder / f"checkpoint_{n}" / "state") for n in (0, 2, 4)]
    assert [int(state["state"]["step"]) for state in saved] == [0, 2, 4]
    params = saved[-1]["target"]

    settings("runs/naive.gin")
    model = Model(GenerativeRetriever, str(made.folder), DataConfig(), "naive")
    opened = model.examples
    searcher = GenerativeSearcher(
        model.model, params, opened.table, opened.vocabulary, opened.settings.input_length, beams=10
    )

    checkpoint = f"CHECKPOINT_PATH='{folder}/checkpoint_4'"
    run("infer", arguments, tmp_path, checkpoint, f"INFER_OUTPUT_DIR='{tmp_path}/found'", "BEAMS=10")
    (file,) = (tmp_path / "found").glob("small_docs.naive.queries-*-of-00001")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    queries = opened.collection.queries("test")
    assert [(line["id"], line["query"]) for line in lines] == [(q.id, q.text) for q in queries]
    for line, ranking in zip(lines, searcher.search([q.text for q in queries], 10), strict=True):
        ids, scores = zip(*ranking, strict=True)
        assert [passage["id"] for passage in line["passages"]] == [*ids]
        assert [passage["score"] for passage in line["passages"]] == pytest.approx([*scores], rel=1e-6)

    output = f"EVAL_OUTPUT_DIR='{tmp_path}/eval'"
    run("eval", arguments, tmp_path, checkpoint, output, "utils.RestoreCheckpointConfig.mode='specific'")
    (metrics,) = (tmp_path / "eval" / "inference_eval").glob("*-metrics.jsonl")
    dev = opened.collection.queries("dev")
    found = searcher.search([q.text for q in dev], 10)
    hits = np.mean([any(p in q.positives for p, _ in r) for q, r in zip(dev, found, strict=True)])
    assert json.loads(metrics.read_text().splitlines()[-1])["Hits@10"] == pytest.approx(hits)


def test_what_is_missing_is_told_in_one_line(made, tmp_path):
    command = [sys.executable, "-m", "retrieval_jax.interop.t5x", "--run_mode=train"]
    command += ["--gin_file=t5x/train.gin", "--gin.WORK_DIR='nowhere'", "--gin.TRAIN_STEPS=1"]
    command += [f"--gin.MODEL_DIR='{tmp_path}'"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "nowhere/collection" in done.stderr.splitlines()[-1]
