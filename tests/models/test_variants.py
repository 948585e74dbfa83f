"""What large T5s and papers add to the network: scanned and recomputed layers, packing, PAWA, R-Drop."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from test_t5 import jit

from retrieval_jax.core.errors import UserError
from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.objectives import cross_entropy, rdrop
from retrieval_jax.models.t5 import PawaAdaptor, is_stacked, unstack_layers

RDROP = functools.partial(rdrop, weight=3.0)
CONFIG = T5Config(
    vocab_size=40,
    emb_dim=12,
    num_heads=2,
    head_dim=4,
    mlp_dim=10,
    num_encoder_layers=2,
    num_decoder_layers=2,
    output_size=24,
    separate_target_embedding=True,
)
PAWA = dataclasses.replace(CONFIG, pawa_layers=2)
SHAPES = {"encoder_input_tokens": (4, 9), "decoder_input_tokens": (4, 5)}


def parameters(model) -> dict:
    return jit(lambda: nn.unbox(model.get_initial_variables(jax.random.key(0), SHAPES)["params"]))()


def random_batch(seed: int = 0, rows: int = 4) -> dict[str, np.ndarray]:
    """Inputs of 1 to 9 tokens and targets of 1 to 5."""
    rng = np.random.default_rng(seed)

    def padded(length: int, size: int) -> np.ndarray:
        lengths = rng.integers(1, length + 1, rows)
        return np.where(np.arange(length) < lengths[:, None], rng.integers(1, size, (rows, length)), 0)

    inputs, targets = padded(9, 40), padded(5, 24)
    return {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def stacked(params: dict) -> dict:
    """The parameters of a scanned T5, of those of one that is not."""
    flat, layers = {}, {}
    for (stack, *rest), x in flatten_dict(params).items():
        if rest and rest[0].startswith("layers_"):
            inner = "encoder" if stack == "encoder" else "decoder"
            layers.setdefault((stack, inner, *rest[1:]), {})[int(rest[0].removeprefix("layers_"))] = x
        else:
            flat[stack, *rest] = x
    flat |= {k: jnp.stack([xs[i] for i in range(len(xs))]) for k, xs in layers.items()}
    return unflatten_dict(flat)


def close(a: object, b: object, atol: float = 1e-5) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4)


def loss_and_gradients(model, params: dict, batch: dict, key=None) -> tuple:
    return jit(jax.value_and_grad(lambda p: model.loss_fn(p, batch, key)[0]))(params)


def loss_and_metrics(model, params: dict, batch: dict, key=None) -> tuple:
    return jit(model.loss_fn)(params, batch, key)


@pytest.mark.parametrize("config", [CONFIG, PAWA], ids=["plain", "pawa"])
def test_a_scanned_network_is_the_same(config):
    plain = GenerativeRetriever(config)
    scanned = GenerativeRetriever(dataclasses.replace(config, scan_layers=True))
    params, batch = parameters(plain), random_batch()
    shapes = jax.tree.map(jnp.shape, parameters(scanned))
    assert shapes == jax.tree.map(jnp.shape, stacked(params))
    assert shapes["encoder"]["encoder"]["attention"]["key"]["kernel"] == (2, 12, 8)
    boxed = jax.eval_shape(lambda: scanned.get_initial_variables(jax.random.key(0), SHAPES))["params"]
    assert boxed["decoder"]["decoder"]["mlp"]["wo"]["kernel"].names == ("layers", "mlp", "embed")
    close(unstack_layers(stacked(params)), params, 0)
    loss, gradients = loss_and_gradients(plain, params, batch)
    scanned_loss, scanned_gradients = loss_and_gradients(scanned, stacked(params), batch)
    np.testing.assert_allclose(scanned_loss, loss, rtol=1e-5)
    close(scanned_gradients, stacked(gradients))
    assert is_stacked(("encoder", "encoder", "mlp", "wo", "kernel"))
    assert not is_stacked(("encoder", "encoder_norm", "scale"))


def test_a_scanned_layer_begins_as_one_that_is_not():
    """Each layer's parameters are drawn anew, and as wide as those of a layer of its own."""
    config = dataclasses.replace(CONFIG, emb_dim=64, num_encoder_layers=4, scan_layers=True)
    kernel = parameters(GenerativeRetriever(config))["encoder"]["encoder"]["mlp"]["wi_0"]["kernel"]
    for i in range(4):
        assert np.std(kernel[i]) == pytest.approx(64**-0.5, rel=0.2)
        assert i == 0 or np.abs(kernel[i] - kernel[0]).max() > 0.01


