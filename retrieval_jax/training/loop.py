"""The training loop: any model with T5X's interface, any batches, from its newest checkpoint on."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from retrieval_jax.checkpoints import checkpoints
from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.checkpoints.weights import LazyArray
from retrieval_jax.core.errors import Preempted
from retrieval_jax.core.progress import bar, log
from retrieval_jax.examples.batches import Batch
from retrieval_jax.mesh import multihost, partitioning
from retrieval_jax.training.flops import model_flops
from retrieval_jax.training.loss_spike_guard import ExamplesOf, LossSpikeGuard, Preemption
from retrieval_jax.training.metric_writer import MetricWriter
from retrieval_jax.training.step import TrainState, abstract_state, initial_state, make_train_step
from retrieval_jax.training.throughput import Profiler, ThroughputMeter


def train_loop(
    model,
    batches: Callable[[int], Iterator[Batch]],
    evaluator: Callable[[dict], dict[str, float]],
    folder: Path,
    steps: int,
    seed: int = 0,
    eval_every: int = 500,
    save_every: int = 500,
    max_minutes: float | None = None,
    log_every: int = 10,
    examples_of: ExamplesOf | None = None,
    profile: tuple[int, int] | None = None,
    pretrained_params: Mapping[str, LazyArray] | None = None,
    batch_size: int = 1,
    keep: int = 2,
    keep_best: str | None = "MRR@10",
    mesh: Mesh | None = None,
) -> dict:
    """The loop: any model with T5X's interface, any batches (a function of the position in the data).

    Args:
      batches: from a position (examples taken before it) on, gives the rows of each batch that
        this process's devices hold (`multihost.local_rows`).
      evaluator: `evaluator(params)` gives metrics by real searching; `evaluator.samples`,
        if there, some of what it found.
      log_every: steps between two points of the learning curve.
      examples_of: see LossSpikeGuard; profile: see Profiler.
      pretrained_params: parameters to begin with, by name; see `initial_state`.
      batch_size: examples that a step moves the position by.
      keep: how many of the newest checkpoints stay.
      keep_best: the dev metric by which the best one stays beside them; see RetentionPolicy.
      mesh: what it runs on; None: all devices.

    Gives {"step", "minutes", "input_wait", **the last dev metrics, **Checkpoints.best()}. Raises UserError
    where the numbers go wrong, and Preempted, with all saved, after SIGTERM.
    """
    saved = checkpoints.Checkpoints(folder, keep, keep_best)
    start = saved.latest() or 0
    done = summary(folder, start)
    out_of_time = max_minutes is not None and done["minutes"] >= max_minutes
    if multihost.broadcast_from_process_0(start >= steps or out_of_time):
        saved.close()
        return done | saved.best()

    mesh = mesh or partitioning.all_devices()
    begun = (start, saved.examples(start, batch_size) if start else 0)  # a step and its position

    def position(step: int) -> int:
        return begun[1] + (step - begun[0]) * batch_size

    data = batches(position(start))
    batch = next(data)
    shapes = multihost.global_batch_shapes(mesh, batch)
    abstract = abstract_state(model, mesh, shapes)
    if restored := saved.restore_newest(abstract.params, abstract.optimizer):
        params, optimizer, step = restored
        state = TrainState(params, optimizer, multihost.make_global_arrays(mesh, np.int32(step)))
        if step != start:
            begun = (step, saved.examples(step, batch_size))
            data = batches(position(step))
            batch = next(data)
        log(f"{folder}: going on from step {step}")
    else:
        state, step = initial_state(model, abstract, shapes, seed, pretrained_params), 0
    watch = LossSpikeGuard(
        folder,
        examples_of and (lambda before: examples_of(position(before))),
        unbounded=not getattr(model.module, "normalize", True),
    )
    if restored:
        watch.resume(saved.position(step))
    step_fn = make_train_step(model, mesh, abstract, seed, skips=watch.skips)
    norm = jax.jit(optax.tree.norm).lower(abstract.params).compile()

    curve = MetricWriter(folder, step)
    clock = ThroughputMeter(
        mesh, curve.minutes_before, max_minutes, functools.partial(model_flops, model, shapes)
    )
    profiler = Profiler(folder, profile)
    waiting: tuple[int, dict] | None = None  # the last step's number and metrics, still on the device
    taken: list[dict[str, float]] = []  # the metrics since the last point
    found: dict[str, float] = {}  # on dev
    ends = preempted = False

    with (
        bar(f"train {folder.name}", steps, step) as advance,
        Preemption() as preemption,
        closing(saved),
        closing(curve),
        closing(profiler),
    ):

        def fetch_metrics() -> None:
            """Fetches the waiting metrics; makes a point of the curve of every `log_every` steps."""
            nonlocal waiting
            if waiting is None:
                return
            (number, metrics), waiting = waiting, None
            taken.append({name: float(x) for name, x in jax.device_get(metrics).items()})
            watch.step(number, taken[-1])
            if number % log_every == 0:
                means = _means(taken)
                means["parameter_norm"] = taken[-1]["parameter_norm"]
                taken.clear()
                curve.add(number, clock.minutes, means | clock.read())
                hits = f", Hits@10 {found['dev/Hits@10']:.2f}" if "dev/Hits@10" in found else ""
                advance(0, f"loss {means.get('loss', math.nan):.2f}{hits}")

        while not ends:
            profiler.before(step)
            limit = (
                [multihost.make_global_arrays(mesh, np.float32(watch.limit(step + 1)))] if watch.skips else []
            )
            with clock.step(batch):
                state, metrics = step_fn(state, multihost.make_global_batch(mesh, batch), *limit)
                fetch_metrics()  # of the step before, while this one runs
                step += 1
                if step % log_every == 0:  # not at each step: it reads all parameters once more
                    metrics["parameter_norm"] = norm(state.params)
                waiting = (step, metrics)
                if step < steps:
                    with clock.waiting():
                        batch = next(data)
            profiler.after(step, metrics)
            advance(1)

            preempted = preemption.reached(step)
            ends = step >= steps or preempted or clock.is_over(step, log_every)
            if ends or step % save_every == 0:
                fetch_metrics()  # nothing is saved whose numbers went wrong
                curve.flush()
                saved.save(step, state.params, state.optimizer, position(step), watch.state())
            if not preempted and (ends or step % eval_every == 0):
                on_dev = evaluator(state.params)
                watch.dev(step, on_dev)
                saved.retention.add(step, on_dev)
                found = {f"dev/{name}": value for name, value in on_dev.items()}
                curve.add(step, clock.minutes, found)
                curve.add_samples(step, getattr(evaluator, "samples", ()))
                curve.flush()

    if preempted:
        raise Preempted(f"{folder}: told to end; step {step} of {steps} is saved: the same command goes on")
    if step < steps:
        log(f"{folder}: stopped at step {step} of {steps}, after {max_minutes} minutes (train.max_minutes)")
    multihost.on_process_0(lambda: None)  # has written the curve
    best = saved.best()
    if (best_step := best.get("best_step", step)) != step:
        log(f"{folder}: step {best_step} was the best on dev: --MODEL_STEP={best_step} takes that one")
    return summary(folder, step) | best


def _means(taken: list[dict[str, float]]) -> dict[str, float]:
    """The means of the steps' metrics. Of skipped steps only their number is told."""
    applied = [one for one in taken if not one.get("skipped")]
    means = {name: sum(one[name] for one in applied) / len(applied) for name in applied[0]} if applied else {}
    if "skipped" in taken[0]:
        means["skipped"] = len(taken) - len(applied)
    return means


def summary(folder: Path, step: int) -> dict:
    """What training up to `step` came to, as its learning curve tells.

    input_wait: share of the steps' time spent waiting for batches (the device may be at work meanwhile);
    skipped: steps whose updates were left out, if any (see LossSpikeGuard).
    """
    path = folder / "learning_curve.jsonl"
    points = [p for p in read_curve(path) if p["step"] <= step] if path.exists() else []
    dev = {key: value for p in points for key, value in p.items() if key.startswith("dev/")}
    waits = [p["input_wait"] for p in points if "input_wait" in p]
    return {
        "step": step,
        "minutes": max([p["minutes"] for p in points], default=0.0),
        "input_wait": round(sum(waits) / len(waits), 4) if waits else 0.0,
        **({"skipped": int(skipped)} if (skipped := sum(p.get("skipped", 0) for p in points)) else {}),
        **dev,
    }
