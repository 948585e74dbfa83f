"""The verb `preflight`: does a configuration fit a TPU slice, and how fast could it be? Needs no TPU.

The TPU's own compiler, which libtpu brings to any machine, compiles the very program that `train` would run.
All arrays are shapes; none is ever made.
"""

import functools
import math

import gin
import jax

from retrieval_jax.core import configuration, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.mesh import partitioning
from retrieval_jax.mesh.hardware import GIB, Chip, parse_topology
from retrieval_jax.training.aot import (
    DoesNotDivide,
    MemoryReport,
    Program,
    devices_of,
    mesh_name,
    reach_compiler,
)
from retrieval_jax.training.families import family_of
from retrieval_jax.training.flops import model_flops
from retrieval_jax.training.loss_spike_guard import LossSpikeGuard
from retrieval_jax.training.run import make_model
from retrieval_jax.training.shapes import DocidShape, batch_shapes, docid_shape, trie_shape
from retrieval_jax.training.worker_process import WorkerDied, WorkerProcess
from retrieval_jax.verbs.index import make_index
from retrieval_jax.verbs.search import search as search_verb
from retrieval_jax.verbs.table import configure_verbs
from retrieval_jax.verbs.train import train

MS_MARCO, T5_VOCABULARY = 8_841_823, 32_128  # what is assumed where there is no collection


@gin.configurable
def preflight(
    topology: str,
    search: bool = False,
    smallest: bool = True,
    passages: int | None = None,
    vocab_size: int | None = None,
    optimization: int | None = 1,
    price: float | None = None,
) -> dict:
    """Compiles a configuration's training step for a TPU slice, without one: memory, FLOPs, least time.

    Everything else is as `train` is configured: give the same gin files. Needs libtpu: the extra "tpu".

    Args:
      topology: the slice, as "v4:4x4x4"; see gin_configs/tpu/.
      search: the constrained search of a generative retriever instead, with the beams and batch of `index`.
      smallest: also look for the smallest slice of that generation that fits.
      passages: of the collection; None: the collection's that was imported, else 8,841,823 (MS MARCO).
      vocab_size: of the texts; None: the collection's, else 32,128 (T5). A number of passages or of the
        vocabulary makes the docids assumed ones, too.
      optimization: the compiler's effort: 1 takes a third of the time of None, its default, and comes within
        10% of its peak.
      price: of a chip for an hour, in any currency; given, the least cost of the run is told.

    Times are lower bounds: the matrix products at the chip's published peak, or the state read and written
    once at the bandwidth of its memory, whichever is longer; what chips tell each other is not counted.
    """
    parse_topology(topology)
    reach_compiler()
    program = (search, passages, vocab_size)
    # In a process of its own, as the compiler ends that where it fails an assertion of its own.
    with WorkerProcess(_prepare, *configuration.given()) as worker:
        try:
            told, facts = worker(on_slice, topology, program, optimization)
        except WorkerDied as died:
            raise UserError(
                f"preflight: the TPU's compiler itself broke down on {topology} ({died}): set another "
                "preflight.optimization (None is its default effort), or another topology"
            ) from None
        if price is not None and "least_days" in told:
            told["least_cost"] = round(told["least_days"] * 24 * told["chips"] * price, 2)
        if smallest:
            told |= smallest_slice(worker, topology, told, program, optimization)
    return told | facts


def _prepare(files: list[str], bindings: list[str]) -> None:
    """What the compiling process does first."""
    configure_verbs(files, bindings)
    reach_compiler()


def on_slice(topology: str, program: tuple, optimization: int | None) -> tuple[dict, dict]:
    """(What the verb tells of the program on a slice, and of the program.)

    `program` is what `configured` is given.
    """
    job, (chip, _) = _job(*program), parse_topology(topology)
    mesh = partitioning.make_mesh(devices=devices_of(topology))
    try:
        report = job.compile(topology, mesh, chip.hbm, optimization)
    except DoesNotDivide as error:
        raise UserError(
            f"make_mesh.model_parallelism: on {topology} ({mesh_name(mesh)}) {error}: "
            "set another, or another train.batch_size"
        ) from None
    told = {"topology": topology, "mesh": mesh_name(mesh)} | summary(job, report, chip, mesh.size)
    return told, job.facts


def summary(job: Program, report: MemoryReport, chip: Chip, chips: int) -> dict:
    """What the verb tells of a program on a slice."""
    kept = sum(report.argument_bytes.values())
    # The state is read, and what training changes is written, at least once.
    changed = (
        report.argument_bytes["parameters"] + report.argument_bytes["optimizer"] if job.beams is None else 0
    )
    times = {
        "FLOP/s": 1e3 * report.flops / (chips * chip.flops),
        "memory bandwidth": 1e3 * (kept + changed) / chip.bandwidth,
    }
    bound = max(times, key=times.get)
    temporaries = {}
    if report.compiled or report.exhausted:
        temporaries = {"temporaries": round((report.peak - kept) / GIB, 3)}
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
    if job.steps:
        told["model_flops_per_step"] = model_flops(job.model, job.shapes)
        told["least_days"] = times[bound] / 1e3 * job.steps / 86400
    return told


