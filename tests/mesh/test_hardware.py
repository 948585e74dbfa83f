"""Chips are known by what JAX calls them, and slices by their names."""

import jax
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh.hardware import CHIPS, find_chip, parse_topology


def test_chips_are_known_by_what_jax_calls_them():
    assert [find_chip(kind).name for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite")] == [*CHIPS]
    assert find_chip("NVIDIA H100 80GB HBM3").flops == 989e12
    assert find_chip("NVIDIA A100-SXM4-40GB").name == "a100"
    assert find_chip("TPU v5p").flops == find_chip("TPU v5").flops == 459e12
    assert find_chip(jax.devices("cpu")[0].device_kind) is None


def test_every_slice_of_a_chip_is_known_by_its_name():
    for chip in CHIPS.values():
        for shape in chip.topologies:
            assert parse_topology(f"{chip.name}:{shape}") == (chip, shape)
    with pytest.raises(UserError, match="TOPOLOGY: no slice 'v5e:3x3': v5e comes as v5e:1x1, v5e:2x2"):
        parse_topology("v5e:3x3")
