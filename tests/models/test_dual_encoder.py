"""The dual encoder's loss: what its batch means, and its options, on 1 and 8 devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_folders import initial_params, random_params

from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.contrastive import info_nce, joint_lh, lse_pair, rand1_lh, sum_marg_lh
from retrieval_jax.models.distillation import dense_kl, dense_margin_mse
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.dual_encoder_network import TOWERS
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.text_groups import TextGroups

SHAPES = {"left_encoder_input_tokens": (1, 2)}
OBJECTIVES = {
    "joint_sum": functools.partial(joint_lh, mean=False),
    "joint_mean": joint_lh,
    "sum_marg": sum_marg_lh,
    "lse_pair": lse_pair,
    "rand1": rand1_lh,
    "info_nce": info_nce,
}
TAUGHT = {"distillation": dense_margin_mse, "pooling": "decoder", "matryoshka": (2, 4)}
# (objective, or "taught", layers, gradcache_chunk_size, model parallelism, lengths of groups) on 8 devices
MESHED = (
    ("joint_mean", 1, None, 1, None),
    ("joint_mean", 1, 8, 2, (2, 3)),
    ("lse_pair", 0, 8, 1, (2, 3)),
    ("rand1", 0, None, 2, None),
    ("taught", 1, 8, 2, (2, 3)),
)


def network(dropout: float = 0.0, layers: int = 1, **settings) -> DualEncoder:
    decoder_layers = layers if settings.get("pooling") == "decoder" else 0
    dtype = settings.pop("dtype", "float32")
    config = T5Config(64, 16, 2, 8, 32, layers, decoder_layers, dropout_rate=dropout, dtype=dtype)
    model = DualEncoder(config, None, **{"vector_dim": 6, "scale": 5.0, **settings})
    for method in ("encode_queries", "encode_passages", "eval_fn"):  # else each operation is compiled alone
        setattr(model, method, jax.jit(getattr(model, method)))
    return model


def of_objective(name: str) -> dict:
    """The settings of the dual encoder that a case of MESHED names."""
    return TAUGHT if name == "taught" else {"objective": OBJECTIVES[name]}


def parameters(model: DualEncoder) -> dict:
    return random_params(model)


def random_batch(seed: int = 0, B: int = 8, G: int = 4, distinct: int = 30) -> dict[str, np.ndarray]:
    """Two positives at most, then negatives, some padding; passages of 30, so some are there twice."""
    rng = np.random.default_rng(seed)
    passage = np.stack([rng.choice(distinct, G, replace=False) for _ in range(B)])
    grade = np.repeat([[2, 1, 0, 0]], B, axis=0)[:, :G]
    grade[rng.random((B, G)) < 0.2] = 0
    missing = rng.random((B, G)) < 0.15
    texts = rng.integers(2, 64, (distinct, 5))  # the same passage, the same text
    made = {
        "left_encoder_input_tokens": rng.integers(2, 64, (B, 3)),
        "right_encoder_input_tokens": np.where(missing[..., None], 0, texts[passage]),
        "passage": np.where(missing, -1, passage),
        "grade": np.where(missing, -1, grade),
        "other_positives": np.where(rng.random((B, 2)) < 0.5, -1, rng.integers(0, distinct, (B, 2))),
    }
    score = np.where(rng.random((B, G)) < 0.2, np.nan, rng.normal(size=(B, G)))
    return {name: x.astype(np.int32) for name, x in made.items()} | {"score": score.astype(np.float32)}


def with_short_texts(batch: dict) -> dict:
    """Cuts queries to 2 tokens and passages to 3, but for the first of every 8."""
    queries, passages = (batch[f"{side}_encoder_input_tokens"].copy() for side in ("left", "right"))
    queries.reshape(-1, 8, 3)[:, 1:, 2:] = 0
    passages.reshape(-1, 8, 5)[:, 1:, 3:] = 0
    return {**batch, "left_encoder_input_tokens": queries, "right_encoder_input_tokens": passages}


def vectors_by_hand(
    model: DualEncoder, params: dict, batch: dict, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The queries' and the candidates' vectors, or their first dimensions, of unit length again; float64."""
    B, G, _ = batch["right_encoder_input_tokens"].shape
    texts = batch["right_encoder_input_tokens"].reshape(B * G, -1)
    queries = np.asarray(model.encode_queries(params, batch["left_encoder_input_tokens"]), np.float64)
    passages = np.asarray(model.encode_passages(params, texts), np.float64).reshape(B, G, -1)
    if size is None:
        return queries, passages
    firsts = queries[..., :size], passages[..., :size]
    return tuple(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9) for x in firsts)


