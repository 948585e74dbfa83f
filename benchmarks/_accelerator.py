"""The parts of accelerator.py, in the process that measures them. Each function returns a part's figures."""

import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable

import _quiet  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _cost import BASE, arbitrary, arbitrary_params, measure_atomic, measure_base, random_queries
from _docids import T5_SIZE, kinds
from jax.sharding import NamedSharding, PartitionSpec

from retrieval_jax.core.progress import log
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.atomic import DocidTokens
from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.docids.search_strategies import SoftmaxSearch
from retrieval_jax.examples.features import Feature
from retrieval_jax.examples.packing import NAMES, row_lengths
from retrieval_jax.mesh.hardware import GIB, find_chip
from retrieval_jax.mesh.partitioning import DEFAULT_RULES, batch_sharding, make_mesh
from retrieval_jax.models.contrastive import joint_lh
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.exact import ExactSearch
from retrieval_jax.search.generative import search_function
from retrieval_jax.training.flops import matmul_flops, model_flops
from retrieval_jax.training.optimizers import adafactor
from retrieval_jax.training.program import plan_train_step
from retrieval_jax.training.settings import TrainSettings
from retrieval_jax.training.step import initial_state


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured. Rows are those of one device, where it has 60 GiB or more."""

    networks: dict[str, T5Config]
    rows: dict[str, int]
    passages: int = 8_841_823
    dimensions: int = 768
    queries: int = 64
    k: int = 100
    row_length: int = 128
    pack: int = 8  # queries of 16 tokens
    docid_length: int = 7
    pairs: int = 1 << 16
    pair_lengths: tuple[int, int] = (32, 128)
    seconds: float = 6  # to repeat something for
    repetitions: int = 3


# As in gin_configs/models/.
LARGE = T5Config(T5_SIZE, 1024, 16, 64, 2816, 24, 24, dtype="bfloat16", scan_layers=True, remat="dots")
FULL = Sizes({"base": BASE, "large": LARGE}, {"base": 256, "large": 128, "encoding": 1024, "chunk": 512})
_SMALL = T5Config(T5_SIZE, 32, 2, 16, 64, 1, 1, dtype="bfloat16")
TINY = Sizes(
    {"base": _SMALL, "large": dataclasses.replace(_SMALL, scan_layers=True, remat="dots")},
    {"base": 4, "large": 4, "encoding": 4, "chunk": 4},
    passages=1000,
    dimensions=64,
    queries=2,
    k=10,
    row_length=32,
    pack=2,
    pairs=16,
    pair_lengths=(8, 16),
    seconds=0.05,
    repetitions=1,
)


def device() -> dict:
    first = jax.devices()[0]
    chip = find_chip(first.device_kind)
    facts = {"kind": first.device_kind, "count": jax.device_count(), "jax": jax.__version__}
    log(f"{facts['count']} × {facts['kind']}, JAX {jax.__version__}, chip {chip.name if chip else 'unknown'}")
    return facts | {"peak_flops": chip.flops if chip else None, "memory_gib": memory_gib("bytes_limit")}


def memory_gib(key: str) -> float | None:
    memory = jax.local_devices()[0].memory_stats() or {}
    return memory[key] / GIB if key in memory else None


def share_of_peak(flops: float, seconds: float) -> float | None:
    chip = find_chip(jax.devices()[0].device_kind)
    return flops / (seconds * chip.flops * jax.device_count()) if chip else None


def rows_for_memory(rows: int) -> int:
    """Rows to begin with, on a device that may have less than 60 GiB."""
    memory = memory_gib("bytes_limit") or 60
    while rows > 1 and memory < 56:
        rows, memory = rows // 2, 2 * memory
    return rows


def where_it_fits(measure: Callable[[int], dict], rows: int) -> dict:
    """Calls measure(rows), with half as many rows until the memory suffices."""
    while True:
        try:
            return measure(rows)
        except jax.errors.JaxRuntimeError as error:
            if rows == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
        # Only now, as the error holds the arrays.
        gc.collect()
        rows //= 2
        log(f"the memory does not suffice: {rows} rows")


def compiled(function: Callable, *arguments) -> tuple[Callable, float]:
    """(the function, compiled for arguments or their shapes; the seconds it took)."""
    began = time.perf_counter()
    made = function.lower(*arguments).compile()
    return made, time.perf_counter() - began


def seconds_of(run: Callable[[], object], at_least: float) -> float:
    """The median of repeated calls, each of which ends with its results on the host."""
    run()
    times: list[float] = []
    while sum(times) < at_least and len(times) < 100:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def fetch(tree: object) -> None:
    """Waits for small arrays by reading them, on which every platform keeps its word."""
    jax.tree.map(np.asarray, tree)


# --- training ---


def train(sizes: Sizes, name: str) -> dict:
    return where_it_fits(
        functools.partial(train_rows, sizes, sizes.networks[name]), rows_for_memory(sizes.rows[name])
    )


def train_rows(sizes: Sizes, config: T5Config, rows: int) -> dict:
    mesh = make_mesh()
    model = GenerativeRetriever(config, adafactor(optax.constant_schedule(1e-3)))
    batch = packed_batch(sizes, config, rows * mesh.size)
    shapes = {name: array.shape for name, array in batch.items()}
    program = plan_train_step(model, shapes, TrainSettings(random_bits="rbg"), mesh)
    step, compile_seconds = compiled(program.function, *program.arguments)
    state = initial_state(model, program.arguments[0], shapes, 0)
    placed = jax.device_put(batch, batch_sharding(mesh))
    losses = []

    def run() -> None:
        nonlocal state
        state, metrics = step(state, placed)  # the old state's memory is given away
        losses.append(float(metrics["loss"]))

    seconds = seconds_of(run, sizes.seconds)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"losses {losses[:3]} … {losses[-3:]}")
    return {
        "steps_per_second": 1 / seconds,
        "mfu": share_of_peak(model_flops(model, shapes), seconds),
        "examples_per_second": rows * mesh.size * sizes.pack / seconds,
        "rows_per_device": rows,
        "peak_gib": memory_gib("peak_bytes_in_use"),
        "compile_seconds": compile_seconds,
    }


def packed_batch(sizes: Sizes, config: T5Config, rows: int) -> dict[str, np.ndarray]:
    """Rows without padding, of `pack` examples each: random tokens."""
    features = {"inputs": Feature(sizes.row_length), "targets": Feature(sizes.docid_length)}
    lengths = row_lengths(features, sizes.pack, sizes.docid_length)
    rng, batch = np.random.default_rng(0), {}
    for side, length in zip(("encoder", "decoder"), lengths, strict=True):
        example = np.arange(length) * sizes.pack // length
        first = np.searchsorted(example, np.arange(sizes.pack))
        for name in NAMES[side]:
            if name.endswith("tokens"):
                batch[name] = rng.integers(2, config.vocab_size, (rows, length), dtype=np.int32)
            else:
                of_row = {"ids": 1 + example, "positions": np.arange(length) - first[example]}
                row = of_row.get(name.rpartition("_")[2], np.ones(length))
                batch[name] = np.tile(row.astype(np.int32), (rows, 1))
    return batch


# --- docids ---


def beam(sizes: Sizes, kind: str) -> dict:
    began = time.perf_counter()
    docids = kinds(None)[kind](sizes.passages)
    made = time.perf_counter()
    trie, _ = build_trie(docids.tokens_NxL)
    facts = {"table_seconds": made - began, "trie_seconds": time.perf_counter() - made}
    size = sum(array.nbytes for array in jax.tree.leaves(trie))
    config = dataclasses.replace(
        sizes.networks["base"], output_size=docids.output_size, separate_target_embedding=True
    )
    del docids
    figures = measure_base(trie, config, sizes.repetitions, round_up(sizes.queries, jax.device_count()))
    return figures | facts | {"trie_gib": size / GIB, "peak_gib": memory_gib("peak_bytes_in_use")}


def atomic(sizes: Sizes) -> dict:
    return where_it_fits(functools.partial(atomic_queries, sizes), sizes.queries)


def atomic_queries(sizes: Sizes, queries: int) -> dict:
    # Only the docids' softmax lies over all devices, by which heads need not divide.
    rules = [(name, axes if name in ("batch", "vocab") else None) for name, axes in DEFAULT_RULES]
    mesh, count = make_mesh(model_parallelism=jax.device_count()), sizes.passages
    output_size = round_up(count + 1, 128 * jax.device_count())
    # The target embedding would be as large as the softmax, and a search reads one row of it.
    model = GenerativeRetriever(dataclasses.replace(sizes.networks["base"], output_size=output_size))
    params = arbitrary_params(model, mesh, rules)
    rows_V = np.arange(output_size, dtype=np.int32) - 1
    docids = DocidTokens(np.where(rows_V < count, rows_V, -1))
    docids = jax.device_put(docids, NamedSharding(mesh, PartitionSpec(*SoftmaxSearch.mesh_axes)))
    batch = {"encoder_input_tokens": jax.device_put(random_queries(queries), batch_sharding(mesh))}
    search = search_function(model, mesh)
    began = time.perf_counter()
    arguments = (SoftmaxSearch, params, batch, docids, sizes.k, None)
    rows, _ = search(*arguments)
    if np.asarray(rows).min() < 0 or np.asarray(rows).max() >= count:
        raise ValueError("a passage that does not exist was found")
    compile_seconds = time.perf_counter() - began
    whole = 1000 * seconds_of(lambda: fetch(search(*arguments)), sizes.seconds)
    peak = memory_gib("peak_bytes_in_use")
    arguments = params = None  # make room for the logits
    ((constrained, plain),) = measure_atomic(count, output_size, (queries,), sizes.repetitions).values()
    return {
        "ms_per_query": whole / queries,
        "k": sizes.k,
        "constraint_cost": constrained / plain,  # both of the best 40
        "constraint_share": constrained / whole,
        "batch": queries,
        "peak_gib": peak,
        "compile_seconds": compile_seconds,
    }


# --- vectors ---


def encoding(sizes: Sizes) -> dict:
    return where_it_fits(functools.partial(encoding_rows, sizes), rows_for_memory(sizes.rows["encoding"]))


def encoding_rows(sizes: Sizes, rows: int) -> dict:
    mesh = make_mesh()
    model = DualEncoder(sizes.networks["base"], vector_dim=sizes.dimensions)
    params, texts = arbitrary_params(model, mesh), rows * mesh.size
    tokens = np.random.default_rng(0).integers(
        2, model.config.vocab_size, (texts, sizes.row_length), np.int32
    )
    placed = jax.device_put(tokens, batch_sharding(mesh))
    encode, compile_seconds = compiled(jax.jit(model.encode_passages), params, placed)
    seconds = seconds_of(lambda: fetch(encode(params, placed)), sizes.seconds)
    return {
        "passages_per_second": texts / seconds,
        "mfu": share_of_peak(matmul_flops(model.encode_passages, params, placed), seconds),
        "tokens_per_passage": sizes.row_length,
        "rows_per_device": rows,
        "peak_gib": memory_gib("peak_bytes_in_use"),
        "compile_seconds": compile_seconds,
    }


def exact(sizes: Sizes) -> dict:
    """In float32 where there is memory for it; else in bfloat16."""
    mesh, shape = make_mesh(), (sizes.passages, sizes.dimensions)
    for dtype in (np.float32, jnp.bfloat16):
        search = ExactSearch(np.broadcast_to(np.zeros((), dtype), shape), mesh)
        if search.resident:
            break
        log(f"the memory does not suffice for vectors of {np.dtype(dtype).name}")
    else:
        raise MemoryError("the vectors do not fit the devices")
    # In the place of the zeros, what is made on the devices.
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    block, name = (search.rows, sizes.dimensions), np.dtype(dtype).name
    firsts = range(0, sizes.passages, search.rows)
    search._kept = {first: (arbitrary(block, name, place, first),) for first in firsts}
    wanted = np.random.default_rng(0).integers(0, sizes.passages, sizes.queries)
    places = [divmod(row, search.rows) for row in wanted.tolist()]
    queries = np.stack([search._kept[n * search.rows][0][row] for n, row in places]).astype(np.float32)
    began = time.perf_counter()
    rows, _ = search(queries, sizes.k)
    compile_seconds = time.perf_counter() - began
    seconds = seconds_of(lambda: search(queries, sizes.k), sizes.seconds)
    return {
        "queries_per_second": sizes.queries / seconds,
        "k": sizes.k,
        "dtype": name,
        "found_itself": float((rows[:, 0] == wanted).mean()),
        "batch": sizes.queries,
        "peak_gib": memory_gib("peak_bytes_in_use"),
        "compile_seconds": compile_seconds,
    }


def gradient_cache(sizes: Sizes) -> dict:
    return where_it_fits(
        functools.partial(gradient_cache_chunks, sizes), rows_for_memory(sizes.rows["chunk"])
    )


def gradient_cache_chunks(sizes: Sizes, chunk: int) -> dict:
    mesh, (query, passage) = make_mesh(), sizes.pair_lengths
    config = dataclasses.replace(sizes.networks["base"], scan_layers=True)
    model = DualEncoder(
        config,
        adafactor(optax.constant_schedule(1e-3)),
        sizes.dimensions,
        objective=joint_lh,
        gradcache_chunk_size=math.gcd(chunk * mesh.size, sizes.pairs),
    )
    rng, rows = np.random.default_rng(0), np.arange(sizes.pairs, dtype=np.int32)[:, None]
    batch = {
        "left_encoder_input_tokens": rng.integers(2, config.vocab_size, (sizes.pairs, query), np.int32),
        "right_encoder_input_tokens": rng.integers(2, config.vocab_size, (sizes.pairs, 1, passage), np.int32),
        "passage": rows,
        "grade": np.ones_like(rows),
        "other_positives": np.full_like(rows, -1),
    }
    shapes = {name: array.shape for name, array in batch.items()}
    program = plan_train_step(model, shapes, TrainSettings(random_bits="rbg"), mesh)
    step, compile_seconds = compiled(program.function, *program.arguments)
    state = initial_state(model, program.arguments[0], shapes, 0)
    placed = jax.block_until_ready(jax.device_put(batch, batch_sharding(mesh)))
    began = time.perf_counter()  # of the first step: it is long, and nothing is left to compile
    state, metrics = step(state, placed)
    loss, seconds = float(metrics["loss"]), time.perf_counter() - began
    if not math.isfinite(loss):
        raise FloatingPointError(f"a loss of {loss}")
    return {
        "seconds_per_step": seconds,
        "pairs_per_second": sizes.pairs / seconds,
        "mfu": share_of_peak(model_flops(model, shapes), seconds),  # encoding again does not count
        "batch": sizes.pairs,
        "chunk": model.gradcache_chunk_size,
        "peak_gib": memory_gib("peak_bytes_in_use"),
        "compile_seconds": compile_seconds,
    }
