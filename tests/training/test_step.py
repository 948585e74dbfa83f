"""The training step: every layout of the mesh and every way to save memory gives the plain step's numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gin
import jax
import numpy as np
import optax
import pytest

from retrieval_jax.core import configuration
from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.optimizers import adafactor, adamw
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step

SIZES = {
    "vocab_size": 64,
    "emb_dim": 16,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_dim": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "output_size": 128,
    "separate_target_embedding": True,
}
SHAPES = {"encoder_input_tokens": (8, 6), "decoder_input_tokens": (8, 3)}
STEPS = 2


def batch(position: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(position)
    inputs, targets = rng.integers(1, 64, (8, 6)), rng.integers(1, 128, (8, 3))
    weights = np.arange(3) < rng.integers(1, 4, 8)[:, None]
    made = {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets * weights,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :3],
        "decoder_loss_weights": weights,
    }
    return {name: x.astype(np.int32) for name, x in made.items()}


def run(
    make=adamw,
    settings: dict | None = None,
    parallelism: int = 1,
    dropout: float = 0.0,
    step_settings: dict | None = None,
    rules=partitioning.DEFAULT_RULES,
    **network,
):
    """(metrics of each step, the last state) of a tiny retriever; `settings` are the model's."""
    config = T5Config(**SIZES, dropout_rate=dropout, **network)
    model = GenerativeRetriever(config, make(optax.constant_schedule(1e-2)), **settings or {})
    mesh = partitioning.make_mesh(parallelism)
    abstract = abstract_state(model, mesh, SHAPES, rules)
    state, told = initial_state(model, abstract, SHAPES, 0), []
    step = make_train_step(model, mesh, abstract, 0, rules=rules, **step_settings or {})
    for position in range(STEPS):
        state, metrics = step(state, jax.device_put(batch(position), partitioning.batch_sharding(mesh)))
        told.append({name: float(x) for name, x in metrics.items()})
    assert step._cache_size() == 1
    return told, state


@pytest.fixture
def plain_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def plain() -> list[dict]:
    gin.clear_config()
    return run()[0]


def same(told: list[dict], expected: list[dict]) -> None:
    for a, b in zip(told, expected, strict=True):
        assert a == pytest.approx(b, rel=2e-4)


def test_what_a_step_tells(plain, plain_gin):
    assert {"loss", "accuracy", "accuracy_at/3", "gradient_norm", "learning_rate"} <= set(plain[0])
    assert plain[0]["learning_rate"] == pytest.approx(1e-2)
    assert plain[0]["loss"] == pytest.approx(np.log(128), abs=1)


def test_the_gradients_norm_is_theirs(plain, plain_gin):
    """Of arrays of one and two axes, against numpy."""
    model, first = GenerativeRetriever(T5Config(**SIZES, dropout_rate=0.0), adamw(lambda _: 0.0)), batch(0)
    mesh = partitioning.make_mesh(1)
    params = initial_state(model, abstract_state(model, mesh, SHAPES), SHAPES, 0).params
    gradients = jax.jit(jax.grad(lambda params: model.loss_fn(params, first, None)[0]))(params)
    expected = np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(gradients)))
    assert plain[0]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_with_adafactor_the_gradients_norm_reads_nothing_more(plain_gin, monkeypatch):
    """It guards every step, and a step of few examples takes as long as its gradients take to be read."""
    sizes = SIZES | {"vocab_size": 4096, "emb_dim": 128, "mlp_dim": 256, "head_dim": 64}
    model = GenerativeRetriever(T5Config(**sizes), adafactor(optax.constant_schedule(1e-2)))
    mesh = partitioning.make_mesh(1)
    abstract = abstract_state(model, mesh, SHAPES)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch(0).items()}

    def bytes_accessed() -> float:
        lowered = make_train_step(model, mesh, abstract, 0).lower(abstract, shapes)
        return lowered.compile().cost_analysis()["bytes accessed"]

    with_norm = bytes_accessed()
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
    monkeypatch.setattr("retrieval_jax.training.step._norm", lambda gradients: 0.0)
    assert with_norm - bytes_accessed() < 0.05 * parameters


