"""Hugging Face's folders: what it computes from them we compute, and it from ours; goldens, and live."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from model_folders import GOLDENS, compiled, random_params, same

from retrieval_jax.checkpoints import hugging_face
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.model_folder import params_to_devices
from retrieval_jax.checkpoints.pretrained import open_pretrained
from retrieval_jax.checkpoints.weights import LazyArray, lazy_arrays, read_safetensors
from retrieval_jax.core.errors import UserError
from retrieval_jax.interop.writers import layers_of
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config

ONE_LAYER = T5Config(40, 16, 2, 4, 24, 1, 1)
KINDS = {
    "1.1": T5Config(40, 16, 2, 4, 24, 2, 3),
    "1.0": T5Config(50, 12, 4, 3, 20, 3, 2, mlp_activations=("relu",), logits_via_embedding=True),
    "gated_relu": T5Config(30, 8, 2, 4, 12, 1, 1, mlp_activations=("relu", "linear")),
    "gelu": T5Config(30, 8, 2, 4, 12, 1, 1, mlp_activations=("gelu",)),
    "far": T5Config(30, 8, 1, 8, 12, 1, 1, relpos_buckets=8, relpos_max_distance=20),
}
INPUTS = np.array([[5, 9, 3, 21, 1, 0, 0], [7, 29, 2, 2, 12, 11, 1]])
DECODER_INPUTS = np.array([[0, 4, 8, 15], [0, 16, 23, 28]])


def opened(folder, **options):
    """The model of a folder with its weights, on one device."""
    network = open_pretrained(folder).network
    model = GenerativeRetriever(T5Config(**network, **options))
    return model, params_to_devices(
        InitialCheckpoint(str(folder)).arrays_for(model), model, make_mesh(devices=jax.devices()[:1])
    )


def logits(model, params, inputs=INPUTS, decoder_inputs=DECODER_INPUTS) -> np.ndarray:
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs}
    return np.asarray(compiled(model, "logits")(params, batch))


@pytest.mark.parametrize("kind", ["t5_1_1", "t5_1_0"])
@pytest.mark.parametrize("scan", [False, True])
def test_logits_are_hugging_faces(kind, scan):
    expected = np.load(GOLDENS / kind / "expected.npz")
    model, params = opened(GOLDENS / kind, scan_layers=scan)
    found = logits(model, params, expected["inputs"], expected["decoder_inputs"])
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-4)
    assert expected["logits"].std() > 0.2


@pytest.mark.parametrize("kind", ["t5_1_1", "t5_1_0"])
def test_logits_in_bfloat16(kind):
    expected = np.load(GOLDENS / kind / "expected.npz")
    model, params = opened(GOLDENS / kind, dtype="bfloat16")
    # All roundings to bfloat16, of which XLA otherwise leaves some out, as it finds them.
    strictly = jax.jit(model.logits, compiler_options={"xla_allow_excess_precision": False})
    names = {"encoder_input_tokens": "inputs", "decoder_input_tokens": "decoder_inputs"}
    found = strictly(params, {name: expected[array] for name, array in names.items()})
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=0.1 * expected["logits"].std())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan", [False, True])
def test_written_and_read_again(tmp_path, kind, scan):
    """Ours → Hugging Face → ours, bit for bit."""
    config = dataclasses.replace(KINDS[kind], scan_layers=scan)
    params = random_params(GenerativeRetriever(config))
    hugging_face.write(tmp_path, layers_of(params), config)
    model, again = opened(tmp_path, scan_layers=scan)
    assert model.config == config
    same(lazy_arrays(again), lazy_arrays(params))


@pytest.mark.parametrize("kind", ["t5_1_1", "t5_1_0"])
def test_weights_of_transformers_flax_models(tmp_path, kind):
    """FlaxT5's names: `embedding` of embeddings, `weight` of norms, `kernel` of (turned) matrices."""
    leaves = {}
    for name, array in read_safetensors(GOLDENS / kind, "model").items():
        *modules, _ = name.split(".")
        if modules[-1] in ("shared", "relative_attention_bias"):
            leaves[(*modules, "embedding")] = array.read()
        elif modules[-1].endswith("layer_norm"):
            leaves[(*modules, "weight")] = array.read()
        else:
            leaves[(*modules, "kernel")] = array.read().T
    shutil.copyfile(GOLDENS / kind / "config.json", tmp_path / "config.json")
    data = msgpack_serialize(unflatten_dict(leaves))
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    arrays, network = hugging_face.read(tmp_path)
    expected, same_network = hugging_face.read(GOLDENS / kind)
    same(arrays, expected)
    assert network == same_network
    (tmp_path / "flax_model.msgpack").write_bytes(data[:1000])
    with pytest.raises(UserError, match=r"flax_model\.msgpack: cannot be read .*: fetch it again"):
        hugging_face.read(tmp_path)


