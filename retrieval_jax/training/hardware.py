"""What is known of accelerators, by the name that JAX gives a device."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, as its maker states it.

    Attributes:
      flops: peak dense bfloat16 operations a second.
    """

    flops: float


# The beginning of a device's kind -> the chip; the longest that fits counts.
CHIPS = {
    "TPU v4": Chip(flops=275e12),
    "TPU v5 lite": Chip(flops=197e12),
    "TPU v5e": Chip(flops=197e12),
    "TPU v5": Chip(flops=459e12),  # v5p
    "TPU v6 lite": Chip(flops=918e12),
    "TPU v6e": Chip(flops=918e12),
    "NVIDIA A100": Chip(flops=312e12),
    "NVIDIA H100": Chip(flops=989e12),
    "NVIDIA H200": Chip(flops=989e12),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip of a device; None where it is not known."""
    fitting = [kind for kind in CHIPS if device.device_kind.startswith(kind)]
    return CHIPS[max(fitting, key=len)] if fitting else None
