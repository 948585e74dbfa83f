"""The verb `preflight`: does a configuration fit a TPU slice, and how fast could it be? It needs no TPU.

The TPU's own compiler, which libtpu brings to any machine, compiles the very program that `train` would run:
`plan_train_step` plans both, from the values that `TrainConfig` takes from gin. Arrays are only shapes; none
is ever made.
"""

import functools
import inspect
import math
from collections.abc import Callable

import gin
import jax
from jax.sharding import Mesh

from retrieval_jax.core import configuration, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.decoding.bonuses import Planning
from retrieval_jax.docids import token_sets
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.docids.table import DocidShape, DocidTable
from retrieval_jax.docids.token_sets import SetShape
from retrieval_jax.mesh import partitioning
from retrieval_jax.mesh.hardware import GIB, Tpu, parse_topology
from retrieval_jax.training.aot import devices_of, mesh_name, reach_compiler
from retrieval_jax.training.families import family_of
from retrieval_jax.training.program import DoesNotDivide, Program, plan_search, plan_train_step
from retrieval_jax.training.shapes import batch_shapes
from retrieval_jax.training.slices import Plan, smallest_slice, summary
from retrieval_jax.training.slow_shapes import slow_search, slow_training
from retrieval_jax.training.worker_process import WorkerDied, WorkerProcess
from retrieval_jax.verbs.index import IndexConfig
from retrieval_jax.verbs.sets import make_sets
from retrieval_jax.verbs.table import configure_verbs
from retrieval_jax.verbs.train import TrainConfig, sized_config

MS_MARCO, T5_VOCABULARY = 8_841_823, 32_128  # what is assumed where there is no collection


@gin.configurable
def preflight(
    topology: str,
    search: bool = False,
    smallest: bool = True,
    k: Positive = 100,
    passages: int | None = None,
    vocab_size: int | None = None,
    optimization: int | None = 1,
    price: float | None = None,
) -> dict:
    """Compiles a training step for a TPU slice, without one: memory, FLOPs, least time.

    It is the step that `retrieval-jax train` would run with the same gin files. Times are lower bounds: the
    matrix products at the chip's published peak FLOP/s, or the state read and written once at the bandwidth
    of its memory, whichever takes longer. Communication between chips is not counted. `warnings` names the
    settings whose shapes waste a good part of the step, with what they waste and a remedy. Needs libtpu (the
    extra "tpu").

    Args:
      topology: the slice, such as "v4:4x4x4"; see gin_configs/tpu/.
      search: whether to compile the search of a generative retriever instead, with the beams and the batch
        size of `retrieval-jax index`.
      smallest: whether to look for the smallest slice of the same generation that fits, too.
      k: the number of passages that a search finds for a query.
      passages: the number of passages; None for those of the imported collection, else 8,841,823 (MS MARCO).
      vocab_size: the size of the text vocabulary; None for the collection's, else 32,128 (T5's). If this or
        the number of passages is set, the sizes of the docids are assumed, too.
      optimization: the compiler's effort. 1 takes a third of the time of None, which is the compiler's
        default, and comes within 10% of its peak memory.
      price: the price of a chip for an hour, in any currency, to compute the least cost of the run.

    Returns:
      What was compiled, whether it fits the slice, its memory, FLOPs and least times, `warnings`, and the
      smallest slice that fits.

    Raises:
      UserError: the compiler breaks down on the slice, the mesh does not divide the arrays, or the values do
        not go together.
    """
    parse_topology(topology)
    reach_compiler()
    program = (search, passages, vocab_size, k)
    # The compiler ends its process if one of its own assertions fails: it gets a process of its own.
    with WorkerProcess(_prepare, *configuration.given()) as worker:
        try:
            told, facts, parallelism = worker(on_slice, topology, program, optimization)
        except WorkerDied as died:
            raise UserError(
                f"preflight: the TPU's compiler itself broke down on {topology} ({died}): set another "
                "preflight.optimization (None is its default effort), or another topology"
            ) from None
        if price is not None and "least_days" in told:
            told["least_cost"] = round(told["least_days"] * 24 * told["chips"] * price, 2)
        if smallest:
            measure_slice = functools.partial(
                worker, try_slice, program=program, parallelism=parallelism, optimization=optimization
            )
            told |= smallest_slice(measure_slice, topology, told)
    return told | facts


def _prepare(files: list[str], bindings: list[str]) -> None:
    """Prepares the compiling process."""
    configure_verbs(files, bindings)
    reach_compiler()


