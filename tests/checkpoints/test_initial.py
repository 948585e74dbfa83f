"""Where training begins: what fits is taken, what does not is listed, and a part is taken when it is said."""

import ast
import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from model_folders import GOLDENS, SHAPES, compiled, flat, random_params, write_model_folder
from sentencepiece import sentencepiece_model_pb2

from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.checkpoints.pretrained import open_pretrained
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import learn
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.docids.residual import Codebooks
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.optimizers import adafactor, learning_rate
from retrieval_jax.training.run import docid_softmax
from retrieval_jax.training.step import abstract_state, initial_state

T5_1_1 = GOLDENS / "t5_1_1"
NETWORK = open_pretrained(T5_1_1).network
CONFIG = T5Config(**NETWORK)
OUTPUT = "decoder/logits_dense/kernel"


def begun(model, given: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """The parameters of the state that training begins with."""
    model.optimizer_def = adafactor(learning_rate(1e-3, 10))
    mesh = partitioning.make_mesh()
    abstract = abstract_state(model, mesh, SHAPES)
    state = initial_state(model, abstract, SHAPES, seed, given)
    assert int(state.step) == 0
    return flat(state.params)


def test_all_of_it():
    given = InitialCheckpoint(str(T5_1_1)).arrays_for(GenerativeRetriever(CONFIG))
    params = begun(GenerativeRetriever(CONFIG), given)
    theirs = open_pretrained(T5_1_1).arrays
    assert params.keys() == theirs.keys()
    for name, array in params.items():
        assert array.dtype == np.float32  # of float16 files
        np.testing.assert_array_equal(array, theirs[name].read().astype(np.float32))


def test_nothing_begins_as_ever():
    random = begun(GenerativeRetriever(CONFIG), {})
    again = begun(GenerativeRetriever(CONFIG), InitialCheckpoint().arrays_for(GenerativeRetriever(CONFIG)))
    for name in random:
        np.testing.assert_array_equal(random[name], again[name])


def test_what_does_not_fit_is_listed():
    model = GenerativeRetriever(dataclasses.replace(CONFIG, num_decoder_layers=4, mlp_dim=21))
    with pytest.raises(UserError) as raised:
        InitialCheckpoint(str(T5_1_1)).arrays_for(model)
    told = str(raised.value)
    assert "\n" not in told
    assert "lacks decoder/layers_*/encoder_decoder_attention/key/kernel" in told
    assert "encoder/layers_*/mlp/wi_0/kernel (16×20 there, 16×21 here)" in told
    assert "is of mlp_dim 20 (21 here)" in told
    smaller = GenerativeRetriever(dataclasses.replace(CONFIG, num_encoder_layers=1))
    with pytest.raises(UserError, match=r"has besides encoder/layers_\*/attention/key/kernel"):
        InitialCheckpoint(str(T5_1_1)).arrays_for(smaller)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"mlp_activations": ("relu", "linear")},
            r"mlp_activations \('gelu', 'linear'\) \(\('relu', 'linear'",
        ),
        ({"relpos_max_distance": 64}, r"relpos_max_distance 128 \(64 here\)"),
    ],
)
def test_a_network_of_the_same_shapes_that_computes_otherwise_is_refused(other: dict, told: str):
    with pytest.raises(UserError, match=f"is of {told}"):
        InitialCheckpoint(str(T5_1_1)).arrays_for(GenerativeRetriever(dataclasses.replace(CONFIG, **other)))


def test_the_flags_that_an_error_names_are_enough():
    """From a plain T5 to a dual encoder, and to docids of its own: copied from the line, they go on."""
    dual_encoder = DualEncoder(dataclasses.replace(CONFIG, num_decoder_layers=0), vector_dim=5)
    generative = GenerativeRetriever(
        dataclasses.replace(CONFIG, output_size=9, separate_target_embedding=True)
    )
    for model, new in (
        (dual_encoder, ("projection_layer",)),
        (generative, ("decoder_token_embedder", OUTPUT)),
    ):
        with pytest.raises(UserError) as raised:
            InitialCheckpoint(str(T5_1_1), missing_ok=()).arrays_for(model)
        flags = re.findall(r'--gin\.InitialCheckpoint\.(\w+)="([^"]+)"', str(raised.value))
        options = {"missing_ok": (), **{name: ast.literal_eval(value) for name, value in flags}}
        given = InitialCheckpoint(str(T5_1_1), **options).arrays_for(model)
        assert "token_embedder/embedding" in given
        # Of a docid embedding, token 0 alone: the text embedding's, which starts every target.
        begun_otherwise = [name for name, array in given.items() if array.valid_ranges != (0, ((0, 1),))]
        assert not any(name.startswith(new) for name in begun_otherwise)


