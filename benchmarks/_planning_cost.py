"""What planning costs: milliseconds of the plan and of the search with and without it, on the same network.

Token sets and docids are simulated: 64 tokens a passage, by Zipf's law over T5's vocabulary, and rq_8x256.
The network has random weights: T5 1.1 Base in float32 on CPUs, and in bfloat16 elsewhere. A batch has 8
queries of 16 tokens. What is compared is run in turn, and medians are taken.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import _docids
import jax
import numpy as np
from _cost import BASE, WHOLE_BATCH, arbitrary_params, medians, network, random_queries
from rich.console import Console
from rich.table import Table

from retrieval_jax.core.progress import log
from retrieval_jax.decoding.bonuses import Planning, build_docids
from retrieval_jax.decoding.local_ids import to_local_ids
from retrieval_jax.decoding.planning import build_sets, plan
from retrieval_jax.decoding.trie import Trie, build_trie
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.models.generative import GenerativeRetriever

MS_MARCO, MILLION, QUICK = 8_841_823, 1_000_000, 20_000
TOKENS, PLAN, BLOCK = 64, 1000, 1 << 16
BEAMS, UNPLANNED = (10, 40), (10, 40, 100)


def simulated_sets(count: int) -> np.ndarray:
    """count × TOKENS uint16, by Zipf's law."""
    rng, sets = np.random.default_rng(0), np.empty((count, TOKENS), np.uint16)
    for first in range(0, count, BLOCK):
        block = sets[first : first + BLOCK]
        block[:] = 2 * (_docids.T5_SIZE / 2) ** rng.random(block.shape, np.float32) - 1
    return sets


def simulated(count: int) -> tuple[Trie, Planning, int]:
    """(the trie, what a planned search takes, the size of the softmax)."""
    docids = _docids.quantised(count, 8, 256)
    trie, first_N = build_trie(docids.tokens_NxL)
    arrays = build_docids(to_local_ids(docids.tokens_NxL)[1], first_N)
    planning = Planning(build_sets(simulated_sets(count)), np.float32(1), arrays, PLAN)
    return jax.device_put(trie), jax.device_put(planning), docids.output_size


def measure(count: int, repetitions: int, quick: bool) -> dict:
    """The times of one size: {"plan", "planned": {beams: ms}, "unplanned": {beams: ms}, "bytes"}."""
    log(f"planning: {count:,} passages")
    trie, planning, outputs = simulated(count)
    base = dataclasses.replace(BASE, output_size=outputs, separate_target_embedding=True)
    if jax.default_backend() == "cpu":
        base = dataclasses.replace(base, dtype="float32")
    config = dataclasses.replace(network(outputs) if quick else base, lexical_head=True)
    model = GenerativeRetriever(config)
    params = arbitrary_params(model, make_mesh(devices=jax.devices()[:1]))
    batch = {"encoder_input_tokens": jax.device_put(random_queries(WHOLE_BATCH))}

    @functools.partial(jax.jit, static_argnames="beams")
    def search(params, batch, trie, planning, beams):
        rows, aux = model.predict_batch_with_aux(params, batch, trie=trie, beams=beams, planning=planning)
        return rows, aux["scores"]

    def searching(beams: int, planning: Planning | None) -> Callable:
        return lambda: search(params, batch, trie, planning, beams)

    weights_BxV = jax.jit(model.lexical_weights)(params, batch)
    plan_alone = jax.jit(plan, static_argnums=2)
    runs = [lambda: plan_alone(weights_BxV, planning.sets, PLAN)]
    runs += [searching(beams, planning) for beams in BEAMS] + [searching(beams, None) for beams in UNPLANNED]
    times = [time / WHOLE_BATCH for time in medians(runs, repetitions)]
    sizes = sum(x.nbytes for x in jax.tree.leaves(planning))
    return {
        "plan": times[0],
        "planned": dict(zip(BEAMS, times[1:], strict=False)),
        "unplanned": dict(zip(UNPLANNED, times[1 + len(BEAMS) :], strict=True)),
        "bytes": sizes / count,
        "trie_bytes": sum(x.nbytes for x in jax.tree.leaves(trie)) / count,
    }


def run(console: Console, sizes: Sequence[int], quick: bool) -> dict:
    """Prints the table; returns {"cost_over_unplanned": {passages: {beams: ratio}}, "milliseconds": …}."""
    title = f"Milliseconds a query, batches of {WHOLE_BATCH}, plans of {PLAN} passages"
    table = Table("passages", "bytes a passage", "of the trie", "plan", title=title)
    for beams in BEAMS:
        table.add_column(f"beam {beams}, planned")
    for beams in UNPLANNED:
        table.add_column(f"beam {beams}")
    for beams in BEAMS:
        table.add_column(f"ratio at {beams}")
    figures = {"cost_over_unplanned": {}, "milliseconds": {}}
    for count in sizes:
        measured = measure(count, 3, quick)
        ratio = {beams: measured["planned"][beams] / measured["unplanned"][beams] for beams in BEAMS}
        figures["cost_over_unplanned"][count], figures["milliseconds"][count] = ratio, measured
        times = [measured["plan"], *measured["planned"].values(), *measured["unplanned"].values()]
        table.add_row(
            f"{count:,}",
            *(f"{measured[key]:.1f}" for key in ("bytes", "trie_bytes")),
            *(f"{time:.1f}" for time in times),
            *(f"{value:.2f}" for value in ratio.values()),
        )
    console.print(table)
    return figures