def smallest_slice(
    worker: WorkerProcess, topology: str, told: dict, program: tuple, optimization: int | None
) -> dict:
    """The smallest slice of a generation that fits: {"smallest", "slices": name -> what became of it}.

    `told` is what `on_slice` tells of one of them. They are compiled from small to large, but none that is
    smaller than one that does not fit. One on which the compiler breaks down is passed over.
    """
    chip, shape = parse_topology(topology)
    shapes = chip.topologies if told["fits"] else chip.topologies[chip.topologies.index(shape) :]
    tried = {}
    for name in (f"{chip.name}:{shape}" for shape in shapes):
        if name == topology:
            tried[name] = {key: told[key] for key in ("mesh", "fits", "peak_gib")}
        else:
            try:
                tried[name] = worker(try_slice, name, program, optimization)
            except WorkerDied as died:
                tried[name] = {"fits": False, "why": f"the compiler itself broke down ({died})"}
        if tried[name]["fits"]:
            return {"smallest": name, "slices": tried}
    return {"smallest": None, "slices": tried}


def try_slice(name: str, program: tuple, optimization: int | None) -> dict:
    """What became of a slice that was not asked for: {"mesh", "fits", "peak_gib" or "why"}.

    Model parallelism stays as it is where it divides the chips; elsewhere it is the greatest number that
    divides both.
    """
    job, (chip, _) = _job(*program), parse_topology(name)
    devices = devices_of(name)
    parallelism = configuration.parameters_of(partitioning.make_mesh)["model_parallelism"]
    mesh = partitioning.make_mesh(math.gcd(parallelism, len(devices)), devices)
    told = {"mesh": mesh_name(mesh), "fits": False}
    try:
        kept = sum(job.argument_bytes(mesh).values())
    except DoesNotDivide as error:
        return told | {"why": str(error)}
    if kept > chip.hbm:
        return told | {"peak_gib": round(kept / GIB, 3)}
    report = job.compile(name, mesh, chip.hbm, optimization)
    return told | {"fits": report.fits, "peak_gib": round(report.peak / GIB, 3)}


def configured(search: bool, passages: int | None, vocab_size: int | None) -> Program:
    """The program that the gin configuration describes, made as `train` makes its model."""
    settings = configuration.parameters_of(train)
    for name in ("retriever", "optimizer", "source", "data"):
        if name not in settings:
            raise UserError(f"train.{name}: not set: name a run, as --gin_file=runs/naive.gin")
    retriever, data, kind = settings["retriever"], settings["data"], settings["docids"]
    if retriever.writes_docids != bool(kind):
        hint = "--DOCIDS=naive" if retriever.writes_docids else "--gin.train.docids=None"
        raise UserError(f"train.docids: {kind!r} does not go with a {retriever.family}: {hint}")
    if search and not retriever.writes_docids:
        raise UserError(f"preflight.search: a {retriever.family} writes no docids: leave it out")
    for name, value in (("passages", passages), ("vocab_size", vocab_size)):
        if value is not None and value < 1:
            raise UserError(f"preflight.{name}: {value} is too few: set at least 1")

    work = Workspace.for_source(settings["source"], settings["work_dir"])
    assumed = passages is not None or vocab_size is not None
    collection = None
    if not assumed and storage.finished(work.collection):
        collection = Collection(work.collection)
    if collection:
        passages, vocab_size = collection.passage_count, Vocabulary(collection.vocabulary_path).size
    passages, vocab_size = passages or MS_MARCO, vocab_size or T5_VOCABULARY
    docids: DocidTable | DocidShape | None = None
    if kind and collection and storage.finished(work.docids(kind)):
        docids = DocidTable.open(work.docids(kind))
    elif kind:
        docids = docid_shape(kind, passages, vocab_size)

    model = make_model(retriever, settings["optimizer"], vocab_size, docids)
    batch_size, beams, trie = settings["batch_size"], None, None
    if search:
        index = configuration.parameters_of(make_index)
        batch_size = index["batch_size"]
        beams = index["beams"] if kind != "atomic" else configuration.parameters_of(search_verb)["k"]
        if isinstance(docids, DocidTable) and kind != "atomic":
            trie, _ = build_trie(docids.tokens_NxL)
        elif kind != "atomic":
            trie = trie_shape(docids, passages)
    shapes = batch_shapes(
        family_of(retriever).target_type, data, batch_size, docids.length if docids else None
    )
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes)["params"])
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(variables))
    read = {name: shape for name, shape in shapes.items() if not search or name == "encoder_input_tokens"}
    facts = {
        "program": "search" if search else "training step",
        "model": f"{retriever.__name__} of {count:,} parameters",
        "batch": {name: "×".join(map(str, shape)) for name, shape in read.items()},
        "passages": passages,
        "vocabulary": vocab_size,
        "collection": str(work.collection) if collection else "assumed",
    }
    if docids:
        where = str(work.docids(kind)) if isinstance(docids, DocidTable) else "assumed"
        facts["docids"] = f"{kind}, {docids.length} tokens, {docids.output_size:,} outputs ({where})"
    steps, skips = (
        None if search else settings["steps"],
        configuration.parameters_of(LossSpikeGuard).get("on_spike") == "skip",
    )
    return Program(model, shapes, settings["seed"], steps, facts, beams, trie, skips)


@functools.lru_cache(1)
def _job(*program) -> Program:
    """`configured`, once for all slices."""
    return configured(*program)