def test_docids_of_their_own_begin_anew():
    """The texts' softmax is not theirs, be there as many of both by chance."""
    config = dataclasses.replace(CONFIG, output_size=CONFIG.vocab_size, separate_target_embedding=True)
    missing_ok = ("decoder/logits_dense", "decoder_token_embedder")
    initial = InitialCheckpoint(str(T5_1_1), missing_ok=missing_ok)
    match = initial.match(open_pretrained(T5_1_1), GenerativeRetriever(config))
    assert set(match.random) == {OUTPUT, "decoder_token_embedder/embedding"}
    assert match.unused == [OUTPUT]
    random = begun(GenerativeRetriever(config), {})
    params = begun(GenerativeRetriever(config), initial.arrays_for(GenerativeRetriever(config)))
    np.testing.assert_array_equal(params[OUTPUT], random[OUTPUT])
    tokens = "decoder_token_embedder/embedding"
    np.testing.assert_array_equal(params[tokens][0], params["token_embedder/embedding"][0])
    np.testing.assert_array_equal(params[tokens][1:], random[tokens][1:])
    assert np.abs(params["encoder/encoder_norm/scale"] - random["encoder/encoder_norm/scale"]).max() > 0.1


@pytest.mark.parametrize("scan_layers", [False, True])
def test_docid_tokens_begin_as_their_centroids(scan_layers, tmp_path):
    """Token 2 + i·V + v is codebook i's vector v; digits, end and padding are random.

    The second codebook has two vectors fewer than V: their codes are not used, and begin at random.
    """
    L, V, digits, size = 3, 4, 1, 128
    config = dataclasses.replace(
        CONFIG, output_size=size, separate_target_embedding=True, scan_layers=scan_layers
    )
    model = GenerativeRetriever(config)
    vectors_LxVxE = np.random.default_rng(0).standard_normal((L, V, config.emb_dim)).astype(np.float32)
    vectors_LxVxE[1, 2:] = 0
    Codebooks(vectors_LxVxE, np.array([4, 2, 4], np.int32)).write(tmp_path)
    centroids = docid_kind("rq_3x4").centroids(tmp_path)
    random = begun(model, {})

    def expected(scale: float, start: np.ndarray, name: str) -> np.ndarray:
        rows = random[name].T.copy() if name == OUTPUT else random[name].copy()
        rows[0] = start
        for level, used in enumerate((4, 2, 4)):
            for code in range(used):
                rows[2 + level * V + code] = scale * vectors_LxVxE[level, code]
        assert 2 + (L + digits) * V < len(rows)  # the rest of them are as they were
        return rows

    embedding, scale = "decoder_token_embedder/embedding", 0.5
    alone = InitialCheckpoint(docid_centroids=True, docid_scale=scale).arrays_for(model, None, centroids)
    params = begun(model, alone)
    for name, start in ((embedding, random[embedding][0]), (OUTPUT, random[OUTPUT][:, 0])):
        ours = params[name].T if name == OUTPUT else params[name]
        np.testing.assert_array_equal(ours, expected(scale, start, name))
    np.testing.assert_array_equal(params["encoder/encoder_norm/scale"], random["encoder/encoder_norm/scale"])

    apart = InitialCheckpoint(docid_centroids=True, docid_scale=scale, docid_input_scale=0.0)
    params = begun(model, apart.arrays_for(model, None, centroids))
    np.testing.assert_array_equal(params[embedding], expected(0.0, random[embedding][0], embedding))
    np.testing.assert_array_equal(params[OUTPUT].T, expected(scale, random[OUTPUT][:, 0], OUTPUT))
    assert (apart.centroid_scales, InitialCheckpoint().centroid_scales) == ([scale, 0.0], None)

    new = ("decoder_token_embedder", "decoder/logits_dense")
    beside = InitialCheckpoint(str(T5_1_1), missing_ok=new, docid_centroids=True).arrays_for(
        model, None, centroids
    )
    params = begun(model, beside)
    words = open_pretrained(T5_1_1).arrays["token_embedder/embedding"].read()
    np.testing.assert_array_equal(params["token_embedder/embedding"], words)
    np.testing.assert_array_equal(params[embedding], expected(1, words[0], embedding))
    np.testing.assert_array_equal(params[OUTPUT].T, expected(1, random[OUTPUT][:, 0], OUTPUT))

    params, batch = (
        unflatten_dict(params, sep="/"),
        {"encoder_input_tokens": np.array([[7, 3, 1], [9, 1, 0]])},
    )
    state_BxE = np.asarray(compiled(model, "first_states")(params, batch["encoder_input_tokens"]), np.float64)
    logits = compiled(model, "logits")(params, batch | {"decoder_input_tokens": np.zeros((2, 1), np.int32)})
    first_book_ExV = vectors_LxVxE[0].T.astype(np.float64)
    np.testing.assert_allclose(logits[:, 0, 2 : 2 + V], state_BxE @ first_book_ExV, rtol=1e-5, atol=1e-5)


