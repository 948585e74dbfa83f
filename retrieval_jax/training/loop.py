"""The training loop: any model with T5X's interface, any batches, from its newest checkpoint on.

`train_loop` is the story of a run: it restores the newest checkpoint, and then steps, fetches and logs
metrics, saves and evaluates until the run ends.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from retrieval_jax.checkpoints.checkpoints import Checkpoints
from retrieval_jax.checkpoints.learning_curve import evaluations, is_evaluated, summary
from retrieval_jax.checkpoints.weights import LazyArray
from retrieval_jax.core.errors import Preempted
from retrieval_jax.core.progress import bar, log
from retrieval_jax.examples.batches import Batch
from retrieval_jax.mesh import multihost, partitioning
from retrieval_jax.training.flops import model_flops
from retrieval_jax.training.group_texts import group_texts
from retrieval_jax.training.loss_spike_guard import LossMonitor
from retrieval_jax.training.metric_writer import MetricWriter
from retrieval_jax.training.preemption import Preemption
from retrieval_jax.training.profiler import Profiler
from retrieval_jax.training.program import plan_train_step
from retrieval_jax.training.settings import TrainSettings
from retrieval_jax.training.step import TrainState, initial_state
from retrieval_jax.training.throughput import ThroughputMeter

_UNLOGGED = "unlogged"  # in a checkpoint: the metrics of the steps since the last point of the learning curve


def train_loop(
    model,
    batches: Callable[[int], Iterator[Batch]],
    evaluator: Callable[[dict], dict[str, float]],
    folder: Path,
    settings: TrainSettings,
    *,
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    pretrained_params: Callable[[], Mapping[str, LazyArray]] | None = None,
    prepare_params: Callable[[dict, Collection[str]], dict] | None = None,
    describe_batch: Callable[[int], list[dict]] | None = None,
) -> dict:
    """Trains a model, from the newest checkpoint of its folder on.

    The same settings, batches and mesh give the same parameters, bit for bit, however often the run is
    stopped and resumed.

    Args:
      model: has T5X's model interface, and an optimiser.
      batches: gives the batches from a position in the data on, which is the number of examples before it.
        Each process takes the rows of a batch that its own devices hold (`multihost.local_rows`).
      evaluator: gives metrics of the parameters. If it has an attribute `samples`, these are written, too;
        see `MetricWriter.write_samples`. Its `prefix` ("dev", if it has none) comes before their names.
      folder: the model's folder, for checkpoints and the learning curve.
      settings: what the run does for how long.
      mesh: the devices to run on; None: all devices.
      rules: the mesh axes of each logical axis.
      pretrained_params: gives the parameters to begin with, by name; all others are random. It is called
        only where no checkpoint is restored.
      prepare_params: changes the parameters before the first step, on the devices; it gets them, and the
        names of those that `pretrained_params` gave. None: they stay.
      describe_batch: gives the examples of the batch at a position, for the file that says which batch went
        wrong; see `LossMonitor`.

    Returns:
      What `summary` gives, and the best checkpoint, as `Checkpoints.best` gives it.

    Raises:
      Diverged: the numbers of the run went wrong; nothing of them is saved.
      Preempted: SIGTERM ended the run after a step, which is saved.
    """
    checkpoints = Checkpoints(folder, settings.keep, settings.keep_best)
    mesh = mesh or partitioning.all_devices()
    latest = checkpoints.latest()
    start = latest or 0
    done = summary(folder, start)
    finished = multihost.broadcast_from_process_0(latest is not None and _is_finished(done, settings))
    if start > settings.steps and multihost.is_process_0():
        log(f"{folder}: has {start} steps already, more than STEPS={settings.steps}")
    owes_evaluation = multihost.broadcast_from_process_0(_owes_evaluation(folder, latest, finished, settings))
    if finished and not owes_evaluation and multihost.broadcast_from_process_0(checkpoints.is_sealed(start)):
        checkpoints.close()
        return done | checkpoints.best()

    data = _Data(batches, settings, model.text_arrays, mesh)
    data.seek(start, checkpoints.examples(start) if start else 0)
    run = _Run(model, data, checkpoints, settings, folder=folder, mesh=mesh, rules=rules)
    run.restore(pretrained_params, prepare_params)
    run.watch(evaluator, describe_batch)
    checkpoints.seal()
    run.ended |= bool(finished) and run.step == start
    owes_evaluation = run.step == start and (owes_evaluation or (run.ended and latest is None))
    with (
        bar(f"train {folder.name}", settings.steps, run.step) as run.progress,
        Preemption() as run.preemption,
        closing(checkpoints),
        closing(run.writer),
        closing(run.profiler),
    ):
        if owes_evaluation:
            run.save()  # nothing new, unless the run is to have no steps
            run.evaluate()
        while not run.ended:
            run.take_step()
            if run.ended or run.is_due(settings.save_every):
                run.save()
            if not run.preempted and (run.ended or run.is_due(settings.eval_every)):
                run.evaluate()
    return run.finish()


def _is_finished(done: dict, settings: TrainSettings) -> bool:
    """Tells whether a run needs no more steps, or has no more time; `done` is its summary so far."""
    out_of_time = settings.max_minutes is not None and done["minutes"] >= settings.max_minutes
    return done["step"] >= settings.steps or out_of_time


def _owes_evaluation(folder: Path, latest: int | None, finished: bool, settings: TrainSettings) -> bool:
    """Tells whether the newest checkpoint has not been evaluated, as a kill came between, and is to be."""
    if latest is None:
        return False
    return (finished or latest % settings.eval_every == 0) and not is_evaluated(folder, latest)


class _Data:
    """The batches of a run, and their positions in the data.

    A position counts the examples before a batch, so that a run may go on with another batch size.
    """

    def __init__(
        self,
        batches: Callable[[int], Iterator[Batch]],
        settings: TrainSettings,
        text_arrays: Sequence[str],
        mesh: Mesh,
    ):
        self.batches, self.batch_size = batches, settings.batch_size
        self.group = functools.partial(
            group_texts, arrays=text_arrays, mesh=mesh, microbatches=settings.microbatches
        )

    def seek(self, step: int, position: int) -> None:
        """Goes to the batch that comes after `step` steps, which lies at a position."""
        self.start, self.start_position = step, position
        self.iterator = self.group(self.batches(position))
        self.advance()

    def advance(self) -> None:
        """Takes the next batch, and the groups of its texts."""
        self.batch, self.groups = next(self.iterator)

    def position(self, step: int) -> int:
        """Gives the position of the batch that comes after `step` steps."""
        return self.start_position + (step - self.start) * self.batch_size


class _Run:
    """A run between two of its steps.

    Attributes:
      state, step: the state on the devices, and the number of steps taken.
      train_steps: the jitted step for each kind of groups of a batch's texts; see `group_texts`.
      pending: (step, metrics on the device) of the last step, not fetched yet.
      fetched: metrics of the steps since the last point of the learning curve.
      dev: the metrics of the last evaluation, as "dev/NAME" or "dev_pool/NAME".
      ended, preempted: whether the run ends after this step, and whether SIGTERM is why.
      progress: the progress bar; preemption: the handler of SIGTERM.
    """

    def __init__(
        self,
        model,
        data: _Data,
        checkpoints: Checkpoints,
        settings: TrainSettings,
        *,
        folder: Path,
        mesh: Mesh,
        rules: partitioning.Rules,
    ):
        self.model, self.data, self.checkpoints, self.settings = model, data, checkpoints, settings
        self.folder, self.mesh = folder, mesh
        self.shapes = multihost.global_batch_shapes(mesh, data.batch)
        self.plan = functools.partial(plan_train_step, model, self.shapes, settings, mesh=mesh, rules=rules)
        program = self.plan(groups=data.groups)
        # The first step does not trace it again. An objective that needs other batches says so here, before
        # any weights are read.
        program.trace()
        self.train_steps, self.abstract = {data.groups: program.function}, program.arguments[0]
        self.parameter_norm = jax.jit(optax.tree.norm).lower(self.abstract.params).compile()
        self.pending: tuple[int, dict] | None = None
        self.fetched: list[dict[str, float]] = []
        self.dev: dict[str, float] = {}
        self.ended, self.preempted = settings.steps == 0, False

    def restore(
        self,
        pretrained_params: Callable[[], Mapping[str, LazyArray]] | None,
        prepare_params: Callable[[dict, Collection[str]], dict] | None,
    ) -> None:
        """Reads the newest checkpoint that is not damaged, or makes the state before the first step."""
        restored = self.checkpoints.restore_newest(self.abstract.params, self.abstract.optimizer)
        if restored is None:
            self.step = 0
            given = pretrained_params() if pretrained_params else {}
            self.state = initial_state(
                self.model,
                self.abstract,
                self.shapes,
                self.settings.seed,
                pretrained_params=given,
            )
            if prepare_params:
                self.state = self.state.replace(params=prepare_params(self.state.params, given))
        else:
            params, optimizer, self.step = restored
            self.state = TrainState(
                params, optimizer, multihost.make_global_arrays(self.mesh, np.int32(self.step))
            )
            log(f"{self.folder}: going on from step {self.step}")
        if self.step != self.data.start:  # newer checkpoints were damaged
            examples = self.checkpoints.examples(self.step) if self.step else 0
            self.data.seek(self.step, examples)

    def watch(
        self,
        evaluator: Callable[[dict], dict[str, float]],
        describe_batch: Callable[[int], list[dict]] | None,
    ) -> None:
        """Opens all that measures the run and writes about it, from the restored step on."""
        self.evaluator = evaluator
        self.monitor = LossMonitor(
            self.settings.spike_guard,
            self.folder,
            describe_batch and (lambda step: describe_batch(self.data.position(step - 1))),
            unbounded_loss=self.model.unbounded_loss,
        )
        if self.step:
            position = self.checkpoints.position(self.step)
            self.monitor.resume(position, evaluations(self.folder, self.step))
            self.fetched = list(position.get(_UNLOGGED, ()))
        self.writer = MetricWriter(self.folder, self.step)
        flops_per_step = functools.partial(model_flops, self.model, self.shapes)
        self.meter = ThroughputMeter(self.mesh, self.writer.minutes_before, flops_per_step)
        self.profiler = Profiler(self.folder, self.settings.profile)

    def take_step(self) -> None:
        """Starts a step on the devices, and meanwhile fetches the metrics of the step before and a batch."""
        self.profiler.before(self.step)
        limit = []
        if self.settings.spike_guard.skips:
            limit = [multihost.make_global_arrays(self.mesh, np.float32(self.monitor.limit(self.step + 1)))]
        groups = self.data.groups
        if groups not in self.train_steps:
            self.train_steps[groups] = self.plan(groups=groups).function
        with self.meter.step(self.data.batch, groups):
            batch = multihost.make_global_batch(self.mesh, self.data.batch)
            self.state, metrics = self.train_steps[groups](self.state, batch, *limit)
            self.fetch_metrics()
            self.step += 1
            if self.is_due(self.settings.log_every):  # not at each step: it reads all parameters once more
                metrics["parameter_norm"] = self.parameter_norm(self.state.params)
            self.pending = (self.step, metrics)
            if self.step < self.settings.steps:
                with self.meter.waiting():
                    self.data.advance()
        self.profiler.after(self.step, metrics)
        self.progress(1)
        self.preempted = self.preemption.reached(self.step)
        self.ended = self.step >= self.settings.steps or self.preempted or self._is_out_of_time()

    def is_due(self, every: int) -> bool:
        """Tells whether what is done every so many steps is due after this step."""
        return self.step % every == 0

    def _is_out_of_time(self) -> bool:
        """Tells whether the time is up by the first process's clock, read when metrics are logged."""
        limit = self.settings.max_minutes
        if limit is None:
            return False
        if jax.process_count() == 1:
            return self.meter.minutes >= limit
        return self.is_due(self.settings.log_every) and bool(
            multihost.broadcast_from_process_0(self.meter.minutes >= limit)
        )

    def fetch_metrics(self) -> None:
        """Fetches the pending metrics from the devices, checks them, and logs them where that is due.

        Raises:
          Diverged: they went wrong.
        """
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        self.fetched.append({name: float(x) for name, x in jax.device_get(metrics).items()})
        self.monitor.check_step(step, self.fetched[-1])
        if step % self.settings.log_every == 0:
            self.log(step)

    def log(self, step: int) -> None:
        """Writes a point of the learning curve: the means of the metrics since the last, and the rates."""
        means = _means(self.fetched)
        means["parameter_norm"] = self.fetched[-1]["parameter_norm"]
        self.fetched.clear()
        self.writer.write(step, self.meter.minutes, means | self.meter.read())
        hits = {name: x for name, x in self.dev.items() if name.endswith("/Hits@10")}
        told = [f"loss {means.get('loss', math.nan):.2f}"]
        told += [f"{name.removeprefix('dev').lstrip('_/')} {x:.2f}" for name, x in hits.items()]
        self.progress(0, ", ".join(told))

    def save(self) -> None:
        """Saves a checkpoint, unless the metrics of the last step went wrong."""
        self.fetch_metrics()
        self.writer.flush()
        self.checkpoints.save(
            self.step,
            self.state.params,
            self.state.optimizer,
            examples=self.data.position(self.step),
            watch=self.monitor.state() | {_UNLOGGED: [*self.fetched]},
        )

    def evaluate(self) -> None:
        """Evaluates the parameters, and writes the metrics, the seconds that they took, and samples."""
        jax.block_until_ready(self.state)  # the last step's time is not the evaluation's
        began = time.monotonic()
        metrics = self.evaluator(self.state.params)
        seconds = {"evaluation_seconds": time.monotonic() - began}
        self.monitor.check_evaluation(self.step, metrics)
        self.checkpoints.retention.add(self.step, metrics)
        prefix = getattr(self.evaluator, "prefix", "dev")
        self.dev = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self.writer.write(self.step, self.meter.minutes, self.dev | seconds)
        self.writer.write_samples(self.step, getattr(self.evaluator, "samples", ()), prefix)
        self.writer.flush()

    def finish(self) -> dict:
        """Gives what `train_loop` returns, once all files are closed. Raises Preempted after SIGTERM."""
        step, steps, folder = self.step, self.settings.steps, self.folder
        if self.preempted:
            raise Preempted(
                f"{folder}: told to end; step {step} of {steps} is saved: the same command goes on"
            )
        if step < steps:
            minutes = self.settings.max_minutes
            log(f"{folder}: stopped at step {step} of {steps}, after {minutes} minutes (train.max_minutes)")
        multihost.on_process_0(lambda: None)  # the first process has written the curve
        best = self.checkpoints.best()
        if (best_step := best.get("best_step", step)) != step:
            log(f"{folder}: step {best_step} was the best on dev: --MODEL_STEP={best_step} takes that one")
        return summary(folder, step) | best


def _means(fetched: list[dict[str, float]]) -> dict[str, float]:
    """Gives the means of the steps' metrics. Of skipped steps only their number is given."""
    applied = [metrics for metrics in fetched if not metrics.get("skipped")]
    values: dict[str, list[float]] = {}  # of steps before a stop, which may have had other metrics, too
    for name, value in itertools.chain.from_iterable(metrics.items() for metrics in applied):
        values.setdefault(name, []).append(value)
    means = {name: sum(some) / len(some) for name, some in values.items()}
    if any("skipped" in metrics for metrics in fetched):
        means["skipped"] = len(fetched) - len(applied)
    return means
