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
from retrieval_jax.data.batches import Batch
from retrieval_jax.data.batches import batches as make_batches
from retrieval_jax.data.records import Collection
from retrieval_jax.data.training_data import TrainingData
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError
from retrieval_jax.evaluation.report import read_curve
from retrieval_jax.models.t5 import T5Config
from retrieval_jax.progress import bar, say
from retrieval_jax.training import checkpoints, partitioning
from retrieval_jax.training.evaluate import DevLoss, DevQueries
from retrieval_jax.work import Work

# A model's folder where it has no docids to be named after.
DEFAULT_NAMES = {"docids": "naive", "passages": "dual_encoder", "query": "doc2query"}


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
    data: TrainingData,
    work_dir: str | None = None,
    model_dir: str | None = None,
    docids: str | None = None,
    steps: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
    eval_every: int = 500,
    save_every: int = 500,
    max_minutes: float | None = None,
) -> dict:
    """Trains a retriever on a collection that was imported, from its newest checkpoint on.

    Args:
      source, work_dir: the collection, and where its work lies.
      retriever: a class with T5X's model interface: GenerativeRetriever, DualEncoder or QueryGenerator.
      optimizer: makes the optax optimiser.
      data: which examples; see TrainingData's parameters (--gin.TrainingData.NAME=VALUE).
      model_dir: the model's folder; None is models/DOCIDS of the work folder, models/dual_encoder or
        models/doc2query.
      docids: kind of docids to write (generative retrievers).
      steps, batch_size: batches to train on, and their examples.
      seed: of the parameters, the data's order and the dropout.
      eval_every: steps between two searches for the dev queries.
      save_every: steps between two checkpoints.
      max_minutes: ends earlier after so many minutes of training (as the clock goes, evaluation included).
    """
    work = Work.of(source, work_dir)
    collection = Collection(work.collection)
    table = DocidTable.open(work.docids(docids)) if docids else None
    folder = Path(model_dir) if model_dir else work.model(docids or DEFAULT_NAMES[retriever.answer])
    check_inputs(folder, retriever, collection, table)

    examples = data.of(work, collection, retriever.answer, table)
    vocabulary = examples.vocabulary
    config = T5Config(vocab_size=vocabulary.size, **(docid_softmax(table) if table else {}))
    model = retriever(config, optimizer())
    description = checkpoints.describe(
        model,
        input_length=data.input_length,
        passage_length=data.passage_length,
        collection_name=collection.name,
        collection=collection.fingerprint,
        docids=docids,
        docids_fingerprint=table.fingerprint() if table else None,
    )
    prepare_folder(folder, description, collection)

    def batches(position: int) -> Iterator[Batch]:
        host, hosts = jax.process_index(), jax.process_count()
        return make_batches(
            examples.stages(), examples.targets, data.drop_rates, batch_size, seed, position, host, hosts
        )

    if retriever.answer == "query":
        dev = DevLoss(model, collection, examples.targets)
    else:
        dev = DevQueries(model, collection, table, vocabulary, data.input_length, data.passage_length)
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


def docid_softmax(table: DocidTable) -> dict:
    """The sizes of a T5 that writes a table's docids; its decoder reads them only if they go on."""
    own = table.own_vocabulary
    return {"output_size": table.output_size if own else None, "reads_outputs": own and table.length > 1}


def check_inputs(folder: Path, retriever: type, collection: Collection, table: DocidTable | None) -> None:
    """Raises UserError where model, docids and collection do not belong together."""
    reads_docids = retriever.answer == "docids"
    if reads_docids and table is None:
        raise UserError(f"{folder}: a {retriever.family} retriever needs docids: --gin.DOCIDS=\"'naive'\"")
    if not reads_docids and table is not None:
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
