"""The training loop: any model with T5X's interface, any batches, from its newest checkpoint on."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from retrieval_jax.data.batches import Batch
from retrieval_jax.errors import UserError
from retrieval_jax.evaluation.report import read_curve
from retrieval_jax.progress import bar, say
from retrieval_jax.training import checkpoints, partitioning
from retrieval_jax.training.step import TrainState, abstract_state, initial_state, make_train_step


def fit(
    model,
    batches: Callable[[int], Iterator[Batch]],
    dev: Callable[[dict], dict[str, float]],
    folder: Path,
    steps: int,
    seed: int = 0,
    eval_every: int = 500,
    save_every: int = 500,
    max_minutes: float | None = None,
    log_every: int = 10,
) -> dict:
    """The loop: any model with T5X's interface, any batches (a function of the position in the data).

    `dev(params)` gives metrics by real searching. Gives {"step", "minutes", **the last dev metrics}.
    """
    saved = checkpoints.Checkpoints(folder)
    start = saved.latest() or 0
    done = summary(folder, start)
    if start >= steps or (max_minutes is not None and done["minutes"] >= max_minutes):
        saved.close()
        return done

    from retrieval_jax.training.curve import Curve  # imports TensorFlow

    mesh = partitioning.make_mesh()
    data = batches(start)
    first = next(data)
    shapes = {name: array.shape for name, array in first.items()}
    abstract = abstract_state(model, mesh, shapes)
    if start:
        params, optimizer, position = saved.restore(start, abstract.params, abstract.optimizer)
        state = TrainState(params, optimizer, jax.device_put(np.int32(start), abstract.step.sharding))
        assert position == start
        say(f"{folder}: going on from step {start}")
    else:
        state = initial_state(model, abstract, shapes, seed)
    curve = Curve(folder, start)
    step_fn = make_train_step(model, mesh, abstract, seed)
    batch_sharding = partitioning.batch_sharding(mesh)

    began = time.monotonic()

    def minutes() -> float:
        return curve.minutes_before + (time.monotonic() - began) / 60

    def out_of_time() -> bool:
        return max_minutes is not None and minutes() >= max_minutes

    losses: list[float] = []
    waited = spent = 0.0  # seconds since the last point: waiting for batches, and in steps as a whole
    waiting: tuple[int, dict] | None = None  # the last step's number and metrics, still on the device
    last: dict[str, float] = {}
    step, batch = start, first

    with bar(f"train {folder.name}", steps, start) as advance:

        def fetch() -> None:
            """Takes in the waiting metrics; tells the mean loss of every `log_every` steps."""
            nonlocal waiting, waited, spent
            if waiting is None:
                return
            (number, metrics), waiting = waiting, None
            losses.append(float(metrics["loss"]))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"{folder}: the loss is {losses[-1]} at step {number}: lower the learning rate"
                )
            if number % log_every == 0:
                loss = sum(losses) / len(losses)
                losses.clear()
                curve.add(number, minutes(), {"loss": loss, "input_wait": waited / max(spent, 1e-9)})
                waited = spent = 0.0
                hits = f", Hits@10 {last['dev/Hits@10']:.2f}" if "dev/Hits@10" in last else ""
                advance(0, f"loss {loss:.2f}{hits}")

        while step < steps and not out_of_time():
            stepped = time.monotonic()
            state, metrics = step_fn(state, jax.device_put(batch, batch_sharding))
            fetch()  # of the step before, while this one runs
            step += 1
            waiting = (step, metrics)
            if step < steps:
                asked = time.monotonic()
                batch = next(data)
                waited += time.monotonic() - asked
            spent += time.monotonic() - stepped
            advance(1)
            ends = step >= steps or out_of_time()
            if ends or step % save_every == 0:
                fetch()
                saved.save(step, state.params, state.optimizer)
            if ends or step % eval_every == 0:
                last = {f"dev/{k}": v for k, v in dev(state.params).items()}
                curve.add(step, minutes(), last)
    if step < steps:
        say(f"{folder}: stopped at step {step} of {steps}, after {max_minutes} minutes (train.max_minutes)")
    curve.close()
    saved.close()
    return summary(folder, step)


def summary(folder: Path, step: int) -> dict:
    """What training up to `step` came to, as its learning curve tells.

    input_wait: share of the steps' time spent waiting for batches (the device may be at work meanwhile).
    """
    path = folder / "learning_curve.jsonl"
    points = [p for p in read_curve(path) if p["step"] <= step] if path.exists() else []
    dev = {key: value for p in points for key, value in p.items() if key.startswith("dev/")}
    waits = [p["input_wait"] for p in points if "input_wait" in p]
    return {
        "step": step,
        "minutes": max([p["minutes"] for p in points], default=0.0),
        "input_wait": round(sum(waits) / len(waits), 4) if waits else 0.0,
        **dev,
    }