@pytest.mark.parametrize(("scan", "remat"), [(False, "full"), (True, "dots"), (True, "full")])
def test_what_is_computed_again_is_the_same(scan: bool, remat: str):
    batch, results = random_batch(), []
    for policy in ("none", remat):
        model = GenerativeRetriever(dataclasses.replace(CONFIG, scan_layers=scan, remat=policy))
        results.append(loss_and_gradients(model, parameters(model), batch, jax.random.key(1)))
    close(*results)
    with pytest.raises(UserError, match=r"T5Config.remat: no policy 'fully': none, dots, full"):
        dataclasses.replace(CONFIG, remat="fully")


def test_a_scanned_dual_encoder_is_the_same():
    scanned = DualEncoder(dataclasses.replace(CONFIG, scan_layers=True, remat="full"), vector_dim=6)
    plain = DualEncoder(CONFIG, vector_dim=6)
    tokens = random_batch()["encoder_input_tokens"]
    shapes = {"left_encoder_input_tokens": (1, 2)}
    params = jit(lambda: nn.unbox(plain.get_initial_variables(jax.random.key(0), shapes)["params"]))()
    close(jit(scanned.encode_queries)(stacked(params), tokens), jit(plain.encode_queries)(params, tokens))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("config", [CONFIG, PAWA], ids=["plain", "pawa"])
def test_the_search_of_every_variant_scores_as_its_training_does(config, scan: bool):
    """As many beams as docids: each docid's score is the sum of its targets' log-probabilities."""
    model = GenerativeRetriever(dataclasses.replace(config, scan_layers=scan))
    params = parameters(model)
    docids = np.unique(np.random.default_rng(0).integers(1, 24, (15, 3)), axis=0).astype(np.int32)
    trie = jax.device_put(build_trie(docids)[0])
    inputs = random_batch(1, 2)["encoder_input_tokens"]
    search = jit(functools.partial(model.predict_batch_with_aux, beams=len(docids)))
    rows, aux = search(params, {"encoder_input_tokens": inputs}, trie=trie)
    for query in range(2):
        batch = {
            "encoder_input_tokens": np.tile(inputs[query], (len(docids), 1)),
            "decoder_input_tokens": np.pad(docids, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": docids,
            "decoder_loss_weights": np.ones_like(docids),
        }
        exact = np.asarray(jit(model.score_batch)(params, batch))
        assert sorted(rows[query].tolist()) == list(range(len(docids)))
        np.testing.assert_allclose(aux["scores"][query], exact[rows[query]], atol=1e-4)


def test_pawa_adapts_each_position_by_its_own_matrix():
    config = dataclasses.replace(CONFIG, emb_dim=6)
    rng = np.random.default_rng(0)
    for B, T in ((2, 3), (1500, 2)):  # at once, and a few positions at a time
        x, adapting = rng.normal(size=(2, B, T, 6))
        kernel = rng.normal(size=(6, 6, 6))
        variables = {"params": {"kernel": jnp.array(kernel, jnp.float32)}}
        found = jax.jit(PawaAdaptor(config).apply)(
            variables, *(jnp.array(a, jnp.float32) for a in (x, adapting))
        )
        for b in (0, B - 1):
            for t in range(T):
                matrix = sum(adapting[b, t, a] * kernel[a] for a in range(6))
                np.testing.assert_allclose(found[b, t], x[b, t] @ matrix, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, PAWA], ids=["plain", "pawa"])
