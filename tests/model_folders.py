"""Models of random weights alone, in memory and on disk, for tests of every format."""

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.checkpoints.weights import LazyArray, lazy_arrays, write_safetensors
from retrieval_jax.data.collection import Collection

GOLDENS = Path(__file__).with_name("interop") / "goldens"
SHAPES = dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens", "left_encoder_input_tokens"), (1, 2))


def random_params(model, seed: int = 0) -> dict:
    """A model's parameters, none of them at a value that would hide a mistake, as norms' ones would."""
    params = nn.unbox(model.get_initial_variables(jax.random.key(seed), SHAPES)["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32), params)


def exact_scores(model, params: dict, query_S: np.ndarray, docids_NxL: np.ndarray) -> np.ndarray:
    """Each docid's score for one query, float64 N: sums of NumPy's, of the logits of all tokens."""
    targets = np.asarray(docids_NxL, np.int32)
    batch = {
        "encoder_input_tokens": np.tile(query_S, (len(targets), 1)),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    scores_NxLxV = np.asarray(jax.jit(model.logits)(params, batch), np.float64)
    if model.score == "log_prob":
        scores_NxLxV -= np.log(np.exp(scores_NxLxV).sum(-1, keepdims=True))
    return (np.take_along_axis(scores_NxLxV, targets[..., None], -1)[..., 0] * (targets > 0)).sum(1)


def write_model_folder(folder: Path, model, params: dict, collection: Collection, **facts: object) -> None:
    """A model folder as `convert` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = {"input_length": 24, "passage_length": 32}
    of = {"collection_name": "small_docs", "collection": collection.fingerprint, "step": 7}
    known = {"docids": None, "docids_fingerprint": None, "initial_checkpoint": None}
    description = model_folder.describe(model, **lengths | of | known | facts)
    (folder / model_folder.DESCRIPTION).write_text(json.dumps(description))
    shutil.copyfile(collection.vocabulary_path, folder / model_folder.VOCABULARY)
    (folder / model_folder.GIN).write_text("# how it was made\n")
    write_safetensors(folder, model_folder.WEIGHTS, lazy_arrays(params))


def same(a: dict[str, LazyArray], b: dict[str, LazyArray]) -> None:
    """Both have the same names, and bit for bit the same arrays."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name].read(), b[name].read(), err_msg=name)


def flat(params: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}
