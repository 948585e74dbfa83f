"""The verb `train`: examples become a checkpoint. Reads from top to bottom as the story of a run."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import flax
import flax.linen as nn
import gin
import jax
import numpy as np
import optax

from retrieval_jax import storage
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError
from retrieval_jax.evaluation.report import read_curve
from retrieval_jax.models.t5 import T5Config
from retrieval_jax.progress import bar, say
from retrieval_jax.training import checkpoints, partitioning
from retrieval_jax.training.evaluate import DevQueries
from retrieval_jax.work import Work

Batch = dict[str, np.ndarray]


@flax.struct.dataclass
class TrainState:
    """What a step changes: parameters, the optimiser's state, and the number of steps taken (int32)."""

    params: dict
    optimizer: optax.OptState
    step: jax.Array


@gin.configurable
def train(
    source: str,
    retriever: type,
    optimizer: Callable[[], optax.GradientTransformation],
    work_dir: str | None = None,
    model_dir: str | None = None,
    docids: str | None = None,
    steps: int = 1000,
    batch_size: int = 128,
    input_length: int = 64,
    passage_length: int = 128,
    rates: Mapping[str, float] | None = None,
    chunk_length: int = 64,
    drop_rates: Mapping[str, float] | None = None,
    seed: int = 0,
    eval_every: int = 500,
    save_every: int = 500,
    max_minutes: float | None = None,
) -> dict:
    """Trains a retriever on a collection that was imported, from its newest checkpoint on.

    Args:
      source, work_dir: the collection, and where its work lies.
      retriever: a class with T5X's model interface: GenerativeRetriever or DualEncoder.
      optimizer: makes the optax optimiser.
      model_dir: the model's folder; None is models/DOCIDS of the work folder, or models/dual_encoder.
      docids: kind of docids to write (generative retrievers).
      steps, batch_size: batches to train on, and their examples.
      input_length, passage_length: tokens of an input, and of a passage (dual encoder).
      rates: task -> share of the examples (firstp, chunks, queries).
      chunk_length: tokens of a random chunk.
      drop_rates: task -> share of the input's tokens left out.
      seed: of the parameters, the data's order and the dropout.
      eval_every: steps between two searches for the dev queries.
      save_every: steps between two checkpoints.
      max_minutes: ends earlier after so many minutes of training (as the clock goes, evaluation included).
    """
    work = Work.of(source, work_dir)
    collection = Collection(work.collection)
    table = DocidTable.open(work.docids(docids)) if docids else None
    folder = Path(model_dir) if model_dir else work.model(docids or "dual_encoder")
    vocabulary = Vocabulary(collection.vocabulary_path)
    check_inputs(folder, retriever, collection, table)

    config = T5Config(
        vocab_size=vocabulary.size, output_size=table.output_size if table and docids == "atomic" else None
    )
    model = retriever(config, optimizer())
    description = checkpoints.describe(
        model,
        input_length=input_length,
        passage_length=passage_length,
        collection_name=collection.name,
        collection=collection.fingerprint,
        docids=docids,
        docids_fingerprint=table.fingerprint() if table else None,
    )
    prepare_folder(folder, description, collection)

    lengths = model.feature_lengths(input_length, passage_length, table.length if table else 0)

    def batches(position: int) -> Iterator[Batch]:
        from retrieval_jax.data import tasks  # imports TensorFlow

        mixture = tasks.register(
            collection,
            table,
            rates or {"firstp": 1, "chunks": 1, "queries": 1},
            chunk_length,
            drop_rates or {},
        )
        converter = model.FEATURE_CONVERTER_CLS(pack=False, apply_length_check=False)  # checked by trimming
        return tasks.batches(mixture, lengths, converter, batch_size, seed, position)

    dev = DevQueries(model, collection, table, vocabulary, input_length, passage_length)
    return {"model": str(folder)} | fit(
        model, batches, dev, folder, steps, seed, eval_every, save_every, max_minutes
    )


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
    state, shardings = initial_state(model, mesh, {k: v.shape for k, v in first.items()}, seed)
    if start:
        abstract = abstract_state(state, shardings)
        params, optimizer, position = saved.restore(start, abstract.params, abstract.optimizer)
        state = TrainState(params, optimizer, jax.device_put(np.int32(start), shardings.step))
        assert position == start
        say(f"{folder}: going on from step {start}")
    curve = Curve(folder, start)
    step_fn = make_train_step(model, mesh, shardings, seed)
    batch_sharding = partitioning.batch_sharding(mesh)

    began = time.monotonic()

    def minutes() -> float:
        return curve.minutes_before + (time.monotonic() - began) / 60

    def out_of_time() -> bool:
        return max_minutes is not None and minutes() >= max_minutes

    losses: list[float] = []
    waiting: tuple[int, dict] | None = None  # the last step's number and metrics, still on the device
    last: dict[str, float] = {}
    step, batch = start, first

    with bar(f"train {folder.name}", steps, start) as advance:

        def fetch() -> None:
            """Takes in the waiting metrics; tells the mean loss of every `log_every` steps."""
            nonlocal waiting
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
                curve.add(number, minutes(), {"loss": loss})
                hits = f", Hits@10 {last['dev/Hits@10']:.2f}" if "dev/Hits@10" in last else ""
                advance(0, f"loss {loss:.2f}{hits}")

        while step < steps and not out_of_time():
            state, metrics = step_fn(state, jax.device_put(batch, batch_sharding))
            fetch()  # of the step before, while this one runs
            step += 1
            waiting = (step, metrics)
            if step < steps:
                batch = next(data)
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
    """What training up to `step` came to, as its learning curve tells."""
    path = folder / "learning_curve.jsonl"
    points = [p for p in read_curve(path) if p["step"] <= step] if path.exists() else []
    dev = {key: value for p in points for key, value in p.items() if key.startswith("dev/")}
    return {"step": step, "minutes": max([p["minutes"] for p in points], default=0.0), **dev}


