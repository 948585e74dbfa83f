"""The verb `preflight`: does a configuration fit a TPU slice, and how fast could it be? Needs no TPU.

The TPU's own compiler, which libtpu brings to any machine, compiles the very program that `train` would run.
All arrays are shapes; none is ever made.
"""

import dataclasses
import importlib.util
import inspect
import math
import os
import re
import time
from collections.abc import Mapping

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax import storage
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary, round_up
from retrieval_jax.decoding.trie import Trie, build_trie
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError
from retrieval_jax.models.t5 import T5Config
from retrieval_jax.progress import say
from retrieval_jax.search.answer import search as search_verb
from retrieval_jax.search.index import make_index
from retrieval_jax.training import partitioning
from retrieval_jax.training.flops import jaxpr_flops, model_flops
from retrieval_jax.training.hardware import GIB, Chip, slice_of
from retrieval_jax.training.shapes import DocidShape, batch_shapes, docid_shape, trie_shape
from retrieval_jax.training.step import abstract_state, make_train_step
from retrieval_jax.training.train import docid_softmax, train
from retrieval_jax.work import Work

MS_MARCO, T5_VOCABULARY = 8_841_823, 32_128  # what is assumed where there is no collection


@gin.configurable
def preflight(
    topology: str,
    search: bool = False,
    smallest: bool = True,
    passages: int | None = None,
    vocab_size: int | None = None,
    optimization: int = 1,
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
      optimization: the compiler's effort: 1 is 3 to 4 times as fast as its default, 2, within 4% of the peak.

    Times are lower bounds: the matrix products at the chip's published peak, or the state read and written
    once at the bandwidth of its memory, whichever is longer; what chips tell each other is not counted.
    """
    chip, _ = slice_of(topology)
    reach_compiler()
    job = configured(search, passages, vocab_size)
    mesh = partitioning.make_mesh(devices=devices_of(topology))
    try:
        fit = job.fit(topology, mesh, chip.hbm, optimization)
    except DoesNotDivide as error:
        raise UserError(
            f"make_mesh.model_parallelism: on {topology} ({_name(mesh)}) {error}: "
            "set another, or another train.batch_size"
        ) from None
    told = job.facts | {"topology": topology, "mesh": _name(mesh)} | summary(job, fit, chip, mesh.size)
    if smallest:
        told |= smallest_slice(job, chip, mesh, {topology: fit}, optimization)
    return told


@dataclasses.dataclass(frozen=True)
class Job:
    """A program of a configuration, to be compiled for any mesh.

    Attributes:
      shapes: of the training batch.
      trie: of the docids, where their constrained search is the program; atomic docids have none.
      beams: docids a search gives; None: the program is the training step.
      steps: training steps, or None.
      facts: what is told of it.
    """

    model: object
    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    steps: int | None
    facts: dict
    beams: int | None = None
    trie: Trie | None = None

    def given(self, mesh: Mesh) -> dict:
        """What the program is given: name -> tree of shapes with their shardings, in its order."""
        abstract = abstract_state(self.model, mesh, self.shapes)
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

    def held(self, mesh: Mesh) -> dict[str, int]:
        """Bytes of it on each device. Raises DoesNotDivide."""
        return {name: bytes_per_device(tree) for name, tree in self.given(mesh).items()}

    def traced(self, mesh: Mesh) -> jax.stages.Traced:
        """The program: the jitted function that is used in earnest, on shapes."""
        if self.beams is None:
            abstract = abstract_state(self.model, mesh, self.shapes)
            batch = self.given(mesh)["batch"]
            return make_train_step(self.model, mesh, abstract, self.seed).trace(abstract, batch)

        def decode(params, batch, docids):
            if self.trie:
                return self.model.predict_batch_with_aux(params, batch, trie=docids, beams=self.beams)
            return self.model.rank_atomic(params, batch, docids, self.beams, few_unreal=True, mesh=mesh)

        return jax.jit(decode).trace(*self.given(mesh).values())

    def fit(self, where: str, mesh: Mesh, hbm: float, optimization: int | None = None) -> "Fit":
        """Compiles it for a mesh's devices, unless what it is given exceeds their memory by itself.

        Raises DoesNotDivide.
        """
        held = self.held(mesh)
        traced = self.traced(mesh)
        trips = self.trie.length - 1 if self.trie else 1
        fit = Fit(hbm, held, sum(held.values()), jaxpr_flops(traced.jaxpr, trips))
        if fit.peak > hbm:
            return fit
        say(f"{where}: compiling the {self.facts['program']} of {self.facts['model']} for {_name(mesh)} …")
        began = time.monotonic()
        options = {}
        if optimization is not None:
            by_name = jax.__version_info__ >= (0, 11)
            options = {"optimization_level": f"O{optimization}" if by_name else optimization}
        try:
            memory = traced.lower().compile(compiler_options=options).memory_analysis()
            fit = dataclasses.replace(fit, peak=memory.peak_memory_in_bytes, compiled=True)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fit = dataclasses.replace(fit, peak=needed(str(error), fit.peak), exhausted=True)
        fit = dataclasses.replace(fit, seconds=time.monotonic() - began)
        say(f"{where}: {fit.verdict}, after {fit.seconds:.0f} s of compiling")
        return fit


@dataclasses.dataclass(frozen=True)
class Fit:
    """A program on a device, in bytes.

    Attributes:
      hbm: what there is.
      held: name -> what the program is given takes.
      peak: what it takes at most; at least so much where it does not fit.
      flops: of all devices together.
      compiled: whether it was, to its end.
      exhausted: whether the compiler ran out of the device's memory.
      seconds: of compiling.
    """

    hbm: float
    held: dict[str, int]
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
        return f"does not fit: {', '.join(self.held)} alone take {peak}"


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


def summary(job: Job, fit: Fit, chip: Chip, chips: int) -> dict:
    """What the verb tells of a program on a slice."""
    kept = sum(fit.held.values())
    # The state is read, and what training changes is written, at least once.
    changed = fit.held["parameters"] + fit.held["optimizer"] if job.beams is None else 0
    times = {
        "FLOP/s": 1e3 * fit.flops / (chips * chip.flops),
        "memory bandwidth": 1e3 * (kept + changed) / chip.bandwidth,
    }
    bound = max(times, key=times.get)
    temporaries = {}
    if fit.compiled or fit.exhausted:
        temporaries = {"temporaries": round((fit.peak - kept) / GIB, 3)}
    told = {
        "fits": fit.fits,
        "verdict": fit.verdict,
        "peak_gib": round(fit.peak / GIB, 3),
        "hbm_gib": round(fit.hbm / GIB, 3),
        "gib_per_chip": {name: round(n / GIB, 3) for name, n in fit.held.items()} | temporaries,
        "flops_per_step": fit.flops,
        "least_ms_per_step": times[bound],
        "bound_by": bound,
        "least_ms": times,
        "compile_seconds": round(fit.seconds, 1),
    }
    if job.steps:
        told["model_flops_per_step"] = model_flops(job.model, job.shapes)
        told["least_days"] = times[bound] / 1e3 * job.steps / 86400
    return told


def smallest_slice(job: Job, chip: Chip, mesh: Mesh, known: Mapping[str, Fit], optimization: int) -> dict:
    """The smallest slice of a generation that fits: {"smallest", "slices": name -> what became of it}.

    Compiled from small to large. Model parallelism stays as it is where it divides the chips; elsewhere it is
    the greatest number that divides both.
    """
    tried = {}
    for shape in chip.topologies:
        name = f"{chip.name}:{shape}"
        devices = devices_of(name)
        other = partitioning.make_mesh(math.gcd(mesh.shape["model"], len(devices)), devices)
        try:
            kept = sum(job.held(other).values())
        except DoesNotDivide as error:
            tried[name] = {"mesh": _name(other), "fits": False, "why": str(error)}
            continue
        if kept > chip.hbm:
            tried[name] = {"mesh": _name(other), "fits": False, "peak_gib": round(kept / GIB, 3)}
            continue
        fit = known.get(name) or job.fit(name, other, chip.hbm, optimization)
        tried[name] = {"mesh": _name(other), "fits": fit.fits, "peak_gib": round(fit.peak / GIB, 3)}
        if fit.fits:
            return {"smallest": name, "slices": tried}
    return {"smallest": None, "slices": tried}


# --- what is compiled ---


def configured(search: bool, passages: int | None, vocab_size: int | None) -> Job:
    """The program that the gin configuration describes, made as `train` makes its model."""
    settings = _settings(train)
    for name in ("retriever", "optimizer", "source", "data"):
        if name not in settings:
            raise UserError(f"train.{name}: not set: name a run, as --gin_file=runs/naive.gin")
    retriever, data, kind = settings["retriever"], settings["data"], settings["docids"]
    if (retriever.answer == "docids") != bool(kind):
        mend = "--gin.DOCIDS=\"'naive'\"" if retriever.answer == "docids" else "--gin.train.docids=None"
        raise UserError(f"train.docids: {kind!r} does not go with a {retriever.family}: {mend}")
    if search and retriever.answer != "docids":
        raise UserError(f"preflight.search: a {retriever.family} writes no docids: leave it out")

    work = Work.of(settings["source"], settings["work_dir"])
    assumed = passages is not None or vocab_size is not None
    collection = None
    if not assumed and (work.collection / storage.MANIFEST).is_file():
        collection = Collection(work.collection)
    if collection:
        passages, vocab_size = collection.passage_count, Vocabulary(collection.vocabulary_path).size
    passages, vocab_size = passages or MS_MARCO, vocab_size or T5_VOCABULARY
    docids: DocidTable | DocidShape | None = None
    if kind and collection and (work.docids(kind) / storage.MANIFEST).is_file():
        docids = DocidTable.open(work.docids(kind))
    elif kind:
        docids = docid_shape(kind, passages, vocab_size)

    config = T5Config(vocab_size=vocab_size, **(docid_softmax(docids) if docids else {}))
    model = retriever(config, settings["optimizer"]())
    batch_size, beams, trie = settings["batch_size"], None, None
    if search:
        index = _settings(make_index)
        batch_size = index["batch_size"]
        beams = index["beams"] if kind != "atomic" else _settings(search_verb)["k"]
        if isinstance(docids, DocidTable) and kind != "atomic":
            trie, _ = build_trie(docids.tokens_NxL)
        elif kind != "atomic":
            trie = trie_shape(docids, passages)
    shapes = batch_shapes(retriever.answer, data, batch_size, docids.length if docids else None)
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
    return Job(model, shapes, settings["seed"], None if search else settings["steps"], facts, beams, trie)


def _settings(verb) -> dict:
    """The parameters that a verb would be called with."""
    parameters = inspect.signature(verb).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | gin.get_bindings(verb)


# --- the compiler ---


def reach_compiler() -> None:
    """Makes libtpu usable on a machine without a TPU, and quiet. UserError where it is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "preflight: libtpu, the TPU's compiler, is not installed: pip install 'retrieval_jax[tpu]' "
            "(in a checkout: pip install -e '.[tpu]')"
        )
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud which TPU this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it is only the compiler that is shared
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    jax.config.update("jax_platforms", "cpu")


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a slice that is not there."""
    from jax.experimental import topologies

    chip, shape = slice_of(topology)
    options = {"chip_config_name": chip.config} if chip.config else {}
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(topology, "tpu", **options).devices


def _name(mesh: Mesh) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
