"""A program on TPU slices: what the compiler says of it on each, and the smallest slice that fits."""

import dataclasses
from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from retrieval_jax.mesh.hardware import GIB, Tpu, parse_topology
from retrieval_jax.training.aot import MemoryReport, measure, mesh_name
from retrieval_jax.training.flops import model_flops
from retrieval_jax.training.program import Program
from retrieval_jax.training.worker_process import WorkerDied


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program that is not yet planned for a mesh.

    Attributes:
      program: plans it for a mesh.
      model, shapes: the model, and the shapes of a training batch's arrays.
      steps: number of training steps of the run; None: the program is a search.
      facts: what the verb says of the program.
      slow: gives the lines of slow_shapes.py for a mesh, its kind of chip, and `summary`'s "least_ms".
    """

    program: Callable[[Mesh], Program]
    model: object
    shapes: Mapping[str, tuple[int, ...]]
    steps: int | None
    facts: dict
    slow: Callable[[Mesh, Tpu, dict], list[str]]

    def measure(self, where: str, mesh: Mesh, hbm: float, optimization: int | None = None) -> MemoryReport:
        """Compiles the program for a mesh of devices with `hbm` bytes of memory each; see `aot.measure`."""
        title = (
            f"{where}: compiling the {self.facts['program']} of {self.facts['model']} for {mesh_name(mesh)}"
        )
        return measure(self.program(mesh), hbm, title, optimization)


def summary(plan: Plan, report: MemoryReport, chip: Tpu, chips: int) -> dict:
    """Sums up what the compiler says of a program on a slice.

    Args:
      plan: the program.
      report: its memory and FLOPs, from `Plan.measure`.
      chip: the slice's generation.
      chips: the number of chips.

    Returns:
      What `retrieval-jax preflight` prints: sizes in GiB, times in ms (lower bounds), days of the whole run.
    """
    arguments = sum(report.argument_bytes.values())
    # The state is read, and what training changes is written, at least once.
    changed = (
        report.argument_bytes["parameters"] + report.argument_bytes["optimizer"]
        if plan.steps is not None
        else 0
    )
    times = {
        "FLOP/s": 1e3 * report.flops / (chips * chip.flops),
        "memory bandwidth": 1e3 * (arguments + changed) / chip.bandwidth,
    }
    bound = max(times, key=times.get)
    temporaries = {}
    if report.compiled or report.exhausted:
        temporaries = {"temporaries": round((report.peak - arguments) / GIB, 3)}
    told = {
        "chips": chips,
        "verdict": report.verdict,
        "fits": report.fits,
        "peak_gib": round(report.peak / GIB, 3),
        "hbm_gib": round(report.hbm / GIB, 3),
        "gib_per_chip": {name: round(n / GIB, 3) for name, n in report.argument_bytes.items()} | temporaries,
        "flops_per_step": report.flops,
        "least_ms_per_step": times[bound],
        "bound_by": bound,
        "least_ms": times,
        "compile_seconds": round(report.seconds, 1),
    }
    if plan.steps is not None:
        told["model_flops_per_step"] = model_flops(plan.model, plan.shapes)
        told["least_days"] = times[bound] / 1e3 * plan.steps / 86400
    return told


def smallest_slice(measure_slice: Callable[[str], dict], topology: str, told: dict) -> dict:
    """Looks for the smallest slice of a generation that fits.

    Slices are compiled from small to large, but none that is smaller than one that does not fit. A slice on
    which the compiler breaks down is passed over.

    Args:
      measure_slice: `try_slice` of a slice's name; raises WorkerDied where the compiler breaks down.
      topology: the slice that was asked for.
      told: what `on_slice` says of it.

    Returns:
      {"smallest": its name or None, "slices": name -> what became of each}.
    """
    chip, shape = parse_topology(topology)
    shapes = chip.topologies if told["fits"] else chip.topologies[chip.topologies.index(shape) :]
    tried = {}
    for name in (f"{chip.name}:{shape}" for shape in shapes):
        if name == topology:
            tried[name] = {key: told[key] for key in ("mesh", "fits", "peak_gib")}
        else:
            try:
                tried[name] = measure_slice(name)
            except WorkerDied as died:
                tried[name] = {"fits": False, "why": f"the compiler itself broke down ({died})"}
        if tried[name]["fits"]:
            return {"smallest": name, "slices": tried}
    return {"smallest": None, "slices": tried}
