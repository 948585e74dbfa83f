"""Steps a second of this project's trainer, a plain jitted loop over the same network, and T5X's trainer.

    python benchmarks/train_step.py [--quick] [--steps N] [--rounds N] [--only PART] [--collection FOLDER]

The same sizes, batches and optimiser (Adafactor, dropout 0.1) for all three:

- trainer: `train_loop`, all that a training run does at each step (metrics, guards, learning curve, progress)
  and at its end (a checkpoint, which is not in the time);
- plain: `jax.jit` of the loss's gradient and the optimiser's update, called in a loop that looks at each loss
  one step late; on the same network and the same step's dropout key;
- t5x: T5X's Trainer over its own network, where T5X can be imported (its checkout and what it needs, on
  PYTHONPATH); else null.

Runs take turns, so many rounds; each is timed from a few steps after compiling to its end, by when batches
are asked for (of T5X also by when its last step is done: it asks far ahead), and medians of the rounds'
ratios are given. Processor seconds a step (of all threads) stand beside them: other work on the machine
hardly changes those.

Then what packing is worth: examples a second of the trainer's step on queries of about 10 tokens and docids
of about 9 (of at most 25), in rows of their own and packed.

Then, with --collection (such as wordnet, whose glosses have about 20 tokens), what it is worth that a dual
encoder encodes most texts of a batch at a short length: the trainer's steps a second on the batches of
runs/dual_encoder.gin, over the same with all texts at the full length.

Prints tables, then one line of JSON: vs_plain_loop and vs_t5x (steps a second over theirs, by size; null
where T5X is absent), packed_over_padded, grouped_over_full (by size). --only runs one part: trainers, packing
or groups.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import _quiet  # noqa: F401
import _t5x
import _verbs
import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.examples.batches import batches as make_batches
from retrieval_jax.examples.features import Feature, pad
from retrieval_jax.examples.packing import pack_rows, row_lengths
from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.text_groups import long_texts
from retrieval_jax.training.group_texts import group_texts
from retrieval_jax.training.loop import train_loop
from retrieval_jax.training.optimizers import adafactor
from retrieval_jax.training.run import train_dataset
from retrieval_jax.training.settings import TrainSettings
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step
from retrieval_jax.verbs.table import configure_verbs
from retrieval_jax.verbs.train import TrainConfig

RATE = 1e-3
SIZES = {  # the demo's network; T5 1.1 Small, at a batch that a processor takes a second or two for
    "tiny": (T5Config(8192, 256, 4, 64, 256, 1, 1), 128, 32, 8),
    "small": (T5Config(32128, 512, 6, 64, 1024, 8, 8), 8, 64, 8),
}
DUAL_ENCODERS = {  # bindings over runs/dual_encoder.gin: the demo's network; a deeper one on smaller batches
    "tiny": [],
    "4 layers of 512": [
        "T5Config.emb_dim=512",
        "T5Config.num_heads=6",
        "T5Config.mlp_dim=1024",
        "T5Config.num_encoder_layers=4",
        "train.batch_size=32",
    ],
}
WARM_UP = 5  # batches taken before the clock starts: compiling, and what is fetched ahead
Batch = dict[str, np.ndarray]


class Clock:
    """Passes batches on, and remembers when each was asked for, and processor seconds until then."""

    def __init__(self, batches: list[Batch], warm_up: int = WARM_UP):
        self.batches, self.warm_up, self.times, self.processor = batches, warm_up, [], []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.tick()
        return self.batches[len(self.times) % len(self.batches)]

    def tick(self) -> None:
        self.times.append(time.perf_counter())
        self.processor.append(time.process_time())

    def steps_per_second(self) -> float:
        return (len(self.times) - 1 - self.warm_up) / (self.times[-1] - self.times[self.warm_up])

    def processor_seconds(self) -> float:
        """A step."""
        spent = self.processor[-1] - self.processor[self.warm_up]
        return spent / (len(self.times) - 1 - self.warm_up)


def random_batches(config: T5Config, rows: int, length: int, target: int) -> list[Batch]:
    rng = np.random.default_rng(0)

    def one() -> Batch:
        tokens = (rng.integers(1, config.vocab_size, (rows, n)).astype(np.int32) for n in (length, target))
        return DocidTargets.to_batch(dict(zip(("inputs", "targets"), tokens, strict=True)))

    return [one() for _ in range(8)]


def trainer(config: T5Config, clock: Clock, steps: int, scratch: Path) -> None:
    model = GenerativeRetriever(config, adafactor(optax.constant_schedule(RATE)))
    settings = TrainSettings(steps=steps, eval_every=steps, save_every=steps)
    train_loop(model, lambda _: clock, lambda _: {}, scratch, settings=settings)


def plain(config: T5Config, clock: Clock, steps: int, scratch: Path) -> None:
    model = GenerativeRetriever(config, adafactor(optax.constant_schedule(RATE)))
    mesh, first = partitioning.make_mesh(), next(clock)
    shapes = {name: array.shape for name, array in first.items()}
    state = initial_state(model, abstract_state(model, mesh, shapes), shapes, 0)

    def step(params, optimizer, batch, number):
        key = jax.random.fold_in(jax.random.key(0), number)
        (loss, _), gradients = jax.value_and_grad(model.loss_fn, has_aux=True)(params, batch, key)
        updates, optimizer = model.optimizer_def.update(gradients, optimizer, params)
        return optax.apply_updates(params, updates), optimizer, loss

    step, params, optimizer, before = jax.jit(step, donate_argnums=(0, 1)), state.params, state.optimizer, 0.0
    for number in range(steps):
        params, optimizer, loss = step(params, optimizer, next(clock), number)
        float(before)
        before = loss
    float(before)


def t5x(config: T5Config, clock: Clock, steps: int, scratch: Path) -> None:
    _t5x.train(config, clock, steps, RATE, scratch, done=clock.tick)


def compare(steps: int, rounds: int, sizes: list[str]) -> dict[str, dict[str, float]]:
    """Runner -> size -> the trainer's steps a second over its own: the median of the rounds."""
    runners: dict[str, Callable] = {"trainer": trainer, "plain": plain}
    if _t5x.importable():
        runners["t5x"] = t5x
    table = Table("size", "runner", "steps/s", "trainer's over it", "processor s/step")
    ratios: dict[str, dict[str, float]] = {name: {} for name in [*runners][1:]}
    for size in sizes:
        config, *shape = SIZES[size]
        batches = random_batches(config, *shape)
        rates, processor = {name: [] for name in runners}, {name: [] for name in runners}
        for number in range(rounds):
            for name, run in runners.items():
                clock = Clock(batches)
                with tempfile.TemporaryDirectory() as scratch:
                    run(config, clock, steps, Path(scratch))
                rates[name].append(clock.steps_per_second())
                processor[name].append(clock.processor_seconds())
                log(f"{size}, round {number + 1}: {name} {rates[name][-1]:.2f} steps/s")
                jax.clear_caches()
        for name in runners:
            over = statistics.median(a / b for a, b in zip(rates["trainer"], rates[name], strict=True))
            medians = statistics.median(rates[name]), over, statistics.median(processor[name])
            table.add_row(size, name, f"{medians[0]:.2f}", f"{over:.3f}", f"{medians[2]:.3f}")
            if name in ratios:
                ratios[name][size] = round(over, 3)
    Console().print(table)
    return ratios


