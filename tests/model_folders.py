"""Models of random weights alone, in memory and on disk, for tests of every format."""

import functools
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.checkpoints.weights import LazyArray, lazy_arrays, write_safetensors
from retrieval_jax.data.collection import Collection
from retrieval_jax.models.dual_encoder_network import TOWERS
from retrieval_jax.models.layers import T5Config

GOLDENS = Path(__file__).with_name("interop") / "goldens"
SHAPES = dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens", "left_encoder_input_tokens"), (1, 2))


@functools.cache
def compiled(model, method: str) -> Callable:
    """A model's method as one program; without, each of its operations is compiled alone."""
    return jax.jit(getattr(model, method))


def initial_params(model, seed: int = 0) -> dict:
    """The parameters that a model begins with."""
    begin = jax.jit(lambda key: model.get_initial_variables(key, SHAPES)["params"])
    return nn.unbox(begin(jax.random.key(seed)))


def random_params(model, seed: int = 0) -> dict:
    """A model's parameters, none of them at a value that would hide a mistake, as norms' ones would.

    They are as large as those that a model begins with, but drawn by NumPy: the programs by which JAX draws
    take seconds to compile.
    """
    shapes = {}

    def constants() -> dict:
        begun = flatten_dict(nn.unbox(model.get_initial_variables(jax.random.key(0), SHAPES)["params"]))
        shapes.update({path: x.shape for path, x in begun.items()})
        return {path: x for path, x in begun.items() if x.ndim < 2 or path[-1] == "scale"}

    params = jax.device_get(jax.jit(constants)())
    for path, shape in shapes.items():
        name = "/".join(part for part in path if part not in TOWERS)
        rng = np.random.default_rng([seed, zlib.crc32("/".join(path).encode())])
        if path not in params:
            params[path] = rng.normal(0, _first_std(model.config, name, shape), shape)
        params[path] = jnp.asarray(np.float32(params[path] * rng.uniform(0.5, 1.5, shape)))
    return unflatten_dict(params)


def _first_std(config: T5Config, name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation that a parameter begins with; see models/layers.py and models/pawa.py."""
    if name.endswith("rel_embedding"):
        return (2 / sum(shape[-2:])) ** 0.5
    if name.endswith("embedding"):
        return config.embedding_init_std
    if len(shape) == 3 and len({*shape}) == 1:  # PAWA's
        return 1 / shape[0]
    return (shape[-2] * (config.head_dim if name.endswith("query/kernel") else 1)) ** -0.5


def exact_scores(model, params: dict, query_S: np.ndarray, docids_NxL: np.ndarray) -> np.ndarray:
    """Each docid's score for one query, float64 N: sums of NumPy's, of the logits of all tokens."""
    targets = np.asarray(docids_NxL, np.int32)
    batch = {
        "encoder_input_tokens": np.tile(query_S, (len(targets), 1)),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    scores_NxLxV = np.asarray(compiled(model, "logits")(params, batch), np.float64)
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
