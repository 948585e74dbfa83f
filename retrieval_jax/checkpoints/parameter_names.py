"""The names of the parameters of all networks of this project, to check names that gin parameters list.

A gin file may be shared by several models, so the name of a parameter of any network is accepted.
"""

import functools
import re
from collections.abc import Iterable

import flax.linen as nn
from flax.traverse_util import flatten_dict

from retrieval_jax.checkpoints.model_folder import boxed_params
from retrieval_jax.core import configuration
from retrieval_jax.core.values import Names
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.dual_encoder_network import split_tower
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config

MAX_LISTED = 8  # names of a list that an error tells


@functools.cache
def parameter_names() -> frozenset[str]:
    """Returns T5X's names of all parameters, without towers; "layers_N" stands for each layer of a stack."""
    sizes = {"vocab_size": 8, "num_encoder_layers": 1, "num_decoder_layers": 1}
    sizes |= dict.fromkeys(("emb_dim", "num_heads", "head_dim", "mlp_dim"), 2)
    docids = {"output_size": 8, "separate_target_embedding": True, "pawa_layers": 1, "lexical_head": True}
    names = set()
    # These models are of no run: its settings (config.gin, settings.json) must not name them.
    with configuration.unrecorded():
        for scan in (False, True):
            for activations in (("gelu", "linear"), ("relu",)):
                config = T5Config(**sizes, scan_layers=scan, mlp_activations=activations)
                generative = T5Config(**vars(config) | docids)
                for model in (GenerativeRetriever(generative), DualEncoder(config, learn_scale=True)):
                    names |= flatten_dict(nn.unbox(boxed_params(model)), sep="/").keys()
    return frozenset(re.sub(r"/layers_\d+/", "/layers_N/", split_tower(name)[1]) for name in names)


def module_names() -> set[str]:
    """Returns the names of all parameters and of all modules that hold them, as "decoder/logits_dense"."""
    return {
        "/".join(parts[:depth])
        for parts in (name.split("/") for name in parameter_names())
        for depth in range(1, len(parts) + 1)
    }


def last_names() -> set[str]:
    """Returns the last two parts of each parameter's name: "logits_dense", "kernel"."""
    return {part for name in parameter_names() for part in name.split("/")[-2:]}


Module = Names("a parameter or of a module of the networks", module_names)
LastName = Names("a parameter's last module or of its array", last_names)


def grouped(names: Iterable[str]) -> list[str]:
    """Returns the names, where layers that differ only in their number are one name."""
    return list(dict.fromkeys(re.sub(r"/layers_\d+/", "/layers_*/", name) for name in names))


def shortened(names: list[str]) -> str:
    """Lists the first names, and says how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