def packed_over_padded(pack: int = 3, examples: int = 384, length: int = 32) -> float:
    """Examples a second of short examples packed over those in rows of their own, on the tiny network."""
    rng = np.random.default_rng(0)
    features = {"inputs": Feature(length, add_eos=True), "targets": Feature(25)}

    def tokens(mean: float, most: int) -> list[int]:
        return rng.integers(2, 8192, np.clip(rng.poisson(mean), 1, most)).tolist()

    some = [{"inputs": tokens(8, length - 1), "targets": tokens(9, 25)} for _ in range(examples)]
    batches = {
        "rows of their own": DocidTargets.to_batch(pad(some, features)),
        f"packed, {pack} a row": pack_rows(some, features, examples // pack, row_lengths(features, pack, 9)),
    }
    table = Table("batch of the same examples", "rows", "input tokens", "target tokens", "examples/s")
    model = GenerativeRetriever(SIZES["tiny"][0], adafactor(optax.constant_schedule(RATE)))
    mesh, rates = partitioning.make_mesh(), []
    for name, batch in batches.items():
        shapes = {key: array.shape for key, array in batch.items()}
        abstract = abstract_state(model, mesh, shapes)
        state, step = initial_state(model, abstract, shapes, 0), make_train_step(model, mesh, abstract, 0)
        placed = jax.device_put(batch, partitioning.batch_sharding(mesh))
        seconds = []
        for _ in range(12):
            began = time.perf_counter()
            state, metrics = step(state, placed)
            float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
        rates.append(examples / statistics.median(seconds[2:]))
        shape = (*shapes["encoder_input_tokens"], shapes["decoder_target_tokens"][1])
        table.add_row(name, *map(str, shape), f"{rates[-1]:,.0f}")
    Console().print(table)
    return rates[1] / rates[0]


def dual_encoder(collection: Collection, work: Workspace, bindings: list[str]) -> tuple:
    """(a function that makes the model, some batches, as runs/dual_encoder.gin has them)."""
    configure_verbs(
        ["runs/dual_encoder.gin"], ["COLLECTION='-'", "DOCIDS=None", "learning_rate.steps=1000", *bindings]
    )
    config, vocabulary = TrainConfig(), Vocabulary(collection.vocabulary_path)

    def make():
        return config.make_model(vocabulary.size, None)

    examples = train_dataset(config.data, work, collection, make(), None)
    stream = make_batches(
        examples.stages(), examples.targets, config.data.token_dropout, config.batch_size, config.seed
    )
    return make, [*itertools.islice(stream, 8)]


def computed_tokens(batches: list[Batch], arrays: tuple[str, ...], grouped: bool) -> float:
    """Tokens, padding included, that a step encodes in the mean."""
    total = 0
    for batch, groups in group_texts(iter(batches), arrays, partitioning.make_mesh()):
        for i, name in enumerate(arrays):
            full = batch[name].shape[-1]
            count = batch[name].size // full
            long = long_texts(count)
            length = groups.lengths[i] if grouped and groups else full
            total += long * full + (count - long) * length
    return total / len(batches)


def grouped_over_full(source: str, steps: int, rounds: int) -> dict[str, float]:
    """Size -> steps a second with a batch's texts in groups by length over those at the full lengths."""
    table = Table(
        "dual encoder", "texts", "tokens a step", "real", "steps/s", "over full", "processor s/step"
    )
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Workspace(Path(scratch) / "work")
        _verbs.run("import", f"--COLLECTION={source}", f"--WORK_DIR={work.folder}")
        collection = Collection(work.collection)
        for size, bindings in DUAL_ENCODERS.items():
            make, batches = dual_encoder(collection, work, bindings)
            arrays = make().text_arrays
            real = sum(np.count_nonzero(batch[name]) for batch in batches for name in arrays) / len(batches)
            clocks = {"at the full length": [], "in groups": []}
            for number, name in itertools.product(range(rounds), clocks):
                model = make()
                model.text_arrays = arrays if name == "in groups" else ()
                clock = Clock(batches, warm_up=len(batches) + 2)  # each kind of batch has compiled
                settings = TrainSettings(steps=steps, eval_every=steps, save_every=steps)
                with tempfile.TemporaryDirectory() as folder:
                    train_loop(
                        model, lambda _, clock=clock: clock, lambda _: {}, Path(folder), settings=settings
                    )
                clocks[name].append(clock)
                log(f"{size}, round {number + 1}: {name} {clock.steps_per_second():.2f} steps/s")
            rates = {name: [clock.steps_per_second() for clock in some] for name, some in clocks.items()}
            for name, some in clocks.items():
                over = statistics.median(
                    a / b for a, b in zip(rates[name], rates["at the full length"], strict=True)
                )
                tokens = computed_tokens(batches, arrays, name == "in groups")
                spent = statistics.median(clock.processor_seconds() for clock in some)
                row = f"{tokens:,.0f}", f"{real / tokens:.0%}", f"{statistics.median(rates[name]):.2f}"
                table.add_row(size, name, *row, f"{over:.2f}", f"{spent:.3f}")
            found[size] = round(over, 2)
    Console().print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny size, one round of a few steps")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("trainers", "packing", "groups"), help="one part of it")
    parser.add_argument("--collection", help="whose batches a dual encoder is trained on; none without it")
    args = parser.parse_args()
    log(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}")
    steps, rounds, sizes = (20, 1, ["tiny"]) if args.quick else (args.steps, args.rounds, [*SIZES])
    made = {}
    if args.only in (None, "trainers"):
        ratios = compare(steps, rounds, sizes)
        made |= {"vs_plain_loop": ratios["plain"], "vs_t5x": ratios.get("t5x")}
    if args.only in (None, "packing"):
        made["packed_over_padded"] = round(packed_over_padded(), 2)
    if args.collection and args.only in (None, "groups"):
        made["grouped_over_full"] = grouped_over_full(args.collection, max(steps, 20), rounds)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