def test_centroids_of_another_width_are_refused(tmp_path):
    Codebooks(np.ones((1, 4, 9), np.float32), np.array([4], np.int32)).write(tmp_path)
    model = GenerativeRetriever(dataclasses.replace(CONFIG, output_size=128, separate_target_embedding=True))
    with pytest.raises(
        UserError, match=r"centroids have 9 dimensions, and the model's embeddings 16: make the docids of"
    ):
        InitialCheckpoint(docid_centroids=True).arrays_for(
            model, None, docid_kind("rq_1x4").centroids(tmp_path)
        )


@pytest.mark.parametrize("rows", [40, 64])
def test_a_longer_or_shorter_vocabulary(rows):
    config = dataclasses.replace(CONFIG, vocab_size=rows)
    with pytest.raises(UserError, match=rf"token_embedder/embedding \(50×16 there, {rows}×16 here\)"):
        InitialCheckpoint(str(T5_1_1)).arrays_for(GenerativeRetriever(config))
    resized = ("token_embedder", "decoder/logits_dense")
    given = InitialCheckpoint(str(T5_1_1), resize_vocab=resized).arrays_for(GenerativeRetriever(config))
    params, random = begun(GenerativeRetriever(config), given), begun(GenerativeRetriever(config), {})
    theirs = open_pretrained(T5_1_1).arrays
    for name, axis in (("token_embedder/embedding", 0), (OUTPUT, 1)):
        ours, new = np.moveaxis(params[name], axis, 0), np.moveaxis(random[name], axis, 0)
        np.testing.assert_array_equal(ours[:50], np.moveaxis(theirs[name].read(), axis, 0)[:rows])
        np.testing.assert_array_equal(ours[50:], new[50:])


def test_a_name_to_leave_out_that_is_in_no_weights_is_refused():
    config = dataclasses.replace(CONFIG, num_decoder_layers=0)
    options = {"missing_ok": ("projection_layer",), "unexpected_ok": ("decodr",)}
    with pytest.raises(
        UserError, match=r"InitialCheckpoint.unexpected_ok: 'decodr' is not .* as decoder or "
    ):
        InitialCheckpoint(str(T5_1_1), **options).arrays_for(DualEncoder(config, vector_dim=5))
    # A name that other weights have is right: gin files are shared.
    given = InitialCheckpoint(str(T5_1_1), unexpected_ok=("pawa_decoder", "decoder/layers_0")).arrays_for(
        GenerativeRetriever(CONFIG)
    )
    assert given


def test_both_towers_begin_as_the_one():
    config = dataclasses.replace(CONFIG, num_decoder_layers=0, scan_layers=True)
    model = DualEncoder(config, vector_dim=5, shared_towers=False, learn_scale=True)
    options = {"missing_ok": ("projection_layer", "log_scale"), "unexpected_ok": ("decoder",)}
    params = begun(model, InitialCheckpoint(str(T5_1_1), **options).arrays_for(model))
    theirs = open_pretrained(T5_1_1).arrays
    for tower in ("left_tower", "right_tower"):
        stack = params[f"{tower}/encoder/encoder/mlp/wo/kernel"]
        for i in range(2):
            np.testing.assert_array_equal(stack[i], theirs[f"encoder/layers_{i}/mlp/wo/kernel"].read())
    assert params["log_scale"] == 0


