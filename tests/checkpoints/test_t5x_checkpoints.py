"""T5X's checkpoints: real ones, those of Orbax, what was written comes back bit for bit, and damage."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from model_folders import compiled, random_params, same

from retrieval_jax.checkpoints import t5x_checkpoints
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.pretrained import open_pretrained
from retrieval_jax.checkpoints.weights import LazyArray, lazy_arrays
from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.interop.writers import layers_of
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config

CONFIG = T5Config(40, 12, 2, 5, 18, 3, 2)


def loaded(model, path: Path, **options: object) -> dict:
    """Parameters that begin as a checkpoint's."""
    arrays = InitialCheckpoint(str(path), **options).arrays_for(model)
    return unflatten_dict({name: array.read() for name, array in arrays.items()}, sep="/")


def nest(arrays: dict) -> dict:
    return unflatten_dict(arrays, sep="/")


def test_a_real_legacy_checkpoint_runs(shared):
    path = shared / "fixtures" / "t5x" / "test_t5_tiny.checkpoint_0"
    pretrained = open_pretrained(path)
    assert (pretrained.format, pretrained.step) == ("T5X", 0)
    model = GenerativeRetriever(T5Config(**pretrained.network))
    params = loaded(model, path)
    assert params["decoder"]["layers_1"]["mlp"]["wi_0"]["kernel"].shape == (8, 16)
    batch = {"encoder_input_tokens": np.array([[3, 4, 1, 0]]), "decoder_input_tokens": np.array([[0, 7]])}
    logits = np.asarray(compiled(model, "logits")(params, batch))
    assert logits.shape == (1, 2, 32128)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_a_real_dual_encoder_of_t5x_retrievals_runs(shared):
    """T5 1.0, with zarr arrays, and other buckets of distances than T5's."""
    path = shared / "fixtures" / "t5x_retrieval" / "test_de_t5_tiny.checkpoint_1000"
    pretrained = open_pretrained(path)
    assert pretrained.step == 1000
    assert pretrained.settings == {"vector_dim": 768}
    assert pretrained.network["mlp_activations"] == ("relu",)
    assert pretrained.network["relpos_buckets"] == 4
    model = DualEncoder(T5Config(**pretrained.network), **pretrained.settings)
    params = loaded(model, path)
    vectors = np.asarray(compiled(model, "encode_queries")(params, np.array([[5, 6, 1, 0], [7, 1, 0, 0]])))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert abs(vectors[0] @ vectors[1]) < 0.9999


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("inline", [0, 1 << 16])
def test_written_and_read_again(tmp_path, monkeypatch, scan, inline):
    """Ours → T5X → ours, bit for bit, from scanned layers too; inline and as zarr."""
    monkeypatch.setattr(t5x_checkpoints, "INLINE", inline)
    model = GenerativeRetriever(dataclasses.replace(CONFIG, scan_layers=scan))
    params = random_params(model)
    folder = tmp_path / "checkpoint_7"
    folder.mkdir()
    t5x_checkpoints.write(folder, layers_of(params), 7)
    assert (folder / "target.encoder.layers_2.mlp.wo.kernel").is_dir() == (inline == 0)
    again = loaded(model, tmp_path)  # the folder that has checkpoint_7
    same(lazy_arrays(again), lazy_arrays(params))
    assert open_pretrained(folder).step == 7


def test_what_t5x_scans(tmp_path):
    """Its layers lie on axis 1, and attention's kernels have an axis of heads."""
    params = random_params(GenerativeRetriever(CONFIG))
    layers, E, H, D = layers_of(params), CONFIG.emb_dim, CONFIG.num_heads, CONFIG.head_dim
    scanned = {}
    for name, array in layers.items():
        stack, _, rest = name.partition("/layers_0/")
        if not rest:
            if "relpos_bias" in name:  # in each layer
                stack, _, bias = name.partition("/")
                count = getattr(CONFIG, f"num_{stack}_layers")
                scanned[f"{stack}/{stack}/{bias}"] = np.stack([array.read()] * count, axis=1)
            elif "/layers_" not in name:
                scanned[name] = array.read()
            continue
        count = getattr(CONFIG, f"num_{stack}_layers")
        x = np.stack([layers[f"{stack}/layers_{i}/{rest}"].read() for i in range(count)], axis=1)
        if "attention/" in rest:
            x = (
                x.reshape(H, D, count, E).transpose(0, 2, 1, 3)
                if "out" in rest
                else x.reshape(E, count, H, D)
            )
        scanned[f"{stack}/{stack}/{rest}"] = x
    tree = {"version": 3, "optimizer": {"target": nest(scanned), "state": {"step": 1}}}
    (tmp_path / "checkpoint").write_bytes(msgpack_serialize(tree))
    same(t5x_checkpoints.read(tmp_path), layers)
    scanned["encoder/encoder/relpos_bias/rel_embedding"][0, 1] += 1
    (tmp_path / "checkpoint").write_bytes(msgpack_serialize(tree | {"optimizer": {"target": nest(scanned)}}))
    with pytest.raises(UserError, match="rel_embedding: the layers' differ, and T5 has one for all"):
        t5x_checkpoints.read(tmp_path)