def initial_state(model, mesh, shapes: Mapping[str, tuple], seed: int) -> tuple[TrainState, TrainState]:
    """(state, its shardings), made on the mesh: no host ever holds all of it."""

    def boxed():
        return model.get_initial_variables(jax.random.key(seed), shapes)["params"]

    def init() -> TrainState:
        params = nn.unbox(boxed())
        return TrainState(params, model.optimizer_def.init(params), np.int32(0))

    abstract = jax.eval_shape(init)
    params = partitioning.params_shardings(mesh, jax.eval_shape(boxed))
    optimizer = partitioning.like_params(mesh, abstract.optimizer, abstract.params, params)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = TrainState(params, optimizer, replicated)
    return jax.jit(init, out_shardings=shardings)(), shardings


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, for restoring into."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
    )


def make_train_step(model, mesh, shardings: TrainState, seed: int) -> Callable:
    """The jitted step: (state, batch) -> (state, metrics); the old state's memory is given up."""

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict]:
        # A function of the step alone, so a resumed run draws the same dropout.
        dropout_rng = jax.random.fold_in(jax.random.key(seed), state.step)
        loss = jax.value_and_grad(model.loss_fn, has_aux=True)
        (_, metrics), gradients = loss(state.params, batch, dropout_rng)
        updates, optimizer = model.optimizer_def.update(gradients, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), optimizer, state.step + 1), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, partitioning.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def check_inputs(folder: Path, retriever: type, collection: Collection, table: DocidTable | None) -> None:
    """Raises UserError where model, docids and collection do not belong together."""
    if retriever.reads_docids and table is None:
        raise UserError(f"{folder}: a {retriever.family} retriever needs docids: --gin.DOCIDS=\"'naive'\"")
    if not retriever.reads_docids and table is not None:
        raise UserError(f"{folder}: a {retriever.family} writes no docids: --gin.DOCIDS=None")
    if table and table.collection != collection.fingerprint:
        raise UserError(
            f"docids/{table.kind}: of another collection than {collection.folder}: `retrieval-jax docids`"
        )


def prepare_folder(folder: Path, description: dict, collection: Collection) -> None:
    """Writes what the model is; raises UserError where the folder already holds another model."""
    path = folder / "model.json"
    if path.exists():
        there = storage.read_json(path, "delete the folder")
        for key, value in description.items():
            if there.get(key) != value:
                raise UserError(
                    f"{path}: {key} is {there.get(key)!r} there and {value!r} here: "
                    "another model was trained in this folder; name another MODEL_DIR, or delete it"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(collection.vocabulary_path, folder / "sentencepiece.model")
    (folder / "config.gin").write_text(gin.operative_config_str())
    storage.write_json(path, description)