def test_of_our_own_models(tmp_path, collection):
    """A scanned model goes on as one that is not, and a dual encoder's towers as they are."""
    config = T5Config(1152, 16, 2, 8, 20, 2, 2, scan_layers=True)
    model = GenerativeRetriever(config)
    write_model_folder(tmp_path / "a", model, random_params(model), collection)
    assert load_model(tmp_path / "a").step == 7
    other = GenerativeRetriever(dataclasses.replace(config, scan_layers=False))
    given = InitialCheckpoint(str(tmp_path / "a")).arrays_for(other)
    stack = flat(load_model(tmp_path / "a").params)["decoder/decoder/mlp/wi_0/kernel"]
    np.testing.assert_array_equal(given["decoder/layers_1/mlp/wi_0/kernel"].read(), stack[1])
    towers = DualEncoder(dataclasses.replace(config, num_decoder_layers=0), vector_dim=4, shared_towers=False)
    params = random_params(towers)
    params["right_tower"] = jax.tree.map(lambda x: 2 * x, params["right_tower"])
    write_model_folder(tmp_path / "b", towers, params, collection)
    given = InitialCheckpoint(str(tmp_path / "b")).arrays_for(towers)
    for name, array in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(given[name].read(), array)


def test_a_generative_retriever_begins_with_a_dual_encoders_first_states(tmp_path, collection):
    """Also where residual docids have an embedding of their own: its start token is the one of the texts."""
    config = T5Config(1152, 16, 2, 8, 20, 2, 2, scan_layers=True)
    dense = DualEncoder(config, pooling="decoder", normalize=False)
    write_model_folder(tmp_path / "dense", dense, random_params(dense), collection)
    opened = load_model(tmp_path / "dense")
    assert opened.description["settings"]["pooling"] == "decoder"

    softmax = docid_softmax(docid_kind("rq_4x16").shape(100, 1152))
    generative = GenerativeRetriever(dataclasses.replace(config, **softmax))
    assert generative.config.separate_target_embedding
    initial = InitialCheckpoint(
        str(tmp_path / "dense"), missing_ok=("decoder_token_embedder", "decoder/logits_dense")
    )
    params, random = begun(generative, initial.arrays_for(generative)), begun(generative, {})
    name = "decoder_token_embedder/embedding"
    np.testing.assert_array_equal(params[name][1:], random[name][1:])
    queries = np.random.default_rng(0).integers(2, 1152, (3, 9)).astype(np.int32)
    expected = compiled(opened.model, "encode_queries")(opened.params, queries)
    got = compiled(generative, "first_states")(unflatten_dict(params, sep="/"), queries)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_another_vocabulary_are_refused(tmp_path, collection):
    """Their own pieces are compared, by content; sentinels may be among them, and `resized` allows more."""
    config = T5Config(1152, 16, 2, 8, 20, 1, 0)
    model = DualEncoder(config, vector_dim=4)
    write_model_folder(tmp_path / "own", model, random_params(model), collection)
    initial, ours = InitialCheckpoint(str(tmp_path / "own")), tmp_path / "own" / "sentencepiece.model"
    pieces = collection.vocabulary_path
    assert initial.arrays_for(model, pieces)

    proto = sentencepiece_model_pb2.ModelProto.FromString(pieces.read_bytes())
    proto.pieces.add(piece="<extra_id_0>", score=0, type=4)
    ours.write_bytes(proto.SerializeToString())
    assert initial.arrays_for(model, pieces)
    proto.pieces.add(piece="more", score=-9)
    ours.write_bytes(proto.SerializeToString())
    with pytest.raises(
        UserError, match=f"{pieces} is another vocabulary than that of {initial.path}, which has"
    ):
        initial.arrays_for(model, pieces)
    assert dataclasses.replace(initial, resize_vocab=("token_embedder",)).arrays_for(model, pieces)
    proto.pieces[9].piece = "other"
    ours.write_bytes(proto.SerializeToString())
    for resized in ((), ("token_embedder",)):
        with pytest.raises(UserError, match=rf"whose piece 9 is 'other', not .* --VOCABULARY={ours}"):
            dataclasses.replace(initial, resize_vocab=resized).arrays_for(model, pieces)
    proto = sentencepiece_model_pb2.ModelProto.FromString(pieces.read_bytes())
    proto.normalizer_spec.precompiled_charsmap = b""
    ours.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="another vocabulary"):
        initial.arrays_for(model, pieces)


