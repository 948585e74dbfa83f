"""The average of two models' weights, against the mean in float64."""

import dataclasses

import numpy as np
import pytest
from model_folders import flat, random_params, write_model_folder

from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import learn
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config


def test_the_average_of_two_models_is_exact(tmp_path, collection):
    """What one alone has is as it is there, whichever is named first; another size or depth is one line."""
    network = T5Config(1152, 16, 2, 8, 20, 1, 1, output_size=9, separate_target_embedding=True)
    sequential = GenerativeRetriever(network)
    encoder = DualEncoder(dataclasses.replace(network, output_size=None, separate_target_embedding=False))
    wide = DualEncoder(dataclasses.replace(encoder.config, mlp_dim=24))
    deep = DualEncoder(dataclasses.replace(encoder.config, num_encoder_layers=2))
    folders, params = {}, {}
    models = {"seq": sequential, "enc": encoder, "wide": wide, "deep": deep}
    for seed, (name, model) in enumerate(models.items()):
        folders[name] = tmp_path / name
        params[name] = random_params(model, seed)
        write_model_folder(folders[name], model, params[name], collection)
    a, b = flat(params["seq"]), flat(params["enc"])
    for first, second in (("seq", "enc"), ("enc", "seq")):
        initial = InitialCheckpoint(
            str(folders[first]), averaged_with=str(folders[second]), unexpected_ok=("projection_layer",)
        )
        found = initial.arrays_for(sequential, collection.vocabulary_path)
        assert found.keys() == a.keys()
        for name, array in found.items():
            wide_mean = (a[name].astype(np.float64) + b[name]) / 2 if name in b else a[name]
            np.testing.assert_array_equal(array.read(), wide_mean.astype(np.float32), name)
    assert "token_embedder/embedding" in b.keys() & a.keys()
    assert "decoder/logits_dense/kernel" in a.keys() - b.keys()

    def refused(message: str, path: str, others: str) -> None:
        with pytest.raises(UserError, match=rf"^InitialCheckpoint.averaged_with: {message}") as raised:
            InitialCheckpoint(path, averaged_with=others).arrays_for(sequential, collection.vocabulary_path)
        assert "\n" not in str(raised.value)

    refused(
        r".*/wide differs from it in encoder/layers_\*/mlp/wi_0/kernel",
        str(folders["seq"]),
        str(folders["wide"]),
    )
    refused(r".*/deep differs from it in num_encoder_layers", str(folders["seq"]), str(folders["deep"]))
    refused(r".*/none: there is no such", str(folders["seq"]), str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^InitialCheckpoint.averaged_with: x, and no weights to average"):
        InitialCheckpoint(averaged_with="x")
    learn(["an altogether different text of few words"] * 9, 60, folders["enc"] / "sentencepiece.model")
    other = r".*is another vocabulary than that of .*/enc, .*: average models of one vocabulary"
    refused(other, str(folders["seq"]), str(folders["enc"]))
