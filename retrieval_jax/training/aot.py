"""Ahead-of-time compilation: compiles a program for devices that are not there, and measures its memory."""

import dataclasses
import importlib.util
import os
import re
import time

import jax
from jax.sharding import Mesh

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import NO_TPU, log
from retrieval_jax.mesh.hardware import GIB, parse_topology
from retrieval_jax.training.flops import jaxpr_flops
from retrieval_jax.training.program import Program

# The default 64 KiB of its threads' stacks overflow while the TPU compiler weighs the tilings of XL's matrix
# products on v5e.
STACK_SIZE = f"--fibers_default_thread_stack_size={1 << 20}"


def measure(program: Program, hbm: float, title: str, optimization: int | None = None) -> "MemoryReport":
    """Compiles a program for the devices of its mesh, unless its arguments alone exceed their memory.

    Args:
      program: the program.
      hbm: bytes of memory of one device.
      title: "WHERE: compiling WHAT", a line for the person who waits.
      optimization: the effort of the compiler; None is its default.

    Returns:
      What it takes of one device's memory.

    Raises:
      DoesNotDivide: an argument does not divide over the mesh.
    """
    argument_bytes = program.argument_bytes()
    traced = program.trace()
    flops = jaxpr_flops(traced.jaxpr, program.loop_trips)
    report = MemoryReport(hbm, argument_bytes, peak=sum(argument_bytes.values()), flops=flops)
    if report.peak > hbm:
        return report
    log(f"{title} …")
    began = time.monotonic()
    options = {}
    if optimization is not None:
        by_name = jax.__version_info__ >= (0, 11)
        options = {"optimization_level": f"O{optimization}" if by_name else optimization}
    try:
        memory = traced.lower().compile(compiler_options=options).memory_analysis()
        report = dataclasses.replace(report, peak=memory.peak_memory_in_bytes, compiled=True)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        report = dataclasses.replace(report, peak=needed(str(error), report.peak), exhausted=True)
    report = dataclasses.replace(report, seconds=time.monotonic() - began)
    log(f"{title.partition(':')[0]}: {report.verdict}, after {report.seconds:.0f} s of compiling")
    return report


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What a program takes of the memory of one device.

    Attributes:
      hbm: bytes of memory that the device has.
      argument_bytes: name -> bytes of that group of arguments.
      peak: the most bytes that the program takes; a lower bound if it does not fit.
      flops: floating-point operations of all devices together.
      compiled: whether the compilation succeeded.
      exhausted: whether the compiler found that the memory does not suffice.
      seconds: the time that compiling took.
    """

    hbm: float
    argument_bytes: dict[str, int]
    peak: int
    flops: int
    compiled: bool = False
    exhausted: bool = False
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the program runs in the device's memory."""
        return self.compiled and self.peak <= self.hbm

    @property
    def verdict(self) -> str:
        """Says in a few words whether the program fits, and by how much."""
        peak = f"{self.peak / GIB:.2f} of {self.hbm / GIB:.2f} GiB a chip"
        spare = (self.hbm - self.peak) / GIB
        if self.fits:
            return f"fits: {peak}, {spare:.2f} to spare"
        if self.compiled or self.exhausted:
            return f"does not fit: {peak}, {-spare:.2f} too many"
        return f"does not fit: {', '.join(self.argument_bytes)} alone take {peak}"


def needed(message: str, at_least: int) -> int:
    """Reads the bytes that a program needs from the TPU compiler's error, or gives `at_least`."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    if found := re.search(r"Used ([\d.]+)([KMGT]) of", message):
        return int(float(found[1]) * units[found[2]])
    if found := re.search(r"temporaries \(([\d.]+)([KMGT])\)", message):
        return at_least + int(float(found[1]) * units[found[2]])
    return at_least


def mesh_name(mesh: Mesh) -> str:
    """Gives a mesh's shape as text: "data 4 × model 2"."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def reach_compiler() -> None:
    """Makes libtpu, the TPU's compiler, usable on a machine without a TPU, and quiet.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "preflight: libtpu, the TPU's compiler, is not installed: pip install 'retrieval_jax[tpu]' "
            "(in a checkout: pip install -e '.[tpu]')"
        )
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ |= NO_TPU | {
        "LIBTPU_INIT_ARGS": given if STACK_SIZE in given else f"{STACK_SIZE} {given}".rstrip()
    }
    jax.config.update("jax_platforms", "cpu")


def devices_of(topology: str) -> list[jax.Device]:
    """Gives the devices of a TPU slice, such as "v4:2x2x1", which need not be there."""
    from jax.experimental import topologies

    chip, shape = parse_topology(topology)
    options = {"chip_config_name": chip.config} if chip.config else {}
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(topology, "tpu", **options).devices
