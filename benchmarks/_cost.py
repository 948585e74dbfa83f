"""What a search costs with the docid trie and without: its steps, and all of it with a small network."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _docids import T5_SIZE
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, Sharding

from retrieval_jax.checkpoints.model_folder import abstract_params
from retrieval_jax.core.progress import log
from retrieval_jax.decoding.atomic import top_docids
from retrieval_jax.decoding.beam_search import Beams, expand
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.mesh.multihost import make_global_arrays
from retrieval_jax.mesh.partitioning import DEFAULT_RULES, Rules, make_mesh
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.t5 import T5

BEAMS, QUERY_LENGTH, WHOLE_BATCH = 40, 16, 8
BASE = T5Config(T5_SIZE, 768, 12, 64, 2048, 12, 12, dtype="bfloat16")  # T5 1.1 Base
ONCE_A_QUERY = [("encoder_decoder_attention", "key"), ("encoder_decoder_attention", "value")]
LOGITS_A_CALL = 1 << 21  # 8 MB: more where one step reads more


def network(output_size: int, width: int = 64, layers: int = 2) -> T5Config:
    sizes = width, width // 16, 16, 2 * width, layers, layers
    return T5Config(T5_SIZE, *sizes, output_size=output_size, separate_target_embedding=True)


def medians(runs: Sequence[Callable], repetitions: int, warm_up: int = 1, pause: float = 0) -> list[float]:
    """Milliseconds that each takes, run in turn: after a pause (seconds), where others' threads still spin,
    and calls that are not in the time, for a third as long, as others' data is in the caches.
    """
    times = [[] for _ in runs]
    for repetition in range(warm_up + repetitions):
        for run, some in zip(runs, times, strict=True):
            if pause:
                time.sleep(pause)
                warm = time.perf_counter() + pause / 3
                while time.perf_counter() < warm:
                    jax.block_until_ready(run())
            started = time.perf_counter()
            jax.block_until_ready(run())
            if repetition >= warm_up:  # before, it compiles
                some.append(1000 * (time.perf_counter() - started))
    return [statistics.median(some) for some in times]


@jax.jit
def constrained_root(trie: Trie, logits_RxBx1xV: jax.Array) -> Beams:
    def search(logits_Bx1xV: jax.Array) -> Beams:
        root = jnp.zeros((len(logits_Bx1xV), 1), jnp.int32)
        num_children = jnp.broadcast_to(jnp.asarray(trie.root_num_children, jnp.int32), root.shape)
        state = Beams(jnp.zeros(root.shape, jnp.float32), root, root, num_children)
        logits, log_z = logits_Bx1xV[..., trie.token_LxI[0]], jax.nn.logsumexp(logits_Bx1xV, axis=-1)
        return expand(trie, trie.max_branching[0], BEAMS, state, logits, log_z, 0)

    return jax.lax.map(search, logits_RxBx1xV)


@jax.jit
def constrained_step(trie: Trie, states_R: Beams, logits_RxBxKxV: jax.Array, position: jax.Array):
    """What `constrained_beam_search` does at a position around the network."""
    widths = sorted(set(trie.max_branching[1:]))
    branch_of = jnp.array([0, *(widths.index(width) for width in trie.max_branching[1:])])
    branches = [functools.partial(expand, trie, width, BEAMS) for width in widths]

    def search(state_and_logits: tuple[Beams, jax.Array]):
        state, logits_BxKxV = state_and_logits
        logits, log_z = logits_BxKxV[..., trie.token_LxI[position]], jax.nn.logsumexp(logits_BxKxV, axis=-1)
        return jax.lax.switch(branch_of[position], branches, state, logits, log_z, position)

    return jax.lax.map(search, (states_R, logits_RxBxKxV))


@functools.partial(jax.jit, static_argnames="by_beam")
def unconstrained_steps(scores_RxBxK: jax.Array, logits_RxBxKxV: jax.Array, by_beam: bool):
    return jax.lax.map(lambda x: unconstrained_step(*x, by_beam), (scores_RxBxK, logits_RxBxKxV))


def unconstrained_step(
    score_BxK: jax.Array, logits_BxKxV: jax.Array, by_beam: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(score, token, parent) of the best beams × outputs, B×BEAMS: of all at once, or first of each beam."""
    B, _, V = logits_BxKxV.shape
    if by_beam:
        best_BxKxC, token_BxKxC = jax.lax.top_k(logits_BxKxV, min(BEAMS, V))
        total_BxKxC = best_BxKxC + (score_BxK - jax.nn.logsumexp(logits_BxKxV, axis=-1))[..., None]
    else:
        total_BxKxC = score_BxK[..., None] + jax.nn.log_softmax(logits_BxKxV)
    C = total_BxKxC.shape[2]
    score, best = jax.lax.top_k(total_BxKxC.reshape(B, -1), min(BEAMS, score_BxK.shape[1] * C))
    token = jnp.take_along_axis(token_BxKxC.reshape(B, -1), best, axis=1) if by_beam else best % C
    missing = ((0, 0), (0, BEAMS - score.shape[1]))
    return (
        jnp.pad(score, missing, constant_values=-jnp.inf),
        jnp.pad(token, missing),
        jnp.pad(best // C, missing),
    )


def measure_steps(trie: Trie, output_size: int, batch_size: int, repetitions: int) -> list[float]:
    """Milliseconds of all positions' steps: constrained, unconstrained (all at once, first of each beam).

    Where a step takes microseconds one call does it for several batches, in a loop as in a search: otherwise
    the time of calling it would be measured.
    """
    shape = (batch_size, BEAMS, output_size)
    R = max(1, LOGITS_A_CALL // math.prod(shape))
    logits_RxBxKxV = np.random.default_rng(batch_size).standard_normal((R, *shape), np.float32)
    logits_RxBxKxV = jax.device_put(3 * logits_RxBxKxV)
    ways = (False, True)
    first, start = logits_RxBxKxV[:, :, :1], jnp.zeros((R, batch_size, 1))
    runs = [functools.partial(constrained_root, trie, first)]
    runs += [functools.partial(unconstrained_steps, start, first, way) for way in ways]
    if R > 1:  # short calls, whose times vary
        repetitions *= 5
    total = np.zeros(len(runs))
    for position in range(trie.length):
        total += medians(runs, repetitions)
        (states, *_), (scores, *_) = runs[0](), runs[1]()
        runs = [functools.partial(constrained_step, trie, states, logits_RxBxKxV, position + 1)]
        runs += [functools.partial(unconstrained_steps, scores, logits_RxBxKxV, way) for way in ways]
    return (total / R).tolist()


@functools.partial(jax.jit, static_argnames=("module", "length", "by_beam"))
def unconstrained_search(module: T5, params: dict, queries_BxS: jax.Array, length: int, by_beam: bool):
    """The most probable sequences of `length` tokens: (tokens B×BEAMS×length, scores B×BEAMS)."""
    apply = functools.partial(module.apply, {"params": params})
    cross_kv, cache = apply(queries_BxS, 1, length, method="prefill")

    def write(position, carry):
        score, token, kept = carry
        x_BxKxE, cache = apply(token, position, kept[0], cross_kv, queries_BxS, method="decode_step")
        logits_BxKxV = apply(x_BxKxE, method="logits")
        score, token, parent = unconstrained_step(score, logits_BxKxV, by_beam)
        cache, written = jax.tree.map(lambda x: jax.vmap(lambda a, i: a[i])(x, parent), (cache, kept[1]))
        return score, token, (cache, written.at[..., position].set(token))

    root = jnp.zeros((len(queries_BxS), 1), jnp.int32)
    written = jnp.zeros((*root.shape, length), jnp.int32)
    carry = write(0, (jnp.zeros(root.shape), root, (cache, written)))
    score, _, (_, written) = jax.lax.fori_loop(1, length, write, carry)
    return written, score


def compiled_search(model: GenerativeRetriever, mesh: Mesh | None = None) -> Callable:
    """(params, trie, queries B×S) -> (rows B×BEAMS, scores)."""

    @jax.jit
    def search(params, trie, queries_BxS):
        batch = {"encoder_input_tokens": queries_BxS}
        rows, aux = model.predict_batch_with_aux(params, batch, trie=trie, beams=BEAMS, mesh=mesh)
        return rows, aux["scores"]

    return search


def placed_search(model: GenerativeRetriever, params: dict, trie: Trie, mesh: Mesh) -> Callable:
    """queries B×S -> (rows B×BEAMS, scores), the queries shared among the mesh's devices."""
    search, (params, trie) = compiled_search(model, mesh), make_global_arrays(mesh, (params, trie))
    return lambda queries_BxS: search(params, trie, make_global_arrays(mesh, queries_BxS, "data"))


def placed_products(products: list[tuple], mesh: Mesh) -> Callable:
    """() -> those matrix products (rows, kernel), the rows shared among the mesh's devices."""
    multiply = jax.jit(lambda pairs: [rows @ kernel for rows, kernel in pairs])
    pairs = [
        (make_global_arrays(mesh, rows, "data"), make_global_arrays(mesh, kernel))
        for rows, kernel in products
    ]
    return functools.partial(multiply, pairs)


def step_products(params: dict) -> list[tuple[jax.Array, jax.Array]]:
    """What a step of a search multiplies a decoder's kernels by (rows, kernel), but for attention's own."""
    kernels = [
        x
        for name, x in flatten_dict(params["decoder"]).items()
        if name[-1] == "kernel" and name[1:3] not in ONCE_A_QUERY
    ]
    rows = {k.shape[0]: jnp.ones((WHOLE_BATCH * BEAMS, k.shape[0])) for k in kernels}
    return [(rows[k.shape[0]], k) for k in kernels]


def arbitrary(shape: tuple[int, ...], dtype: str, place: Sharding | None = None, first: int = 0) -> jax.Array:
    """Numbers that look random, as small as a layer's weights: the rows from `first` on of a long array.

    They are made where they lie, in one kernel: `jax.random` takes several times the memory of its result.
    """
    return _filler(shape, dtype, place)(np.uint32(first))


@functools.lru_cache
def _filler(shape: tuple[int, ...], dtype: str, place: Sharding | None) -> Callable:
    @functools.partial(jax.jit, out_shardings=place)
    def fill(x: jax.Array) -> jax.Array:
        for axis in range(len(shape)):
            x = (x + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's last steps
                x = (x ^ (x >> shift)) * jnp.uint32(factor)
            x ^= x >> 16
        uniform = (x >> 8).astype(jnp.int32).astype(jnp.float32) / (1 << 23) - 1
        return (uniform * (shape or (1,))[-2 if len(shape) > 1 else -1] ** -0.5).astype(dtype)

    return fill


def arbitrary_params(model, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> dict:
    """Parameters that are made in no time. Compiling Flax's initialisers of a deep network takes long."""
    shapes = abstract_params(model, mesh, rules)
    return jax.tree.map(lambda x: arbitrary(x.shape, x.dtype.name, x.sharding), shapes)


def random_queries(batch_size: int = WHOLE_BATCH) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 32_100, (batch_size, QUERY_LENGTH), dtype=np.int32)


def measure_whole(
    trie: Trie, config: T5Config, by_beam: bool, repetitions: int, batch_size: int = WHOLE_BATCH
) -> list[float]:
    """Milliseconds of a whole search: constrained, unconstrained."""
    model = GenerativeRetriever(config)
    shapes = {"encoder_input_tokens": (1, QUERY_LENGTH), "decoder_input_tokens": (1, trie.length)}
    variables = jax.jit(lambda key: model.get_initial_variables(key, shapes))(jax.random.key(0))
    params = nn.unbox(variables)["params"]
    search, queries = compiled_search(model), jax.device_put(random_queries(batch_size))
    runs = [
        lambda: search(params, trie, queries),
        lambda: unconstrained_search(model.module, params, queries, trie.length, by_beam),
    ]
    return medians(runs, repetitions)


def measure_base(trie: Trie, config: T5Config, repetitions: int, batch_size: int = 64) -> dict:
    """Milliseconds a query of whole searches with a network, on all devices; see constrained_decoding.py.

    constraint_cost: the time of all the search's steps over that of an unconstrained one's; constraint_share:
    over that of the whole search. Both times are of one device, which has all the queries.
    """
    ours, *theirs = measure_steps(jax.device_put(trie), config.output_size, batch_size, repetitions)
    model, mesh = GenerativeRetriever(config), make_mesh()
    search = placed_search(model, arbitrary_params(model, mesh), trie, mesh)
    queries = random_queries(batch_size)
    began = time.perf_counter()
    rows, _ = search(queries)
    if np.asarray(rows).min() < 0:
        raise ValueError("fewer docids were found than there are beams")
    first = time.perf_counter() - began
    (whole,) = medians([functools.partial(search, queries)], repetitions)
    return {
        "ms_per_query": whole / batch_size,
        "constraint_cost": ours / min(theirs),
        "constraint_share": ours / whole,
        "batch": batch_size,
        "compile_seconds": first - whole / 1000,
    }


def measure_cost(trie: Trie, output_size: int, batches: Sequence[int], repetitions: int) -> dict:
    """{batch size: milliseconds of all steps, "whole": of a search}, each [constrained, unconstrained]."""
    trie = jax.device_put(trie)
    times = {}
    for batch_size in batches:
        ours, *theirs = measure_steps(trie, output_size, batch_size, repetitions)
        times[batch_size] = [ours, min(theirs)]
        if batch_size == WHOLE_BATCH:
            by_beam = theirs[1] < theirs[0]
            times["whole"] = measure_whole(trie, network(output_size), by_beam, repetitions)
    return times


def measure_atomic(count: int, output_size: int, batches: Sequence[int], repetitions: int) -> dict:
    """The same of atomic docids: the best of those that exist, and by `lax.top_k` of the whole softmax.

    Says what the search would take where the softmax held nothing but docids.
    """
    valid_mask_V = jax.device_put((np.arange(output_size) > 0) & (np.arange(output_size) <= count))
    search = jax.jit(top_docids, static_argnames="k")

    @jax.jit
    def plain(logits):
        score, token = jax.lax.top_k(logits, BEAMS)
        return score - jax.nn.logsumexp(logits, axis=-1, keepdims=True), token

    @jax.jit
    def all_real(logits):
        return top_docids(logits, jnp.ones(output_size, bool), BEAMS)

    times = {}
    for batch_size in batches:
        logits = jax.random.normal(jax.random.key(batch_size), (batch_size, output_size))
        runs = [functools.partial(search, logits, valid_mask_V, k=BEAMS)]
        runs += [functools.partial(way, logits) for way in (plain, all_real)]
        ours, *theirs = medians(runs, repetitions)
        log(f"atomic, batch {batch_size}: {ours:.0f} ms; {theirs[1]:.0f} ms if all outputs were docids")
        times[batch_size] = [ours, theirs[0]]
    return times