def test_packed_rows_give_each_example_the_loss_it_has_alone(config):
    model, batch = GenerativeRetriever(config), random_batch()
    params = parameters(model)
    packed = {name: np.zeros((2, 2 * x.shape[1]), np.int32) for name, x in batch.items()}
    packed |= {
        name: np.zeros_like(packed[like])
        for name, like in (
            ("encoder_segment_ids", "encoder_input_tokens"),
            ("decoder_segment_ids", "decoder_input_tokens"),
            ("decoder_positions", "decoder_input_tokens"),
        )
    }
    for i in range(4):  # two a row, one directly behind the other
        row, segment = divmod(i, 2)
        for side, tokens in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
            count = np.count_nonzero(batch[tokens][i])
            start = np.count_nonzero(packed[f"{side}_segment_ids"][row])
            place = slice(start, start + count)
            packed[f"{side}_segment_ids"][row, place] = segment + 1
            for name in (n for n in batch if n.startswith(side)):
                packed[name][row, place] = batch[name][i, :count]
            if side == "decoder":
                packed["decoder_positions"][row, place] = np.arange(count)
    alone, alone_metrics = loss_and_metrics(model, params, batch)
    together, metrics = loss_and_metrics(model, params, packed)
    assert together == pytest.approx(float(alone), rel=1e-5)
    for name, (total, count) in alone_metrics.items():
        assert metrics[name][1] == count
        assert metrics[name][0] == pytest.approx(float(total), rel=1e-4), name
    # The other example of a row changes nothing.
    packed["encoder_input_tokens"][packed["encoder_segment_ids"] == 2] = 7
    found, expected = (jit(model.logits)(params, b) for b in (packed, batch))
    count = np.count_nonzero(batch["decoder_target_tokens"][0])
    np.testing.assert_allclose(found[0, :count], expected[0, :count], atol=1e-5)


def test_rdrop_is_the_divergence_of_two_dropout_passes():
    batch, key = random_batch(), jax.random.key(5)
    params = parameters(GenerativeRetriever(CONFIG))
    still = dataclasses.replace(CONFIG, dropout_rate=0.0)
    plain, _ = loss_and_metrics(GenerativeRetriever(still), params, batch, key)
    same, metrics = loss_and_metrics(GenerativeRetriever(still, objective=RDROP), params, batch, key)
    assert same == pytest.approx(float(plain), rel=1e-6)
    assert metrics["rdrop"][0] == pytest.approx(0, abs=1e-6)

    model = GenerativeRetriever(CONFIG, objective=RDROP)
    loss, metrics = loss_and_metrics(model, params, batch, key)
    twice = {name: np.repeat(x, 2, axis=0) for name, x in batch.items()}
    log_p = jax.nn.log_softmax(jit(model.logits)(params, twice, key))  # of the same two readings
    p = np.exp(np.asarray(log_p, np.float64))
    weights = batch["decoder_loss_weights"]
    both = [(p[i::2] * np.log(p[i::2] / p[1 - i :: 2])).sum(-1) for i in (0, 1)]
    apart = (np.mean(both, axis=0) * weights).sum() / weights.sum()
    chosen = np.take_along_axis(np.log(p), twice["decoder_target_tokens"][..., None], -1)[..., 0]
    nll = -(chosen * twice["decoder_loss_weights"]).sum() / twice["decoder_loss_weights"].sum()
    assert apart > 1e-3
    assert metrics["rdrop"][0] / metrics["rdrop"][1] == pytest.approx(apart, rel=1e-3)
    assert loss == pytest.approx(nll + 3 * apart, rel=1e-4)
    assert metrics["loss"][0] / metrics["loss"][1] == pytest.approx(float(loss), rel=1e-6)
    blocks = GenerativeRetriever(CONFIG, objective=RDROP, max_logits_per_block=100)
    with pytest.raises(UserError, match="max_logits_per_block=None"):
        blocks.loss_fn(params, batch, key)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_in_blocks_is_that_of_whole_logits(smoothing: float):
    batch, params = random_batch(), parameters(GenerativeRetriever(CONFIG))
    objective = functools.partial(cross_entropy, label_smoothing=smoothing, z_loss=1e-3)
    whole = GenerativeRetriever(CONFIG, objective=objective)
    blocks = GenerativeRetriever(CONFIG, objective=objective, max_logits_per_block=100)
    close(loss_and_gradients(blocks, params, batch), loss_and_gradients(whole, params, batch))
    close(*(loss_and_metrics(model, params, batch) for model in (blocks, whole)))