def test_docids_lengthen_the_vocabulary():
    """Docid tokens moved behind the texts' write the same docids with the same logits."""
    for reads in (False, True):
        config = dataclasses.replace(ONE_LAYER, output_size=12, separate_target_embedding=reads)
        model = GenerativeRetriever(config)
        params = random_params(model)
        longer = hugging_face.with_docids(lazy_arrays(params), config)
        other = GenerativeRetriever(dataclasses.replace(ONE_LAYER, vocab_size=40 + 12))
        longer_params = params_to_devices(longer, other, make_mesh(devices=jax.devices()[:1]))
        docids = np.array([[0, 3, 11], [0, 7, 1]]) if reads else np.array([[0], [0]])
        found = logits(other, longer_params, decoder_inputs=docids + 40)
        np.testing.assert_allclose(found[..., 40:], logits(model, params, decoder_inputs=docids), atol=1e-5)
        assert not found[..., :40].any()


def test_what_is_not_supported_is_named(tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(GOLDENS / "t5_1_0", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())

    def refused(match: str, **changes: object) -> None:
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=match):
            open_pretrained(folder)

    refused("feed_forward_proj 'gated-silu' is not supported", feed_forward_proj="gated-silu")
    for field, value, only in (
        ("layer_norm_epsilon", 1e-5, "1e-06"),
        ("model_type", "umt5", '"t5" or "mt5"'),
        ("is_decoder", True, "false"),
        ("pad_token_id", 5, "0"),
        ("eos_token_id", 2, "1"),
        ("decoder_start_token_id", 40, "0 or null"),
        ("scalable_attention", True, "false"),
        ("tie_encoder_decoder", True, "false"),
        ("pruned_heads", {"0": [1]}, "{} or null"),
        ("quantization_config", {"bits": 4}, "null"),
        ("auto_map", {"AutoModel": "own.Model"}, "null"),
        ("dense_act_fn", "gelu", '"relu"'),
        ("is_gated_act", True, "false"),
    ):
        refused(re.escape(f"{path}: {field} {value!r} is not supported: only {only}"), **{field: value})
    refused("feed_forward_proj 'gelu' is not supported: only relu, ", feed_forward_proj="gelu")
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "d_kv"}))
    with pytest.raises(UserError, match=r"config\.json: has no 'd_kv'"):
        open_pretrained(folder)
    refused(f"{path}: none of|none of", model_type="bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("no safetensors here, and pickled weights are not read")


def test_an_own_output_matrix_is_not_scaled_unless_it_is_the_embedding(tmp_path):
    """Of the four combinations of a matrix and scaling, three can be; the fourth is refused."""
    config = KINDS["1.1"]
    arrays = layers_of(random_params(GenerativeRetriever(config)))
    hugging_face.write(tmp_path, arrays, config)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"scale_decoder_outputs": True}))
    with pytest.raises(UserError, match=r"scales its outputs and has a matrix for them"):
        open_pretrained(tmp_path)
    tied = {**arrays, "decoder/logits_dense/kernel": arrays["token_embedder/embedding"].transposed()}
    hugging_face.write(tmp_path, tied, config)
    path.write_text(json.dumps(written | {"scale_decoder_outputs": True}))
    assert open_pretrained(tmp_path).network["logits_via_embedding"]  # T5 1.0, its embedding written twice
    same(
        {"a": open_pretrained(tmp_path).arrays["token_embedder/embedding"]},
        {"a": tied["token_embedder/embedding"]},
    )


def test_an_mlp_that_theirs_has_not_is_refused(tmp_path):
    config = dataclasses.replace(ONE_LAYER, mlp_activations=("gelu", "gelu"))
    with pytest.raises(UserError, match="transformers' T5 has no such MLP"):
        hugging_face.write(tmp_path, layers_of(random_params(GenerativeRetriever(config))), config)


# With the live library, where it is installed.


@pytest.fixture
def transformers():
    pytest.importorskip("torch", reason="needs torch and transformers")
    return pytest.importorskip("transformers", reason="needs torch and transformers")


