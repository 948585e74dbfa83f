"""The T5 against Hugging Face's (a stored golden, and live where torch is there), T5X's names, and itself.

Most tests run on the golden's weights: they are large enough for every part of the network to matter.
"""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict

from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.t5 import T5

GOLDEN = Path(__file__).with_name("t5_golden.npz")
CHECKPOINT = Path(__file__).parents[2].parent / "shared" / "fixtures" / "t5x" / "test_t5_tiny.checkpoint_0"
# No two sizes alike, so that a transposed kernel or axis shows.
UNEVEN = T5Config(
    vocab_size=11,
    emb_dim=10,
    num_heads=2,
    head_dim=3,
    mlp_dim=7,
    num_encoder_layers=3,
    num_decoder_layers=1,
    output_size=13,
)
BASE = T5Config(
    vocab_size=32128,
    emb_dim=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=2048,
    num_encoder_layers=12,
    num_decoder_layers=12,
)
SIZES = ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers", "num_decoder_layers")
LIVE = [  # seed, sizes in the order above, input lengths, decoder length
    (3, (40, 16, 2, 4, 24, 1, 3), (9, 1, 4), 7),
    (4, (30, 20, 3, 8, 12, 3, 1), (3, 5), 12),
    (5, (50, 12, 4, 2, 16, 1, 1), (200, 150), 160),
]


def read_config(flat: dict) -> T5Config:
    """The sizes of a T5 from its parameters, keyed by T5X's names with slashes."""
    query = flat["encoder/layers_0/attention/query/kernel"]
    heads = flat["encoder/relpos_bias/rel_embedding"].shape[0]

    def layers(stack):
        return len({name.split("/")[1] for name in flat if name.startswith(f"{stack}/layers_")})

    vocab_size, emb_dim = flat["token_embedder/embedding"].shape
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        head_dim=query.shape[1] // heads,
        mlp_dim=flat["encoder/layers_0/mlp/wi_0/kernel"].shape[1],
        num_encoder_layers=layers("encoder"),
        num_decoder_layers=layers("decoder"),
        output_size=flat["decoder/logits_dense/kernel"].shape[1],
    )


