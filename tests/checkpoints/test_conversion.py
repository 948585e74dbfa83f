"""Weights of other programs become a model folder with the same arrays, or are refused before that."""

import math
from pathlib import Path

import pytest
from model_folders import GOLDENS, same

from retrieval_jax.checkpoints.conversion import convert_weights
from retrieval_jax.checkpoints.model_folder import WEIGHTS, describe, load_model
from retrieval_jax.checkpoints.pretrained import open_pretrained
from retrieval_jax.checkpoints.weights import read_safetensors
from retrieval_jax.core.errors import UserError
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.query_generator import QueryGenerator


class Mine(DualEncoder):
    """A dual encoder of another package."""


@pytest.mark.parametrize("retriever", [DualEncoder, Mine])
def test_every_array_is_written_as_it_was_read(tmp_path: Path, retriever: type[DualEncoder]):
    pretrained = open_pretrained(GOLDENS / "gtr")
    converted = convert_weights(pretrained, retriever)
    assert isinstance(converted.model, retriever)
    assert converted.unused == []
    description = describe(converted.model, input_length=9, passage_length=9, step=0)
    made = converted.write(tmp_path, description | {"retriever": "DualEncoder"})
    same(read_safetensors(tmp_path, WEIGHTS), converted.arrays)
    assert (
        made["parameters"]
        == load_model(tmp_path).parameter_count
        == sum(math.prod(array.shape) for array in converted.arrays.values())
    )


def test_weights_that_lack_a_part_of_the_model_are_refused():
    with pytest.raises(
        UserError, match=r"lacks decoder/decoder_norm/scale, .*; has besides projection_layer"
    ):
        convert_weights(open_pretrained(GOLDENS / "gtr"), QueryGenerator)