def test_a_tokenizer_without_a_sentencepiece_model_is_compared_too(tmp_path, collection):
    folder = shutil.copytree(GOLDENS / "gtr", tmp_path / "gtr")
    pieces = shutil.move(folder / "spiece.model", tmp_path / "theirs.model")
    network = open_pretrained(folder).network
    model = DualEncoder(T5Config(**network), vector_dim=9)
    initial = InitialCheckpoint(str(folder))
    assert initial.arrays_for(model, pieces)
    with pytest.raises(UserError, match=f"is another vocabulary than that of {folder}, whose piece"):
        initial.arrays_for(model, collection.vocabulary_path)
    (folder / "tokenizer.json").unlink()
    assert initial.arrays_for(model, collection.vocabulary_path)  # nothing tells


def test_a_run_begins_with_it(cli, work, arguments, tmp_path, collection):
    """By the command: its first loss is another than from random weights; other weights are refused."""
    assert cli("docids", *arguments)[0] == 0
    sizes = (64, 2, 32, 64, 1, 1)
    model = GenerativeRetriever(T5Config(1152, *sizes, dropout_rate=0.0))
    params = random_params(model)
    write_model_folder(tmp_path / "given", model, params, collection)
    folder = tmp_path / "trained"
    flags = [*arguments, f"--gin.MODEL_DIR='{folder}'", "--gin.STEPS=1", "--gin.train.log_every=1"]
    flags += ["--gin.T5Config.dropout_rate=0.0"]
    given = f"--gin.INITIAL_CHECKPOINT='{tmp_path / 'given'}'"
    status, _, err = cli("train", *flags, given)
    assert status == 0, err
    assert f"{tmp_path / 'given'}: retrieval_jax's weights, 29 arrays are read" in err
    points = [json.loads(line) for line in (folder / "learning_curve.jsonl").read_text().splitlines()]
    loss = points[0]["loss"]
    status, *_ = cli("train", *flags, f"--gin.MODEL_DIR='{tmp_path / 'random'}'")
    points = [
        json.loads(line) for line in (tmp_path / "random" / "learning_curve.jsonl").read_text().splitlines()
    ]
    assert abs(points[0]["loss"] - loss) > 0.01
    learn(["an altogether different text of few words"] * 9, 60, tmp_path / "given" / "sentencepiece.model")
    status, _, err = cli("train", *flags, given, f"--gin.MODEL_DIR='{tmp_path / 'other'}'")
    assert status == 2
    assert "is another vocabulary than that of" in err
    assert not (tmp_path / "other").exists()
    assert open_pretrained(folder).step == 1
    status, _, err = cli("train", *flags)
    assert status == 2
    assert "initial_checkpoint is" in err
    wrong = f"--gin.INITIAL_CHECKPOINT='{tmp_path / 'nothing'}'"
    status, _, err = cli("train", *flags, wrong, f"--gin.MODEL_DIR='{tmp_path / 'other'}'")
    assert status == 2
    assert "there is no such file or folder" in err
    assert not (tmp_path / "other").exists()


def test_a_run_begins_with_the_centroids(cli, work, arguments, tmp_path, collection):
    """By the command: model.json keeps the scale, a run without them does not go on, naive has none."""
    vectors = tmp_path / "vectors.npy"
    np.save(vectors, np.random.default_rng(0).standard_normal((collection.passage_count, 64), np.float32))
    rq = "--gin.DOCIDS='rq_2x4'"
    assert cli("docids", *arguments, rq, f"--gin.EMBEDDINGS='{vectors}'")[0] == 0
    folder = tmp_path / "trained"
    flags = [*arguments, f"--gin.MODEL_DIR='{folder}'", "--gin.STEPS=1"]
    centroids = ["--gin.InitialCheckpoint.docid_centroids=True", "--gin.InitialCheckpoint.docid_scale=0.25"]
    status, _, err = cli("train", *flags, *centroids)
    assert status == 2
    assert "docid_centroids: naive docids have no centroids: choose rq docids" in err
    assert not folder.exists()
    status, _, err = cli("train", *flags, rq, *centroids)
    assert status == 0, err
    assert "8 docid tokens begin as their centroids, times 0.25" in err
    assert json.loads((folder / "model.json").read_text())["docid_centroids"] == 0.25
    status, _, err = cli("train", *flags, rq)
    assert status == 2
    assert "docid_centroids is 0.25 there and None here" in err
