"""Names that gin parameters may use: those of the networks, and of their axes."""

import flax.linen as nn
import gin
import jax
import pytest

from retrieval_jax.checkpoints.initial import WithVocabulary
from retrieval_jax.checkpoints.model_folder import boxed_params
from retrieval_jax.checkpoints.parameter_names import LastName, Module, parameter_names
from retrieval_jax.core import configuration, values
from retrieval_jax.mesh.partitioning import LOGICAL_AXES
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.training.settings_file import LEARNING

CONFIG = T5Config(64, 8, 2, 4, 8, 2, 2)
DOCIDS = {"output_size": 9, "separate_target_embedding": True, "pawa_layers": 2}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("activations", [("gelu", "linear"), ("relu",)])
def test_names_of_every_network_are_known(scan: bool, activations: tuple[str, ...]):
    config = T5Config(**vars(CONFIG) | {"scan_layers": scan, "mlp_activations": activations})
    axes = set()
    for model in (
        GenerativeRetriever(T5Config(**vars(config) | DOCIDS)),
        GenerativeRetriever(T5Config(**vars(config) | {"logits_via_embedding": True})),
        QueryGenerator(config),
        DualEncoder(config, learn_scale=True),
        DualEncoder(config, shared_towers=False),
    ):
        boxed = boxed_params(model)
        for path, _ in jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)):
            parts = [key.key for key in path]
            assert all(LastName.holds(part) for part in parts[-2:])
            bare = parts[1:] if parts[0].endswith("_tower") else parts
            assert all(Module.holds("/".join(bare[: i + 1])) for i in range(len(bare)))
        axes |= {axis for spec in jax.tree.leaves(nn.get_partition_spec(boxed)) for axis in spec}
    assert axes - {None} <= set(LOGICAL_AXES)


def test_no_other_name_is_known():
    for name in ("encoder/logits_dense", "left_tower/encoder", "layers_0", "encoder/layers_x", "encod", ""):
        assert not Module.holds(name)
    assert not LastName.holds("decoder")
    assert all(Module.holds(name) for name in WithVocabulary.names())


def test_what_a_misfit_is_of():
    """The part that does not fit is told, not all of the value."""
    known = values.Annotated[str, values.Names("a task", ("daq", "labelled_LABEL"))]
    shares = str | values.Mapping[known, values.Fraction]
    assert values.misfit({"daq": 0.5, "labelled_x/y": 1}, shares) is None
    assert values.misfit({"daq": 2}, shares).value == 2
    assert values.misfit({"labelled_": 1}, shares).value == "labelled_"
    assert values.misfit([(3, "daq"), (4, 5)], values.Sequence[tuple[int, known]]).value == 5
    assert values.misfit([(3, values.ANY)], values.Sequence[tuple[int, known]]) is None
    assert values.misfit(["daq", "dq"], tuple[known, ...]).wanted == "the name of a task, as daq is"


def test_the_networks_that_are_asked_for_their_names_are_in_no_runs_settings():
    """A run's first command in a process once had settings of both retrievers, its second none."""
    gin.clear_config()
    parameter_names.cache_clear()
    assert "decoder/decoder_norm/scale" in parameter_names()
    assert not configuration.texts_of_parameters(LEARNING)
    assert not gin.operative_config_str()
