"""Ahead-of-time compilation: a program for devices that need not be there; what it takes of their memory."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import NO_TPU, log
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.mesh import partitioning
from retrieval_jax.mesh.hardware import GIB, parse_topology
from retrieval_jax.training.flops import jaxpr_flops
from retrieval_jax.training.step import TrainState, abstract_state, make_train_step

# Its threads' stacks of 64 KiB overflow while it weighs the tilings of XL's matrix products on v5e.
STACK_SIZE = f"--fibers_default_thread_stack_size={1 << 20}"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program of a configuration, to be compiled for any mesh.

    Attributes:
      shapes: of the training batch.
      trie: of the docids, where their constrained search is the program; atomic docids have none.
      beams: docids a search gives; None: the program is the training step.
      steps: training steps, or None.
      facts: what is told of it.
      skips: whether the training step may skip its update; see `make_train_step`.
    """

    model: object
    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    steps: int | None
    facts: dict
    beams: int | None = None
    trie: Trie | None = None
    skips: bool = False

    def arguments(self, mesh: Mesh) -> dict:
        """What the program is given: name -> tree of shapes with their shardings, in its order."""
        abstract = _state(self, mesh)
        rows = partitioning.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name, shape in self.shapes.items()
        }
        if self.beams is None:
            return {"parameters": abstract.params, "optimizer": abstract.optimizer, "batch": batch}
        count, length = self.shapes["encoder_input_tokens"]
        shape = (round_up(count, mesh.shape["data"]), length)  # as GenerativeSearcher does
        batch = {"encoder_input_tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)}
        if self.trie:
            place, docids = PartitionSpec(), self.trie
        else:  # atomic: which of the outputs name a docid
            place = PartitionSpec("model")
            docids = jax.ShapeDtypeStruct((self.model.config.output_size,), bool)
        place = NamedSharding(mesh, place)
        docids = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), docids)
        return {"parameters": abstract.params, "batch": batch, "docids": docids}

    def argument_bytes(self, mesh: Mesh) -> dict[str, int]:
        """Bytes of it on each device. Raises DoesNotDivide."""
        return {name: bytes_per_device(tree) for name, tree in self.arguments(mesh).items()}

    def traced(self, mesh: Mesh) -> jax.stages.Traced:
        """The program: the jitted function that is used in earnest, on shapes."""
        if self.beams is None:
            state = _state(self, mesh)
            step = make_train_step(self.model, mesh, state, self.seed, skips=self.skips)
            limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=state.step.sharding)
            return step.trace(state, self.arguments(mesh)["batch"], *[limit] * self.skips)

        def decode(params, batch, docids):
            if self.trie:
                return self.model.predict_batch_with_aux(
                    params, batch, trie=docids, beams=self.beams, mesh=mesh
                )
            return self.model.rank_atomic(params, batch, docids, self.beams, mesh)

        return jax.jit(decode).trace(*self.arguments(mesh).values())

    def compile(self, where: str, mesh: Mesh, hbm: float, optimization: int | None = None) -> "MemoryReport":
        """Compiles it for a mesh's devices, unless what it is given exceeds their memory by itself.

        Raises DoesNotDivide.
        """
        argument_bytes = self.argument_bytes(mesh)
        traced = self.traced(mesh)
        trips = self.trie.length - 1 if self.trie else 1  # of the search's loop, at most
        report = MemoryReport(
            hbm, argument_bytes, sum(argument_bytes.values()), jaxpr_flops(traced.jaxpr, trips)
        )
        if report.peak > hbm:
            return report
        log(
            f"{where}: compiling the {self.facts['program']} of {self.facts['model']} for {mesh_name(mesh)} …"
        )
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
        log(f"{where}: {report.verdict}, after {report.seconds:.0f} s of compiling")
        return report


@functools.lru_cache(1)  # of 11 billion parameters it takes seconds
def _state(program: Program, mesh: Mesh) -> TrainState:
    return abstract_state(program.model, mesh, program.shapes)


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """A program on a device, in bytes.

    Attributes:
      hbm: what there is.
      argument_bytes: name -> what the program is given takes.
      peak: what it takes at most; at least so much where it does not fit.
      flops: of all devices together.
      compiled: whether it was, to its end.
      exhausted: whether the compiler ran out of the device's memory.
      seconds: of compiling.
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
        return self.compiled and self.peak <= self.hbm

    @property
    def verdict(self) -> str:
        peak = f"{self.peak / GIB:.2f} of {self.hbm / GIB:.2f} GiB a chip"
        spare = (self.hbm - self.peak) / GIB
        if self.fits:
            return f"fits: {peak}, {spare:.2f} to spare"
        if self.compiled or self.exhausted:
            return f"does not fit: {peak}, {-spare:.2f} too many"
        return f"does not fit: {', '.join(self.argument_bytes)} alone take {peak}"


def needed(message: str, at_least: int) -> int:
    """Bytes that a program needs, as the TPU compiler's RESOURCE_EXHAUSTED tells, if it does."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    if found := re.search(r"Used ([\d.]+)([KMGT]) of", message):
        return int(float(found[1]) * units[found[2]])
    if found := re.search(r"temporaries \(([\d.]+)([KMGT])\)", message):
        return at_least + int(float(found[1]) * units[found[2]])
    return at_least


def bytes_per_device(tree: object) -> int:
    """What a tree of shapes with shardings takes on one device, without padding. Raises DoesNotDivide."""
    total = 0
    for x in jax.tree.leaves(tree):
        try:
            total += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        except ValueError:
            shape = "×".join(map(str, x.shape))
            raise DoesNotDivide(f"an array of {shape} does not divide as {x.sharding.spec}") from None
    return total


class DoesNotDivide(Exception):
    """A mesh on which an array cannot lie as the configuration says."""


def mesh_name(mesh: Mesh) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def reach_compiler() -> None:
    """Makes libtpu usable on a machine without a TPU, and quiet. UserError where it is not installed."""
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
    """The devices of a slice that is not there."""
    from jax.experimental import topologies

    chip, shape = parse_topology(topology)
    options = {"chip_config_name": chip.config} if chip.config else {}
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(topology, "tpu", **options).devices