def on_slice(topology: str, program: tuple, optimization: int | None) -> tuple[dict, dict, int]:
    """Measures a program on the slice that was asked for.

    Args:
      topology: the slice.
      program: the arguments of `configured`.
      optimization: the compiler's effort.

    Returns:
      (what the verb says of the program on the slice, what it says of the program, the mesh's model
      parallelism).
    """
    plan, (chip, _) = _plan(*program), parse_topology(topology)
    mesh = partitioning.make_mesh(devices=devices_of(topology))
    try:
        report = plan.measure(topology, mesh, chip.hbm, optimization)
    except DoesNotDivide as error:
        raise UserError(
            f"make_mesh.model_parallelism: on {topology} ({mesh_name(mesh)}) {error}: "
            "set another, or another train.batch_size"
        ) from None
    told = {"topology": topology, "mesh": mesh_name(mesh)} | summary(plan, report, chip, mesh.size)
    told["warnings"] = plan.slow(mesh, chip, told["least_ms"])
    return told, plan.facts, mesh.shape["model"]


def try_slice(name: str, program: tuple, parallelism: int, optimization: int | None) -> dict:
    """Measures a program on a slice that was not asked for.

    Args:
      name: the slice.
      program: the arguments of `configured`.
      parallelism: the model parallelism of the slice that was asked for. Where it does not divide the chips,
        the greatest number that divides both is taken.
      optimization: the compiler's effort.

    Returns:
      {"mesh", "fits", and "peak_gib" or "why"}.
    """
    plan, (chip, _) = _plan(*program), parse_topology(name)
    devices = devices_of(name)
    mesh = partitioning.make_mesh(math.gcd(parallelism, len(devices)), devices)
    told = {"mesh": mesh_name(mesh), "fits": False}
    try:
        arguments = sum(plan.program(mesh).argument_bytes().values())
    except DoesNotDivide as error:
        return told | {"why": str(error)}
    if arguments > chip.hbm:
        return told | {"peak_gib": round(arguments / GIB, 3)}
    report = plan.measure(name, mesh, chip.hbm, optimization)
    return told | {"fits": report.fits, "peak_gib": round(report.peak / GIB, 3)}


def configured(search: bool, passages: int | None, vocab_size: int | None, k: int = 100) -> Plan:
    """Plans the program that gin configures: the training step that `train` would run, or a search."""
    config = TrainConfig()
    _check(config, search, passages, vocab_size)
    work = Workspace.for_source(config.source, config.work_dir)
    assumed = passages is not None or vocab_size is not None
    collection = None
    if not assumed and storage.finished(work.collection):
        collection = Collection(work.collection)
        passages, vocab_size = collection.passage_count, Vocabulary(collection.vocabulary_path).size
    passages, vocab_size = passages or MS_MARCO, vocab_size or T5_VOCABULARY
    with sized_config(passages) as config:
        return _configured(config, work, collection, search=search, sizes=(passages, vocab_size, k))


def _configured(
    config: TrainConfig,
    work: Workspace,
    collection: Collection | None,
    *,
    search: bool,
    sizes: tuple[int, int, int],
) -> Plan:
    """Plans a program for a collection, or, where that is None, for one of these sizes."""
    retriever, kind = config.retriever, config.docids
    passages, vocab_size, k = sizes
    docids: DocidTable | DocidShape | None = None
    if kind and collection and storage.finished(work.docids(kind)):
        docids = DocidTable.open(work.docids(kind))
    elif kind:
        docids = docid_kind(kind).shape(passages, vocab_size)

    model, rules = config.make_model(vocab_size, docids), partitioning.axis_rules()
    docid_length = docids.length if docids else None
    target_type = family_of(retriever).targets_for(config.data)
    sets = _set_shape(config.data.sets, work, collection)
    shapes = batch_shapes(target_type, config.data, config.batch_size, docid_length, sets)
    if search:
        sets = _set_shape(_sets_to_search(model, work, collection), work, collection)
        program, inputs, slow = _plan_search(model, config, docids, sets, passages, k)
    else:
        inputs, microbatches = shapes, config.settings.microbatches

        def slow(mesh: Mesh, chip: Tpu, least_ms: dict) -> list[str]:
            return slow_training(model, shapes, mesh, rules, microbatches, chip, least_ms)

        def program(mesh: Mesh) -> Program:
            return plan_train_step(model, shapes, config.settings, mesh, rules=rules)

    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes)["params"])
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(variables))
    facts = {
        "program": "search" if search else "training step",
        "model": f"{retriever.__name__} of {count:,} parameters",
        "batch": {name: "×".join(map(str, shape)) for name, shape in inputs.items()},
        "passages": passages,
        "vocabulary": vocab_size,
        "collection": str(work.collection) if collection else "assumed",
    }
    if docids:
        where = str(work.docids(kind)) if isinstance(docids, DocidTable) else "assumed"
        facts["docids"] = f"{kind}, {docids.length} tokens, {docids.output_size:,} outputs ({where})"
    return Plan(program, model, shapes, None if search else config.steps, facts, slow)