def info_nce_by_hand(
    model: DualEncoder, params: dict, batch: dict, in_batch: bool = True, size: int | None = None
) -> float:
    """Mean InfoNCE of the first positives, and of their queries among all queries, one score at a time."""
    queries, passages = vectors_by_hand(model, params, batch, size)
    B, G, _ = passages.shape
    passage, positive = batch["passage"], batch["grade"] > 0
    known = [{*passage[b][positive[b]], *batch["other_positives"][b]} for b in range(B)]
    rows, total = [b for b in range(B) if positive[b].any()], 0.0
    for b in rows:
        first = int(positive[b].argmax())
        others = [
            model.scale * queries[b] @ passages[c, g]
            for c in (rows if in_batch else [b])
            for g in range(G)
            if passage[c, g] >= 0 and passage[c, g] not in known[b]
        ]
        score = model.scale * queries[b] @ passages[b, first]
        total += np.log(np.exp([score, *others]).sum()) - score
        for g in np.flatnonzero(positive[b]) if in_batch else ():
            own = model.scale * queries[b] @ passages[b, g]
            rivals = [
                model.scale * queries[c] @ passages[b, g] for c in rows if passage[b, g] not in known[c]
            ]
            total += (np.log(np.exp([own, *rivals]).sum()) - own) / positive[b].sum()
    return total / len(rows)


@pytest.mark.parametrize("in_batch", [True, False])
def test_the_loss_by_hand(in_batch: bool):
    """Duplicates and known positives are no negatives; rows without a positive are left out."""
    model = network(in_batch_negatives=in_batch, bidirectional=in_batch)
    params = parameters(model)
    for seed in range(4):
        batch = random_batch(seed)
        batch["grade"][3] = np.minimum(batch["grade"][3], 0)
        loss, metrics = model.eval_fn(params, batch)
        assert loss == pytest.approx(info_nce_by_hand(model, params, batch, in_batch), rel=1e-4), seed
        assert metrics["loss"][1] == np.sum((batch["grade"] > 0).any(1))


