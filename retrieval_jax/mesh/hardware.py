"""What chips can do: peak arithmetic; of TPUs also memory, its bandwidth, and the slices on offer."""

import dataclasses

from retrieval_jax.core.errors import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, which is one JAX device.

    Attributes:
      name: its short name, as in "v4:2x2x1".
      device_kinds: the values of `jax.Device.device_kind` for it.
      flops: peak bfloat16 FLOP/s of dense products, as published by its vendor.
    """

    name: str
    device_kinds: tuple[str, ...]
    flops: float


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """A chip that programs can be compiled for without it.

    Attributes:
      bandwidth: bytes/s between the chip and its memory, as published.
      hbm: bytes of its memory that a program may fill, the limit of its compiler.
      topologies: the slices in which it is offered (chips along each dimension), smallest first.
      config: the name of its configuration, if its compiler wants one.
    """

    bandwidth: float
    hbm: int
    topologies: tuple[str, ...]
    config: str | None = None


def _gib(n: float) -> int:
    return int(n * GIB)


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS: dict[str, Tpu] = {
    chip.name: chip
    for chip in (
        # cloud.google.com/tpu/docs: a page a generation
        Tpu("v4", ("TPU v4",), 275e12, 1228e9, _gib(30.75), _CUBES, "megacore"),
        Tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 819e9, _gib(15.75), _SQUARES),
        Tpu("v5p", ("TPU v5", "TPU v5p"), 459e12, 2765e9, _gib(95.73), _CUBES),
        Tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1640e9, _gib(31.24), _SQUARES),
    )
}
# Data sheets of the SXM cards, without sparsity; a device kind begins so, and may go on ("… 80GB HBM3").
_CARDS = (
    Chip("a100", ("NVIDIA A100",), 312e12),
    Chip("h100", ("NVIDIA H100",), 989e12),
    Chip("h200", ("NVIDIA H200",), 989e12),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`; None if it is not known (a CPU, for example)."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip
    return next((card for card in _CARDS if device_kind.startswith(card.device_kinds[0])), None)


def parse_topology(topology: str) -> tuple[Tpu, str]:
    """Parses the name of a slice, such as "v4:4x4x4".

    Args:
      topology: the name.

    Returns:
      (chip, shape), such as (v4, "4x4x4").

    Raises:
      UserError: there is no such slice.
    """
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        known = ", ".join(f"{c.name}:{c.topologies[0]} … {c.topologies[-1]}" for c in CHIPS.values())
        raise UserError(f"TOPOLOGY: no slice {topology!r}: there are {known}")
    if shape not in chip.topologies:
        known = ", ".join(f"{name}:{t}" for t in chip.topologies)
        raise UserError(f"TOPOLOGY: no slice {topology!r}: {name} comes as {known}")
    return chip, shape
