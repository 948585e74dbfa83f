"""The verb `train`: examples become a checkpoint. Reads from top to bottom as the story of a run."""

import functools
from collections.abc import Callable, Iterator, Sequence

import gin
import numpy as np
import optax

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegativeFloat, Positive, Seed
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.batches import Batch
from retrieval_jax.examples.batches import batches as make_batches
from retrieval_jax.examples.batches import examples_of as told_examples
from retrieval_jax.examples.tasks import Task
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.mesh import multihost, partitioning
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training import settings
from retrieval_jax.training.evaluators import METRICS
from retrieval_jax.training.families import family_of
from retrieval_jax.training.loop import train_loop
from retrieval_jax.training.run import check_inputs, make_model, prepare_folder, run_settings, train_dataset


@gin.configurable
def train(
    source: str,
    retriever: type[Retriever],
    optimizer: Callable[[], optax.GradientTransformation],
    data: DataConfig,
    initial: InitialCheckpoint,
    work_dir: str | None = None,
    model_dir: str | None = None,
    docids: str | None = None,
    steps: Positive = 1000,
    batch_size: Positive = 128,
    seed: Seed = 0,
    eval_every: Positive = 500,
    save_every: Positive = 500,
    keep: Positive = 2,
    keep_best: str | None = "MRR@10",
    max_minutes: NonNegativeFloat | None = None,
    log_every: Positive = 10,
    profile: Sequence[int] | None = None,
    on_change: str = "refuse",
) -> dict:
    """Trains a retriever on a collection that was imported, from its newest checkpoint on.

    Args:
      source, work_dir: the collection, and where its work lies.
      retriever: a class with T5X's model interface: GenerativeRetriever, DualEncoder or QueryGenerator.
      optimizer: makes the optax optimiser.
      data: which examples; see DataConfig's parameters (--gin.DataConfig.NAME=VALUE).
      initial: weights to begin with (--gin.INITIAL_CHECKPOINT); see InitialCheckpoint's parameters
        (--gin.InitialCheckpoint.NAME=VALUE).
      model_dir: the model's folder; None is models/DOCIDS of the work folder, models/dual_encoder or
        models/doc2query.
      docids: kind of docids to write (generative retrievers).
      steps, batch_size: batches to train on, and their examples.
      seed: of the parameters, the data's order and the dropout.
      eval_every: steps between two searches for the dev queries.
      save_every: steps between two checkpoints.
      keep: how many of the newest checkpoints stay on disk.
      keep_best: the dev metric by which the best one stays beside them, of those that were both saved and
        evaluated: "MRR@10", "Hits@1", "Hits@10", a query generator's "loss", or None.
      max_minutes: ends earlier after so many minutes of training (as the clock goes, evaluation included).
      log_every: steps between two points of the learning curve.
      profile: (step, steps) to trace for TensorBoard's profile plugin: from that step on, so many.
      on_change: where the folder's run had another seed (or random bits), batch size (or a dual encoder's
        microbatches), data, objective or learning rate:
        "refuse", which tells what differs, or "accept", which goes on with the new ones.
    """
    if keep_best not in (None, *METRICS):
        raise UserError(f"train.keep_best: no metric {keep_best!r}: {', '.join(METRICS)} or None")
    family, work = family_of(retriever), Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    table = DocidTable.open(work.docids(docids)) if docids else None
    folder = paths.as_path(model_dir) if model_dir else work.model(docids or family.folder_name)
    check_inputs(folder, retriever, collection, table)

    vocabulary = Vocabulary(collection.vocabulary_path)
    model = make_model(retriever, optimizer, vocabulary.size, table)
    pretrained_params = initial.arrays_for(model, collection.vocabulary_path)
    examples = train_dataset(data, work, collection, model, table)
    description = model_folder.describe(
        model,
        input_length=data.input_length,
        passage_length=data.passage_length,
        collection_name=collection.name,
        collection=collection.fingerprint,
        docids=docids,
        docids_fingerprint=table.fingerprint() if table else None,
        initial_checkpoint=initial.path,
    )
    stages = examples.stages()  # before anything is written: tells of tasks that are not there
    chosen = run_settings(retriever, examples, steps, batch_size, seed)

    def prepare() -> None:
        prepare_folder(folder, description, collection)
        settings.keep(folder, chosen, on_change)

    multihost.on_process_0(prepare)
    if not multihost.is_process_0():
        prepare()  # sees what the first one wrote, and compares
    mesh = partitioning.make_mesh()
    rows = multihost.local_rows(mesh, batch_size)

    def batches(position: int) -> Iterator[Batch]:
        return make_batches(
            stages, examples.targets, data.drop_rates, batch_size, seed, position, rows, data.pack
        )

    made = train_loop(
        model,
        batches,
        family.evaluator(model, examples, mesh),
        folder,
        steps=steps,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
        max_minutes=max_minutes,
        log_every=log_every,
        examples_of=functools.partial(describe_batch, examples, batch_size, seed, tasks={}),
        profile=profile,
        pretrained_params=pretrained_params,
        batch_size=batch_size,
        keep=keep,
        keep_best=keep_best,
        mesh=mesh,
    )
    return {"model": str(folder)} | made


def describe_batch(
    examples: TrainDataset, batch_size: int, seed: int, position: int, tasks: dict[str, Task] | None = None
) -> list[dict]:
    """The examples of the batch after `position` examples: task, number, the text, and its passages' ids.

    `tasks` keeps the tasks from one call to the next: making them reads all train queries.
    """
    tasks = {} if tasks is None else tasks

    def tell(name: str, number: int, rng: np.random.Generator) -> dict:
        if name not in tasks:
            tasks[name] = examples.computed(name).task
        example = tasks[name](number, rng)
        (text,) = examples.vocabulary.decode(np.array([example.tokens]))
        ids = [examples.collection.ids[int(row)].as_py() for row in example.rows]
        return {"task": name, "number": number, "text": text, "passages": ids}

    return told_examples(examples.stages(), batch_size, seed, position, tell)