# With the live T5X, where it is.


@pytest.fixture
def t5x():
    if importlib.util.find_spec("t5x") is None:
        pytest.skip("needs T5X on PYTHONPATH: see retrieval_jax/interop/README.md")
    from retrieval_jax.interop.t5x import bridge

    bridge()


def test_t5x_restores_ours(t5x, tmp_path):
    from t5x import checkpoints

    params = random_params(GenerativeRetriever(CONFIG))
    for inline in (0, 1 << 16):
        t5x_checkpoints.INLINE, before = inline, t5x_checkpoints.INLINE
        folder = tmp_path / str(inline) / "checkpoint_4"
        folder.mkdir(parents=True)
        t5x_checkpoints.write(folder, layers_of(params), 4)
        t5x_checkpoints.INLINE = before
        restored = checkpoints.load_t5x_checkpoint(str(folder))
        assert restored["state"]["step"] == 4
        same(lazy_arrays(restored["target"]), lazy_arrays(params))


def test_the_network_that_t5x_scans(t5x, tmp_path):
    """Its own parameters, saved and read: our T5 gives its logits."""
    from t5x.examples.scalable_t5 import network

    sizes = (
        "vocab_size",
        "emb_dim",
        "num_heads",
        "num_encoder_layers",
        "num_decoder_layers",
        "head_dim",
        "mlp_dim",
    )
    config = network.T5Config(
        **{name: getattr(CONFIG, name) for name in sizes},
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )
    inputs, decoder_inputs, targets = (
        np.array([[5, 9, 3, 21, 1]]),
        np.array([[0, 4, 8]]),
        np.array([[4, 8, 1]]),
    )
    module = network.Transformer(config)
    params = module.init(jax.random.key(1), inputs, decoder_inputs, targets)["params"]
    for stack in ("encoder", "decoder"):  # as in a checkpoint that was made of a T5's
        bias = params[stack][stack]["relpos_bias"]
        bias["rel_embedding"] = jax.numpy.repeat(
            bias["rel_embedding"][:, :1], bias["rel_embedding"].shape[1], 1
        )
    expected = module.apply({"params": params}, inputs, decoder_inputs, targets, enable_dropout=False)
    tree = {"version": 3, "optimizer": {"target": jax.tree.map(np.asarray, params), "state": {"step": 0}}}
    (tmp_path / "checkpoint").write_bytes(msgpack_serialize(tree))
    for scan in (False, True):
        model = GenerativeRetriever(dataclasses.replace(CONFIG, scan_layers=scan))
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs}
        np.testing.assert_allclose(
            compiled(model, "logits")(loaded(model, tmp_path), batch), expected, rtol=0, atol=2e-5
        )


def test_scanned_towers(tmp_path):
    """Each tower's stack becomes an array a layer, as a stack without towers does, and comes back."""
    config = dataclasses.replace(CONFIG, scan_layers=True, num_decoder_layers=0)
    model = DualEncoder(config, vector_dim=4, shared_towers=False)
    params = random_params(model)
    separate = layers_of(params)
    for tower in ("left_tower", "right_tower"):
        same(
            {k.partition("/")[2]: v for k, v in separate.items() if k.startswith(tower)},
            layers_of(params[tower]),
        )
    assert "left_tower/encoder/layers_2/mlp/wo/kernel" in separate
    t5x_checkpoints.write(tmp_path, separate, 2)
    assert open_pretrained(tmp_path).settings == {"vector_dim": 4, "shared_towers": False}
    same(lazy_arrays(loaded(model, tmp_path)), lazy_arrays(params))


