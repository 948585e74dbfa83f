"""What gradient caching saves and costs: the memory of a batch of 65,536, and the time of the same batch.

    python benchmarks/gradient_cache.py [--quick]

Memory is what XLA's compiler allots to a training step of a dual encoder (parameters and optimiser included)
on this machine's backend; nothing runs. GTR's setting: queries of 64 tokens, passages of 256, vectors of 768;
T5 1.1 Base in bfloat16, Adafactor, JointLH. Batches of 512 and 65,536 as a whole against 65,536 in chunks;
and the same where each layer is rematerialised (T5Config.remat), where there is less to save.

Time is that of a smaller network's gradient of the same batch, whole and in chunks, in turn; the gradients of
both are compared, largest difference over the largest gradient. FLOPs of all matrix products are counted.

Prints two tables, then one line of JSON: memory_ratio (65,536 in chunks over 512 as a whole), time_ratio and
flops_ratio (in chunks over as a whole), max_gradient_difference.
"""

import argparse
import dataclasses
import json
import statistics
import time

import _quiet  # noqa: F401
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from retrieval_jax.core.progress import log
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.contrastive import joint_lh
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.flops import jaxpr_flops
from retrieval_jax.training.optimizers import adafactor
from retrieval_jax.training.step import abstract_state, make_train_step

BASE = T5Config(32128, 768, 12, 64, 2048, 12, 0, dtype="bfloat16", scan_layers=True)
TINY = T5Config(8192, 256, 4, 64, 1024, 4, 0)


def dual_encoder(config: T5Config, chunk_size: int | None, vector_dim: int = 768) -> DualEncoder:
    optimizer = adafactor(optax.constant_schedule(1e-3))
    return DualEncoder(config, optimizer, vector_dim, objective=joint_lh, gradcache_chunk_size=chunk_size)


def shapes(rows: int, query: int, passage: int) -> dict[str, tuple[int, ...]]:
    return {
        "left_encoder_input_tokens": (rows, query),
        "right_encoder_input_tokens": (rows, 1, passage),
        "passage": (rows, 1),
        "grade": (rows, 1),
        "other_positives": (rows, 1),
    }


def step_gib(config: T5Config, rows: int, chunk_size: int | None) -> float:
    """GiB of one device that a training step takes: arguments, and all that is made on the way."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    model, batch = dual_encoder(config, chunk_size), shapes(rows, 64, 256)
    abstract = abstract_state(model, mesh, batch)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in batch.items()}
    memory = make_train_step(model, mesh, abstract, 0).lower(abstract, arrays).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30


def compare_memory(chunk_size: int) -> float:
    table = Table("layers rematerialised", "batch", "chunk", "GiB", "over 512 as a whole")
    gib: dict[tuple, float] = {}
    for remat in ("none", "full"):
        for rows, chunk in ((512, None), (1 << 16, chunk_size), (1 << 16, None)):
            config = dataclasses.replace(BASE, remat=remat)
            gib[remat, rows, chunk] = taken = step_gib(config, rows, chunk)
            over = f"{taken / gib[remat, 512, None]:.2f}"
            table.add_row(remat, f"{rows:,}", str(chunk or "–"), f"{taken:,.1f}", over)
    Console().print(table)
    return gib["none", 1 << 16, chunk_size] / gib["none", 512, None]


def compare_time(rows: int, chunk_size: int, rounds: int) -> tuple[float, float, float]:
    rng, batch = np.random.default_rng(0), {}
    for name, shape in shapes(rows, 32, 64).items():
        batch[name] = rng.integers(1, 8192, shape).astype(np.int32)
    batch |= {
        "passage": np.arange(rows, dtype=np.int32)[:, None],
        "other_positives": np.full((rows, 1), -1, np.int32),
    }
    models = {"whole": dual_encoder(TINY, None, 256), "chunks": dual_encoder(TINY, chunk_size, 256)}
    params = jax.jit(
        lambda: nn.unbox(
            models["whole"].get_initial_variables(jax.random.key(0), shapes(2, 32, 64))["params"]
        )
    )()
    steps = {
        name: jax.jit(jax.value_and_grad(lambda p, m=m: m.loss_fn(p, batch, None)[0]))
        for name, m in models.items()
    }
    seconds, gradients = {name: [] for name in steps}, {}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            _, gradients[name] = jax.block_until_ready(step(params))
            if number:  # the first one compiles
                seconds[name].append(time.perf_counter() - began)
    flops = {name: jaxpr_flops(step.trace(params).jaxpr) for name, step in steps.items()}
    pairs = zip(*map(jax.tree.leaves, gradients.values()), strict=True)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradients["whole"]))
    difference = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) / largest
    table = Table("batch", "chunk", "ms a step", "GFLOP a step")
    for name, chunk in (("whole", "–"), ("chunks", str(chunk_size))):
        milliseconds = 1000 * statistics.median(seconds[name])
        table.add_row(str(rows), chunk, f"{milliseconds:.0f}", f"{flops[name] / 1e9:.1f}")
    Console().print(table)
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    return ratio, flops["chunks"] / flops["whole"], difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small batch, and two rounds")
    args = parser.parse_args()
    log(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    memory = compare_memory(128)
    rows, chunk_size, rounds = (64, 16, 2) if args.quick else (256, 32, 7)
    taken, flops, difference = compare_time(rows, chunk_size, rounds)
    told = {"memory_ratio": memory, "time_ratio": taken, "flops_ratio": flops}
    print(json.dumps({k: round(v, 3) for k, v in told.items()} | {"max_gradient_difference": difference}))


if __name__ == "__main__":
    main()