def test_a_row_without_a_positive_contributes_nothing():
    model = network(objective=joint_lh)
    params, batch = parameters(model), random_batch(1)
    batch["grade"][5] = np.minimum(batch["grade"][5], 0)
    kept = np.delete(np.arange(8), 5)
    without = {name: x[kept] for name, x in batch.items()}
    of = (value_and_gradients(model, params, x) for x in (batch, without))
    for a, b in zip(*map(jax.tree.leaves, of), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    nothing = {**batch, "grade": np.full_like(batch["grade"], -1)}
    loss, gradients = value_and_gradients(model, params, nothing)
    assert loss == 0
    assert not any(np.any(np.asarray(g)) for g in jax.tree.leaves(gradients))


def value_and_gradients(
    model: DualEncoder,
    params: dict,
    batch: dict,
    key: jax.Array | None = None,
    groups: TextGroups | None = None,
):
    (loss, _), gradients = _step(model, groups)(params, batch, key)
    return loss, gradients


@functools.cache
def _step(model: DualEncoder, groups: TextGroups | None):
    return jax.jit(jax.value_and_grad(functools.partial(model.loss_fn, groups=groups), has_aux=True))


def close(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_towers_of_their_own_and_a_learned_temperature():
    model = network(shared_towers=False, learn_scale=True, objective=joint_lh)
    params, batch = initial_params(model), random_batch()
    shared = network(objective=joint_lh)
    alike = params[TOWERS[0]]
    jax.tree.map(np.testing.assert_array_equal, alike, params[TOWERS[1]])
    expected, of_shared = value_and_gradients(shared, alike, batch)
    loss, gradients = value_and_gradients(model, params, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    both = jax.tree.map(jnp.add, *(gradients[tower] for tower in TOWERS))
    close(both, of_shared)

    step = 1e-3
    losses = [
        network(objective=joint_lh, scale=5.0 * np.exp(s)).eval_fn(alike, batch)[0] for s in (step, -step)
    ]
    np.testing.assert_allclose(gradients["log_scale"], (losses[0] - losses[1]) / (2 * step), rtol=1e-2)
    tokens = batch["left_encoder_input_tokens"]
    params[TOWERS[1]] = jax.tree.map(lambda x: x + 0.1, params[TOWERS[1]])
    assert not np.allclose(model.encode_queries(params, tokens), model.encode_passages(params, tokens))


@pytest.mark.parametrize(("scale", "limit"), [(5.0, 100.0), (200.0, 200.0)])
def test_a_learned_temperature_stays_within_its_limit(scale: float, limit: float):
    model, batch = network(learn_scale=True, scale=scale), random_batch()
    params = parameters(model)
    at_limit = np.float32(np.log(limit / scale))
    expected = network(scale=limit).eval_fn({k: v for k, v in params.items() if k != "log_scale"}, batch)[0]
    for beyond in (0.0, 1.0, 5.0):
        loss = model.eval_fn(params | {"log_scale": at_limit + beyond}, batch)[0]
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)

    def gradient(sign: float) -> float:
        # Of a loss that falls (sign 1) or rises with the multiplier.
        def loss(log_scale):
            return -sign * model._multiplier({"log_scale": log_scale})

        return float(jax.grad(loss)(at_limit + 1.0))

    assert gradient(1.0) == 0  # it would go on beyond
    assert gradient(-1.0) == pytest.approx(limit)  # it comes back


def test_raw_dot_products():
    unit, raw = network(), network(normalize=False)
    params, tokens = parameters(unit), random_batch()["left_encoder_input_tokens"]
    vectors, raw_vectors = (np.asarray(m.encode_queries(params, tokens)) for m in (unit, raw))
    lengths = np.linalg.norm(raw_vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert np.ptp(lengths) > 1e-3
    np.testing.assert_allclose(vectors, raw_vectors / lengths, rtol=1e-4, atol=1e-5)


def test_the_hardest_negative_alone():
    """Of one query without positives' rivals: softplus of its largest score less the positive's."""
    model, batch = (
        network(hardest_negative_only=True, bidirectional=False, in_batch_negatives=False),
        random_batch(2),
    )
    params = parameters(model)
    batch = {name: x[:1] for name, x in batch.items()} | {
        "passage": np.int32([[1, 2, 3, 4]]),
        "grade": np.int32([[1, 0, 0, 0]]),
        "other_positives": np.int32([[-1, 4]]),
    }
    scores = model.scale * np.asarray(
        model.encode_passages(params, batch["right_encoder_input_tokens"][0])
        @ model.encode_queries(params, batch["left_encoder_input_tokens"])[0]
    )
    expected = np.log1p(np.exp(max(scores[1:3]) - scores[0]))
    assert model.eval_fn(params, batch)[0] == pytest.approx(expected, rel=1e-5)
    model = network(hardest_negative_only=True, bidirectional=False)
    assert model.eval_fn(params, batch)[0] == pytest.approx(expected, rel=1e-5)


def test_settings_that_do_not_go_together_are_named(capsys: pytest.CaptureFixture[str]):
    for settings, told in (
        ({"objective_weight": 0.0}, "objective_weight: 0 leaves nothing to learn"),
        ({"matryoshka": (6,)}, r"matryoshka: \(6,\): set different sizes, all below vector_dim 6"),
        ({"matryoshka": (2, 4), "matryoshka_weights": (1.0,)}, "matryoshka_weights: 1 for 2 sizes"),
    ):
        with pytest.raises(UserError, match=f"DualEncoder.{told}"):
            network(**settings)
    assert network(matryoshka=(2,)).settings["matryoshka"] == [2]

    config, optimizer = T5Config(64, 16, 2, 8, 32, 1, 0), optax.sgd(1.0)
    DualEncoder(config, optimizer, distillation=dense_kl)
    DualEncoder(config, optimizer, distillation=dense_margin_mse, normalize=False, scale=1.0)
    assert "margins" not in capsys.readouterr().err
    DualEncoder(config, optimizer, distillation=dense_margin_mse, scale=20.0)
    assert "margins of unit vectors lie within ±40 with a fixed scale of 20" in capsys.readouterr().err


def meshed(
    objective: str,
    layers: int,
    gradcache_chunk_size: int | None,
    parallelism: int,
    lengths: tuple[int, int] | None,
) -> tuple:
    """Loss and gradients of a batch of 16 on all devices."""
    settings = {
        **of_objective(objective),
        "gradcache_chunk_size": gradcache_chunk_size,
        "max_logits_per_block": 80,  # does not divide the passages: the last block is filled up
    }
    model = network(layers=layers, **settings)
    mesh = partitioning.make_mesh(parallelism)
    boxed = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), SHAPES)["params"])
    params = jax.device_put(parameters(model), partitioning.params_shardings(mesh, boxed))
    batch = with_short_texts(random_batch(B=16)) if lengths else random_batch(B=16)
    batch = jax.device_put(batch, partitioning.batch_sharding(mesh))
    groups = lengths and TextGroups(lengths, mesh.shape["data"])

    def loss(params, batch, key):
        with partitioning.mesh_context(mesh):
            return model.loss_fn(params, batch, key, groups)[0]

    return jax.jit(jax.value_and_grad(loss))(params, batch, jax.random.key(3))


def test_negatives_are_those_of_the_whole_mesh(tmp_path: Path):
    """8 simulated devices, with and without gradient caching: one device's loss and gradients."""
    file = tmp_path / "gradients.npz"
    devices = {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, file], check=True, env=os.environ | devices)
    with np.load(file) as eight:
        for case in MESHED:
            plain = network(layers=case[1], **of_objective(case[0]))
            batch = with_short_texts(random_batch(B=16)) if case[4] else random_batch(B=16)
            expected = value_and_gradients(plain, parameters(plain), batch, jax.random.key(3))
            for i, x in enumerate(jax.tree.leaves(expected)):
                np.testing.assert_allclose(eight[f"{case} {i}"], x, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    assert jax.device_count() == 8
    found = {}
    for case in MESHED:
        for i, x in enumerate(jax.tree.leaves(meshed(*case))):
            found[f"{case} {i}"] = np.asarray(x)
    np.savez(sys.argv[1], **found)