def test_orbaxs_format(tmp_path):
    params = random_params(GenerativeRetriever(CONFIG))
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "checkpoint_5" / "state", {"target": params, "step": np.int32(5)})
    checkpointer.close()
    pretrained = open_pretrained(tmp_path)
    assert (pretrained.format, pretrained.step) == ("T5X", 5)
    same(pretrained.arrays, lazy_arrays(params))


@pytest.mark.parametrize("layout", ["legacy", "orbax"])
def test_a_checkpoint_in_a_bucket(bucket, tmp_path, layout, monkeypatch):
    model = GenerativeRetriever(CONFIG)
    params = random_params(model)
    local, remote = tmp_path / "t5x", f"gs://bucket/pretrained_models/{layout}"
    if layout == "legacy":
        (local / "checkpoint_7").mkdir(parents=True)
        monkeypatch.setattr(t5x_checkpoints, "INLINE", 100)  # bytes; others are zarr arrays beside it
        t5x_checkpoints.write(local / "checkpoint_7", lazy_arrays(params), 7)
    else:
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(local / "checkpoint_7" / "state", {"target": params, "step": np.int32(7)})
        checkpointer.close()
    names = [str(path.relative_to(local)) for path in paths.files(local)]
    paths.copy_files(local, paths.as_path(remote), names, "send")
    assert open_pretrained(remote).step == 7  # the newest of T5X's MODEL_DIR
    for path in (remote, f"{remote}/checkpoint_7"):
        same(InitialCheckpoint(path).arrays_for(model), lazy_arrays(params))
    with pytest.raises(UserError, match=r"^INITIAL_CHECKPOINT: gs://bucket/none: there is no such"):
        open_pretrained("gs://bucket/none")
    with pytest.raises(UserError, match=r"^gs://forbidden/t5x: cannot be read"):
        open_pretrained("gs://forbidden/t5x")


def test_bfloat16_of_version_2(tmp_path):
    """Written as uint16, inline and as zarr; read as what they are."""
    model = GenerativeRetriever(CONFIG)
    params = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), random_params(model))
    bits = {
        name: LazyArray.from_numpy(array.read().view(np.uint16))
        for name, array in lazy_arrays(params).items()
    }
    t5x_checkpoints.write(tmp_path, bits, 1)
    read = t5x_checkpoints.read(tmp_path)
    assert {array.dtype for array in read.values()} == {np.dtype(ml_dtypes.bfloat16)}
    same(read, lazy_arrays(params))


def test_damage_and_other_files(tmp_path, shared):
    whole = shared / "fixtures" / "t5x_retrieval" / "test_de_t5_tiny.checkpoint_1000"
    torn = tmp_path / "checkpoint_1"
    shutil.copytree(whole, torn, copy_function=shutil.copy)
    for path in (torn, *torn.rglob("*")):
        path.chmod(0o755)
    (torn / "target.encoder.layers_0.mlp.wi.kernel" / ".zarray").unlink()
    with pytest.raises(UserError, match=r"not a whole checkpoint of T5X's .*fetch it again"):
        open_pretrained(torn)
    (torn / "checkpoint").write_bytes((whole / "checkpoint").read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole checkpoint of T5X's"):
        open_pretrained(torn)
    other = tmp_path / "notes.txt"
    other.write_text("none")
    with pytest.raises(UserError, match=r"notes\.txt: none of .*check the path"):
        open_pretrained(other)
    with pytest.raises(UserError, match="there is no such file or folder"):
        open_pretrained(tmp_path / "missing")
    tree = msgpack_restore((whole / "checkpoint").read_bytes())
    del tree["optimizer"]["target"]["encoder"]["relpos_bias"]
    (tmp_path / "checkpoint").write_bytes(msgpack_serialize(tree))
    for folder in flatten_dict(tree["optimizer"]["target"], is_leaf=lambda _, x: "driver" in x):
        name = f"target.{'.'.join(folder)}"
        if (whole / name).is_dir():
            shutil.copytree(whole / name, tmp_path / name)
    with pytest.raises(UserError, match="has no 'encoder/relpos_bias/rel_embedding': it is no T5"):
        open_pretrained(tmp_path / "checkpoint")