def test_with_adafactor_a_step_that_may_skip_its_update_reads_and_writes_nothing_more(plain_gin):
    """The old state is read for the update anyway. Otherwise the step takes and tells no more."""
    sizes = SIZES | {"vocab_size": 4096, "emb_dim": 128, "mlp_dim": 256, "head_dim": 64}
    model = GenerativeRetriever(T5Config(**sizes), adafactor(optax.constant_schedule(1e-2)))
    mesh = partitioning.make_mesh(1)
    abstract = abstract_state(model, mesh, SHAPES)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch(0).items()}
    plain = make_train_step(model, mesh, abstract, 0).lower(abstract, shapes)
    assert "skipped" not in plain.out_info[1]
    limit = jax.ShapeDtypeStruct((), np.float32)
    skips = make_train_step(model, mesh, abstract, 0, can_skip=True).lower(abstract, shapes, limit)
    with_limit, without = (one.compile().cost_analysis()["bytes accessed"] for one in (skips, plain))
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
    assert with_limit - without < 0.05 * parameters


@pytest.mark.parametrize("microbatches", [1, 4])
def test_an_update_is_applied_up_to_the_limit_and_otherwise_leaves_all_but_the_step(
    plain, plain_gin, microbatches: int
):
    model = GenerativeRetriever(T5Config(**SIZES, dropout_rate=0.0), adamw(optax.constant_schedule(1e-2)))
    mesh = partitioning.make_mesh(1)
    abstract = abstract_state(model, mesh, SHAPES)
    step = make_train_step(model, mesh, abstract, 0, can_skip=True, microbatches=microbatches)
    first = jax.device_get(initial_state(model, abstract, SHAPES, 0))
    _, told = step(first, batch(0), np.float32(np.inf))
    assert float(told["loss"]) == pytest.approx(plain[0]["loss"], rel=1e-5)
    limits = {float(told["loss"]): 0, np.nextafter(np.float32(told["loss"]), 0): 1, np.inf: 0, -np.inf: 1}
    for limit, skipped in limits.items():
        state, told = step(first, batch(0), np.float32(limit))
        assert (int(state.step), float(told["skipped"])) == (1, skipped)
        same = jax.tree.map(np.array_equal, (state.params, state.optimizer), (first.params, first.optimizer))
        assert all(jax.tree.leaves(same)) == skipped


def test_microbatches_add_up_to_the_batch(plain, plain_gin):
    """Though they hold different numbers of target tokens."""
    same(run(step_settings={"microbatches": 4})[0], plain)


def test_microbatches_that_do_not_divide_the_batch_are_refused(plain_gin):
    with pytest.raises(UserError, match=r"microbatches: 3 does not divide the batch of 8"):
        run(step_settings={"microbatches": 3})


def test_hardware_random_bits_repeat(plain_gin):
    rbg = {"random_bits": "rbg"}
    told, again = run(dropout=0.5, step_settings=rbg)[0], run(dropout=0.5, step_settings=rbg)[0]
    assert told == again
    assert told[0]["loss"] != told[1]["loss"]


LAYOUTS = {  # gin file, model parallelism; into how many parts an MLP kernel and the softmax are cut
    "data": (None, 1, 1, 1),
    "tensor": (None, 2, 2, 2),
    "fsdp": ("sharding/fsdp.gin", 1, 8, 8),
    "fsdp and tensor": ("sharding/fsdp.gin", 2, 8, 8),
    "wide softmax": ("sharding/wide_softmax.gin", 2, 8, 8),
}
RUNS = [*((name, adafactor) for name in LAYOUTS), ("fsdp and tensor", adamw)]


def layouts() -> dict:
    """Name -> (losses, parts of an MLP kernel, of the softmax), on eight devices."""

    def parts(array: jax.Array) -> int:
        return array.size // array.addressable_shards[0].data.size

    found = {}
    for name, make in RUNS:
        file, parallelism, *_ = LAYOUTS[name]
        gin.clear_config()
        if file:
            gin.add_config_file_search_path(str(configuration.gin_folder()))
            gin.parse_config_file(file)
        settings = {"max_logits_per_block": 64} if "wide" in name else {}
        rules = partitioning.axis_rules()
        told, state = run(make, settings, parallelism, rules=rules, scan_layers=True, remat="full")
        found[f"{name} {make.__name__}"] = (
            [metrics["loss"] for metrics in told],
            parts(state.params["encoder"]["encoder"]["mlp"]["wi_0"]["kernel"]),
            parts(state.params["decoder"]["logits_dense"]["kernel"]),
        )
    return found


def test_every_layout_gives_the_losses_of_one_device(plain_gin):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
    }
    script = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_step import layouts; print(json.dumps(layouts()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {make: [m["loss"] for m in run(make, scan_layers=True)[0]] for make in (adamw, adafactor)}
    for name, make in RUNS:
        losses, *parts = found[f"{name} {make.__name__}"]
        assert losses == pytest.approx(expected[make], rel=2e-4), name
        assert tuple(parts) == LAYOUTS[name][2:], name