def t5x_parameters(c: T5Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Name -> shape and logical axes of every parameter of T5X's examples/t5, not scanned."""
    joined = c.num_heads * c.head_dim
    norm = ((c.emb_dim,), ("embed",))
    into, out = ((c.emb_dim, joined), ("embed", "joined_kv")), ((joined, c.emb_dim), ("joined_kv", "embed"))
    wi, wo = ((c.emb_dim, c.mlp_dim), ("embed", "mlp")), ((c.mlp_dim, c.emb_dim), ("mlp", "embed"))
    parameters = {
        "token_embedder/embedding": ((c.vocab_size, c.emb_dim), ("vocab", "embed")),
        "decoder/logits_dense/kernel": ((c.emb_dim, c.output_size or c.vocab_size), ("embed", "vocab")),
    }
    stacks = {
        "encoder": (c.num_encoder_layers, {"attention": "attention"}),
        "decoder": (
            c.num_decoder_layers,
            {"self_attention": "self_attention", "encoder_decoder_attention": "cross_attention"},
        ),
    }
    for stack, (layers, attentions) in stacks.items():
        parameters[f"{stack}/relpos_bias/rel_embedding"] = ((c.num_heads, 32), ("heads", "relpos_buckets"))
        parameters[f"{stack}/{stack}_norm/scale"] = norm
        for layer in (f"{stack}/layers_{i}" for i in range(layers)):
            for attention, norm_name in attentions.items():
                for name in ("query", "key", "value"):
                    parameters[f"{layer}/{attention}/{name}/kernel"] = into
                parameters[f"{layer}/{attention}/out/kernel"] = out
                parameters[f"{layer}/pre_{norm_name}_layer_norm/scale"] = norm
            parameters[f"{layer}/pre_mlp_layer_norm/scale"] = norm
            parameters[f"{layer}/mlp/wi_0/kernel"] = parameters[f"{layer}/mlp/wi_1/kernel"] = wi
            parameters[f"{layer}/mlp/wo/kernel"] = wo
    return parameters


def init_shapes(config: T5Config) -> dict[str, nn.LogicallyPartitioned]:
    """Our parameters by name, boxed with their logical axes; shapes only."""
    tokens = jnp.ones((1, 2), jnp.int32)
    variables = jax.eval_shape(T5(config).init, jax.random.key(0), tokens, tokens)
    return flatten_dict(
        variables["params"], sep="/", is_leaf=lambda _, x: isinstance(x, nn.LogicallyPartitioned)
    )


def to_variables(flat: dict) -> dict:
    """What `T5.apply` takes, of parameters keyed by names with slashes."""
    return {"params": unflatten_dict(flat, sep="/")}


# Compiling is most of these tests' time: without optimization, half of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def forward(config: T5Config):
    """Jitted (variables, inputs, decoder_inputs) -> (encoded, logits)."""
    model = T5(config)
    return jit(lambda v, x, y: (model.apply(v, x, method="encode"), model.apply(v, x, y)))


@functools.cache
def stepper(config: T5Config):
    """T5.prefill, and T5.decode_step with the logits, jitted."""
    model = T5(config)
    prefill = jit(lambda v, *args: model.apply(v, *args, method="prefill"), static_argnums=(2, 3))

    @jit
    def step(variables, *args):
        x, cache = model.apply(variables, *args, method="decode_step")
        return model.apply(variables, x, method="logits"), cache

    return prefill, step


def random_inputs(rng: np.random.Generator, lengths: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Tokens of these lengths, padded with 0 to the longest."""
    tokens = rng.integers(1, vocab_size, (len(lengths), max(lengths)))
    return np.where(np.arange(max(lengths)) < np.array(lengths)[:, None], tokens, 0)


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Float32 products in float32 also on devices that shorten them by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def golden():
    """The golden's arrays, without the weights."""
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files if not name.startswith("params/")}


@pytest.fixture(scope="module")
def weights():
    """The golden's weights by T5X's names."""
    with np.load(GOLDEN) as file:
        names = [name for name in file.files if name.startswith("params/")]
        return {name.removeprefix("params/"): file[name].astype(np.float32) for name in names}


@pytest.fixture(scope="module")
def config(weights):
    return read_config(weights)


@pytest.fixture(scope="module")
def variables(weights):
    return to_variables(weights)


@pytest.fixture(scope="module")
def tokens(config):
    """A few short padded inputs, and decoder inputs."""
    rng = np.random.default_rng(0)
    inputs = random_inputs(rng, (12, 5, 1), config.vocab_size)
    decoder_inputs = rng.integers(1, config.vocab_size, (3, 8))
    decoder_inputs[:, 0] = 0
    return inputs, decoder_inputs


@pytest.fixture(scope="module")
def logits(config, variables, tokens):
    return np.asarray(forward(config)(variables, *tokens)[1])


def test_golden(golden, config, variables):
    encoded, logits = forward(config)(
        variables, golden["inputs"].astype(np.int32), golden["decoder_inputs"].astype(np.int32)
    )
    assert encoded.dtype == logits.dtype == jnp.float32
    np.testing.assert_allclose(encoded[:, golden["positions"]], golden["encoded"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits[:, golden["positions"]], golden["logits"], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def hugging_face():
    """The script that makes the golden, where its packages are installed."""
    pytest.importorskip("torch", reason="the live comparison with Hugging Face's T5 needs torch")
    pytest.importorskip(
        "transformers", reason="the live comparison with Hugging Face's T5 needs transformers"
    )
    import make_t5_golden

    return make_t5_golden


@pytest.mark.parametrize(("seed", "sizes", "lengths", "decoder_length"), LIVE)
def test_live(hugging_face, seed, sizes, lengths, decoder_length):
    model = hugging_face.random_model(seed, **dict(zip(SIZES, sizes, strict=True)))
    weights = hugging_face.t5x_params(model)
    config = read_config(weights)
    inputs, decoder_inputs = hugging_face.random_tokens(seed, config.vocab_size, lengths, decoder_length)
    expected = hugging_face.run(model, inputs, decoder_inputs)
    for ours, theirs in zip(
        forward(config)(to_variables(weights), inputs, decoder_inputs), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_steps_equal_teacher_forcing(config, variables, seed):
    K, T = 3, 5
    rng = np.random.default_rng(seed)
    inputs = random_inputs(rng, (9, 4, 1), config.vocab_size)
    B = len(inputs)
    prefill, step = stepper(config)
    cross_kv, cache = prefill(variables, inputs, 1, T)
    beams_BxKxt = np.zeros((B, 1, 0), int)  # one beam at first, then K that start from it
    for position in range(T):
        shape = (B, beams_BxKxt.shape[1], 1)
        newest = rng.integers(1, config.vocab_size, shape) if position else np.zeros(shape, int)
        beams_BxKxt = np.concatenate([beams_BxKxt, newest], axis=2)
        logits_BxKxV, cache = step(variables, newest[..., 0], position, cache, cross_kv, inputs)

        padded = np.pad(beams_BxKxt, [(0, 0), (0, K - shape[1]), (0, T - position - 1)])
        repeated = np.repeat(inputs, K, axis=0)
        expected = forward(config)(variables, repeated, padded.reshape(B * K, T))[1]
        expected_BxKxV = expected.reshape(B, K, T, -1)[:, : shape[1], position]
        np.testing.assert_allclose(logits_BxKxV, expected_BxKxV, atol=1e-5, rtol=0)

        # As a search does: some beams go on more than once and in another order, and some end.
        parents_BxK = rng.integers(0, shape[1], (B, K))
        beams_BxKxt = np.take_along_axis(beams_BxKxt, parents_BxK[..., None], axis=1)
        parents = parents_BxK[..., None, None, None]
        cache = jax.tree.map(lambda a, i=parents: jnp.take_along_axis(a, i, axis=1), cache)
    assert step._cache_size() == 2  # with one beam and with K, whatever the position


def test_step_far_from_the_start(golden, config, variables):
    """A step at the golden's last position, its cache taken from the pass over the whole target."""
    inputs, targets = golden["inputs"].astype(np.int32), golden["decoder_inputs"].astype(np.int32)
    position = targets.shape[1] - 1

    @jit
    def passed(variables):
        _, state = T5(config).apply(
            variables, inputs, targets, capture_intermediates=lambda _, method: method == "keys_values"
        )
        layers = state["intermediates"]["decoder"]
        return [
            layers[f"layers_{i}"]["self_attention"]["keys_values"][0]
            for i in range(config.num_decoder_layers)
        ]

    prefill, step = stepper(config)
    cross_kv, cache = prefill(variables, inputs, 1, position + 1)
    cache = jax.tree.map(
        lambda empty, a: empty.at[:, 0, :, :position].set(a[:, :position].swapaxes(1, 2)),
        cache,
        passed(variables),
    )
    logits, _ = step(variables, targets[:, -1:], position, cache, cross_kv, inputs)
    np.testing.assert_allclose(logits[:, 0], golden["logits"][:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("outputs", [24, 640, 2048 * 3, 8064, 32128, 4096 + 1])
def test_some_logits_are_those_of_the_whole_softmax(outputs):
    """Whether it is cut into blocks (the large ones) or not."""
    config = dataclasses.replace(UNEVEN, output_size=outputs)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, config.emb_dim)).astype(np.float32)
    kernel = 10 * rng.normal(size=(config.emb_dim, outputs)).astype(np.float32)
    variables = {"params": {"decoder": {"logits_dense": {"kernel": kernel}}}}
    tokens = rng.choice(outputs, 10)
    logits, log_z = T5(config).apply(variables, x, tokens, method="candidate_logits")
    exact = x.astype(np.float64) @ kernel
    np.testing.assert_allclose(logits, exact[..., tokens], atol=1e-3)
    np.testing.assert_allclose(log_z, np.log(np.exp(exact).sum(-1)), rtol=1e-5)


def test_more_padding_changes_nothing(config, variables, tokens, logits):
    inputs, decoder_inputs = tokens
    padded = np.pad(inputs, [(0, 0), (0, 7)])
    np.testing.assert_allclose(
        forward(config)(variables, padded, decoder_inputs)[1], logits, atol=1e-5, rtol=0
    )


def test_the_future_is_not_seen(config, variables, tokens, logits):
    inputs, decoder_inputs = tokens
    for position in (1, 5, 7):
        other = decoder_inputs.copy()
        other[:, position:] = other[:, position:] % (config.vocab_size - 1) + 1
        other_logits = np.asarray(forward(config)(variables, inputs, other)[1])
        np.testing.assert_allclose(other_logits[:, :position], logits[:, :position], atol=1e-6, rtol=0)
        assert np.abs(other_logits[:, position:] - logits[:, position:]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("config", [UNEVEN, BASE], ids=["uneven", "base"])
def test_names_shapes_and_axes_are_t5x(config):
    ours = init_shapes(config)
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in ours.values())
    assert {name: (box.value.shape, box.names) for name, box in ours.items()} == t5x_parameters(config)
    assert {box.value.dtype for box in ours.values()} == {jnp.dtype("float32")}


def test_t5x_checkpoint():
    if not CHECKPOINT.exists():
        pytest.skip(f"T5X's example checkpoint is not here: {CHECKPOINT.name}")
    checkpoint = msgpack_restore(CHECKPOINT.read_bytes())
    flat = flatten_dict(checkpoint["optimizer"]["target"], sep="/")
    config = read_config(flat)
    ours = init_shapes(config)
    assert {name: p.shape for name, p in flat.items()} == {name: p.value.shape for name, p in ours.items()}
    inputs = random_inputs(np.random.default_rng(0), (6, 3), config.vocab_size)
    _, logits = forward(config)(to_variables(flat), inputs, inputs[:, :4])
    assert logits.shape == (2, 4, 32128)
    assert np.isfinite(logits).all()
    assert np.std(logits) > 1e-3


def test_bfloat16(config, variables, tokens, logits):
    half = dataclasses.replace(config, dtype="bfloat16")
    assert {box.value.dtype for box in init_shapes(half).values()} == {jnp.dtype("float32")}
    encoded, half_logits = forward(half)(variables, *tokens)
    assert encoded.dtype == jnp.bfloat16
    assert half_logits.dtype == jnp.float32
    difference = np.abs(half_logits - logits)
    assert 0 < difference.max() < 0.2
    assert difference.mean() < 0.02 * np.std(logits)


def test_dropout(config, variables, tokens, logits):
    assert config.dropout_rate > 0  # so `logits` and all else here is deterministic and was given no key
    model = T5(config)
    drop = jit(lambda v, key: model.apply(v, *tokens, deterministic=False, rngs={"dropout": key}))
    one, same, other = (drop(variables, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - logits).max() > 0.1