def _check(config: TrainConfig, search: bool, passages: int | None, vocab_size: int | None) -> None:
    """Raises UserError where the values of the verb and of `train` do not go together."""
    retriever, kind = config.retriever, config.docids
    if retriever.writes_docids != bool(kind):
        hint = "--DOCIDS=naive" if retriever.writes_docids else "--gin.train.docids=None"
        raise UserError(f"train.docids: {kind!r} does not go with a {retriever.family}: {hint}")
    if search and not retriever.writes_docids:
        raise UserError(f"preflight.search: a {retriever.family} writes no docids: leave it out")
    for name, value in (("passages", passages), ("vocab_size", vocab_size)):
        if value is not None and value < 1:
            raise UserError(f"preflight.{name}: {value} is too few: set at least 1")


def _sets_to_search(model, work: Workspace, collection: Collection | None) -> str | None:
    """Gives the name of the sets that `index` would take; None for a search without a plan."""
    index = IndexConfig()
    plans = index.kind == "planned"
    if not model.config.lexical_head:
        if plans:
            raise UserError(
                "make_index.kind: 'planned', and the model has no lexical head: T5Config.lexical_head"
            )
        return None
    if index.sets or not plans:
        return index.sets
    if collection and token_sets.finished(work):
        return token_sets.chosen(work, None).name
    return "none-yet"  # of the shape of those that `sets` would make


def _set_shape(name: str | None, work: Workspace, collection: Collection | None) -> SetShape | None:
    """Gives the shape of sets, on disk or of those that `sets` would make; None without a name."""
    if not name:
        return None
    if collection and storage.finished(work.sets(name)):
        facts = storage.read_manifest(work.sets(name), "sets")
        return SetShape(facts["m"], facts["impacts"])
    parameters, given = inspect.signature(make_sets).parameters, gin.get_bindings(make_sets)
    return SetShape(*(given.get(name, parameters[name].default) for name in ("m", "impacts")))


def _plan_search(
    model,
    config: TrainConfig,
    docids: DocidTable | DocidShape,
    sets: SetShape | None,
    passages: int,
    k: int,
) -> tuple[Callable[[Mesh], Program], dict, Callable]:
    """Plans the search of a searcher that `index` makes.

    Returns:
      (program, shape of the inputs by name, `Plan.slow`).
    """
    strategy, outputs = docid_kind(config.docids).search, model.config.outputs
    if isinstance(docids, DocidTable):
        arrays, first_N = strategy.build(docids, outputs)
        planned = strategy.planned_docids(docids, arrays, first_N) if sets else None
    else:
        arrays = strategy.abstract(docids, passages, outputs)
        planned = strategy.abstract_planned_docids(docids, passages)
    settings, rules, length = IndexConfig(), partitioning.axis_rules(), config.data.input_length

    def planning(shards: int) -> Planning | None:
        if not sets:
            return None
        sizes = passages, outputs, model.config.vocab_size, sets, min(settings.plan_size, passages)
        return strategy.abstract_planning(planned, *sizes, shards)

    def program(mesh: Mesh) -> Program:
        return plan_search(
            *(model, length, strategy, arrays),
            settings=settings,
            k=k,
            mesh=mesh,
            rules=rules,
            planning=planning(mesh.shape["data"]),
        )

    def slow(mesh: Mesh, chip: Tpu, least_ms: dict) -> list[str]:
        hypotheses = settings.beams if strategy.steps(arrays) > 1 else 1
        return slow_search(model.config, settings.batch_size, hypotheses, mesh, rules, chip)

    return program, {"encoder_input_tokens": (settings.batch_size, length)}, slow


@functools.lru_cache(1)
def _plan(*program) -> Plan:
    """`configured`, once for all slices."""
    return configured(*program)