@pytest.mark.parametrize(
    ("fields", "activations"),
    [
        ({}, ("relu",)),
        ({"feed_forward_proj": "gated-gelu"}, ("gelu", "linear")),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}, ("gelu", "linear")),
        ({"feed_forward_proj": "gated-relu", "dense_act_fn": "relu"}, ("relu", "linear")),
        ({"feed_forward_proj": "gelu_new"}, ("gelu",)),
        ({"feed_forward_proj": "relu", "is_gated_act": False}, ("relu",)),
    ],
)
def test_activations_are_transformers(transformers, fields, activations):
    """Its configuration object says which function it takes, and whether there is a gate."""
    path = GOLDENS / "t5_1_1" / "config.json"
    assert hugging_face._activations(path, fields) == activations
    theirs = transformers.T5Config(**fields)
    assert hugging_face.ACTIVATIONS[theirs.dense_act_fn] == activations[0]
    assert theirs.is_gated_act == (len(activations) == 2)


def torch_logits(model, inputs=INPUTS, decoder_inputs=DECODER_INPUTS) -> np.ndarray:
    import torch

    with torch.no_grad():
        output = model.eval()(
            input_ids=torch.from_numpy(inputs),
            attention_mask=torch.from_numpy((inputs > 0).astype(np.int64)),
            decoder_input_ids=torch.from_numpy(decoder_inputs),
        )
    return output.logits.float().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan", [False, True])
def test_transformers_opens_ours(transformers, tmp_path, kind, scan):
    config = dataclasses.replace(KINDS[kind], scan_layers=scan)
    model = GenerativeRetriever(config)
    params = random_params(model)
    hugging_face.write(tmp_path, layers_of(params), config)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    inputs, decoder_inputs = rng.integers(1, 30, (2, 40)), rng.integers(1, 30, (2, 25))
    inputs[1, 30:] = decoder_inputs[:, 0] = 0
    found = torch_logits(theirs, inputs, decoder_inputs)
    np.testing.assert_allclose(found, logits(model, params, inputs, decoder_inputs), rtol=0, atol=1e-4)
    # … and what it saves is ours again.
    theirs.save_pretrained(tmp_path / "saved")
    again, saved = opened(tmp_path / "saved", scan_layers=scan)
    same(lazy_arrays(saved), lazy_arrays(params))
    assert again.config == dataclasses.replace(config, dropout_rate=again.config.dropout_rate)


def test_transformers_in_bfloat16(transformers, tmp_path):
    import torch

    config = dataclasses.replace(KINDS["1.1"], dtype="bfloat16")
    model = GenerativeRetriever(config)
    params = random_params(model)
    hugging_face.write(tmp_path, layers_of(params), config)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found, ours = torch_logits(theirs), logits(model, params)
    assert np.abs(found - ours).max() < 0.1 * ours.std() + 0.1


def test_transformers_writes_docids(transformers, tmp_path):
    config = dataclasses.replace(ONE_LAYER, output_size=12, separate_target_embedding=True)
    model = GenerativeRetriever(config)
    params = random_params(model)
    longer = hugging_face.with_docids(lazy_arrays(params), config)
    hugging_face.write(tmp_path, longer, config, start=40)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    docids = np.array([[0, 3, 11], [0, 7, 1]])
    assert theirs.config.decoder_start_token_id == 40
    found = torch_logits(theirs, decoder_inputs=docids + 40)[..., 40:]
    np.testing.assert_allclose(found, logits(model, params, decoder_inputs=docids), rtol=0, atol=1e-4)


def test_goldens_are_what_transformers_gives(transformers):
    for kind in ("t5_1_1", "t5_1_0"):
        expected = np.load(GOLDENS / kind / "expected.npz")
        model = transformers.T5ForConditionalGeneration.from_pretrained(GOLDENS / kind).float()
        found = torch_logits(model, expected["inputs"], expected["decoder_inputs"])
        np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-4)


def test_lazy_arrays_are_read_in_parts():
    """A sharded device reads a part of a turned, stacked array, as of the whole."""
    arrays = InitialCheckpoint(str(GOLDENS / "t5_1_1")).arrays_for(
        GenerativeRetriever(T5Config(**open_pretrained(GOLDENS / "t5_1_1").network, scan_layers=True))
    )
    array: LazyArray = arrays["encoder/encoder/mlp/wi_0/kernel"]
    part = (slice(1, 2), slice(3, 9), slice(0, 5))
    np.testing.assert_array_equal(array.read_slice(part), array.read()[part])
