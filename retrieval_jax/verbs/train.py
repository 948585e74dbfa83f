"""The verb `train`: examples become a checkpoint."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import gin
import numpy as np
import optax
from jax.sharding import Mesh

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.pretrained import OUTPUT
from retrieval_jax.checkpoints.weights import LazyArray
from retrieval_jax.core import configuration, paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Names, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Seed
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.docids.table import DocidShape, DocidTable
from retrieval_jax.docids.term_weights import token_idf
from retrieval_jax.examples.batches import Batch
from retrieval_jax.examples.batches import batches as make_batches
from retrieval_jax.examples.batches import examples_of as told_examples
from retrieval_jax.examples.tasks import Task
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.mesh import multihost, partitioning
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training import chance, settings_file
from retrieval_jax.training.docid_columns import begin_as_passages
from retrieval_jax.training.evaluators import METRICS, Evaluator
from retrieval_jax.training.families import family_of
from retrieval_jax.training.loop import train_loop
from retrieval_jax.training.loss_spike_guard import LossSpikeGuard
from retrieval_jax.training.run import check_inputs, make_model, prepare_folder, run_settings, train_dataset
from retrieval_jax.training.settings import TrainSettings

GENERATOR = Names("a generator of random bits", ("threefry2x32", "rbg", "unsafe_rbg"))


@gin.configurable("train")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a retriever on an imported collection, resuming from its newest checkpoint.

    Args:
      source: the collection, as `import` takes it.
      work_dir: its work folder; None is `work/NAME`.
      retriever: a class with T5X's model interface: GenerativeRetriever, DualEncoder, LexicalEncoder
        or QueryGenerator.
      optimizer: @adamw or @adafactor; their parameters: --gin.adamw.NAME=VALUE.
      data: which examples. Its parameters (--gin.DataConfig.NAME=VALUE) are listed by DataConfig in
        retrieval_jax/examples/training_data.py; retrieval_jax/data/README.md shows the tasks.
      initial: weights to begin with (--INITIAL_CHECKPOINT). Its parameters
        (--gin.InitialCheckpoint.NAME=VALUE) are listed in retrieval_jax/interop/README.md.
      model_dir: the model's folder; None is models/DOCIDS of the work folder, models/dual_encoder,
        models/lexical or models/doc2query.
      docids: the kind of docids to write (generative retrievers).
      docids_from_passages: whether the softmax's column of each docid of one token begins as what the
        network, before the first step, makes of the docid's passage; see training/docid_columns.py. Docids of
        several tokens begin at random in any case.
      steps: training steps of the whole run; None: `steps_factor` times the square root of the number of
        passages; 0: the parameters that it would begin with are evaluated and saved.
      steps_factor: see `steps`. A collection of four times the passages has more words, too, but not four
        times as many, and each step of atomic docids takes four times as long.
      batch_size: examples of a batch, on all hosts together.
      seed: of the random parameters, the data's order and dropout.
      microbatches: number of equal parts of a batch whose gradients are accumulated, for less memory. A part
        counts by its tokens, so that the gradient is the whole batch's. A dual encoder's in-batch negatives,
        and the means of FLOPS regularisers, are those of the part.
      random_bits: the generator of dropout's random bits: "threefry2x32", or "rbg", the own generator of a
        TPU or GPU, which is much faster there.
      eval_every: steps between two searches for the dev queries. A dual encoder searches a pool of passages
        (--gin.DenseEvaluator.pool_size; None: as many as cost 5% of the training, 0: the whole collection).
      save_every: steps between two checkpoints.
      keep: number of newest checkpoints that stay on disk.
      keep_best: the dev metric by which the best checkpoint stays beside them, of those that were both saved
        and evaluated: "MRR@10", "Hits@1", "Hits@10", a query generator's "loss", or None.
      max_minutes: minutes of training, evaluations included, after which the run ends early.
      log_every: steps between two points of the learning curve.
      profile: (steps before, steps to trace) for TensorBoard's profile plugin.
      on_change: where the folder's run had another seed (or random bits), batch size (or microbatches, where
        examples interact), data, objective or learning rate: "refuse" says what differs, "accept" goes on
        with the new values.
    """

    source: str | None = None
    retriever: type[Retriever] | None = None
    optimizer: Callable[[], optax.GradientTransformation] | None = None
    data: DataConfig | None = None
    initial: InitialCheckpoint | None = None
    work_dir: str | None = None
    model_dir: str | None = None
    docids: str | None = None
    docids_from_passages: bool = False
    steps: NonNegative | None = 1000
    steps_factor: PositiveFloat = 6.0
    batch_size: Positive = 128
    seed: Seed = 0
    microbatches: Positive = 1
    random_bits: Annotated[str, GENERATOR] = "threefry2x32"
    eval_every: Positive = 500
    save_every: Positive = 500
    keep: Positive = 2
    keep_best: str | None = "MRR@10"
    max_minutes: NonNegativeFloat | None = None
    log_every: Positive = 10
    profile: Sequence[int] | None = None
    on_change: str = "refuse"

    def __post_init__(self):
        for name in ("source", "retriever", "optimizer", "data"):
            if getattr(self, name) is None:
                raise UserError(f"train.{name}: not set: name a run, as --gin_file=runs/naive.gin")
        if self.keep_best not in (None, *METRICS):
            raise UserError(f"train.keep_best: no metric {self.keep_best!r}: {', '.join(METRICS)} or None")

    @property
    def settings(self) -> TrainSettings:
        """What the training loop takes."""
        names = {field.name for field in dataclasses.fields(TrainSettings)} - {"spike_guard"}
        return TrainSettings(**{name: getattr(self, name) for name in names}, spike_guard=LossSpikeGuard())

    def make_model(self, vocab_size: int, docids: DocidTable | DocidShape | None):
        """Makes the model for a text vocabulary, and for the docids that it writes, if it does."""
        return make_model(self.retriever, self.optimizer, vocab_size, docids)


@contextlib.contextmanager
def sized_config(passages: int, **values: object) -> Iterator[TrainConfig]:
    """A context in which all that gin leaves open has a value that fits the collection.

    Args:
      passages: the number of passages.
      **values: of TrainConfig's attributes; those that are left out are gin's.

    Yields:
      The configuration. Inside, gin has its number of steps, too.
    """
    config = TrainConfig(**values)
    if config.steps is not None:
        yield config
        return
    # Below all that is set: nothing has set it.
    with configuration.run_file(None, f"STEPS = {steps_for(passages, config.steps_factor)}"):
        yield TrainConfig(**values)


def steps_for(passages: int, factor: float) -> int:
    """Gives the number of training steps for a collection: `factor`·√passages, in tens; at least 100."""
    return max(10 * round(factor * math.sqrt(passages) / 10), 100)


def train(**values: object) -> dict:
    """Trains a retriever.

    Args:
      **values: of TrainConfig's attributes; those that are left out are gin's.

    Returns:
      What `train_loop` returns; "model", the folder; "left_chance", whether the model has learned, where that
      can be told (see `chance.verdict`); and "cut", where the clock (`max_minutes`) ended the training.
    """
    asked = TrainConfig(**values)
    work = Workspace.for_source(asked.source, asked.work_dir)
    collection = Collection(work.collection)
    with sized_config(collection.passage_count, **values) as config:
        if asked.steps is None:
            log(
                f"train: {config.steps} steps of {config.batch_size} examples, as the collection has "
                f"{collection.passage_count:,} passages ({config.steps_factor:g}·√passages; or --STEPS=N)"
            )
        return _train(config, work, collection)


def _train(config: TrainConfig, work: Workspace, collection: Collection) -> dict:
    table = DocidTable.open(work.docids(config.docids)) if config.docids else None
    family = family_of(config.retriever)
    name = config.docids or family.folder_name
    folder = paths.as_path(config.model_dir) if config.model_dir else work.model(name)
    check_inputs(folder, config.retriever, collection, table)

    vocabulary = Vocabulary(collection.vocabulary_path)
    model = config.make_model(vocabulary.size, table)
    pretrained_params = _pretrained_params(config, folder, model, collection, work)
    data, settings = config.data, config.settings
    examples = train_dataset(data, work, collection, model, table)
    stages = examples.stages()  # before anything is written: raises where a task's examples are not there
    _prepare(config, folder, model, examples)

    mesh, rules = partitioning.make_partitioner()
    rows = multihost.local_rows(mesh, settings.batch_size)

    def batches(position: int) -> Iterator[Batch]:
        return make_batches(
            stages,
            examples.targets,
            examples.token_dropout,
            settings.batch_size,
            settings.seed,
            position,
            rows,
            data.pack,
        )

    from_passages = config.docids_from_passages and table is not None and table.length == 1
    evaluator = family.evaluator(model, examples, settings, mesh)
    made = train_loop(
        model,
        batches,
        evaluator,
        folder,
        settings=settings,
        mesh=mesh,
        rules=rules,
        pretrained_params=pretrained_params,
        prepare_params=functools.partial(_begin_docids, model, examples, mesh, rules)
        if from_passages
        else None,
        describe_batch=functools.partial(
            describe_batch, examples, settings.batch_size, settings.seed, tasks={}
        ),
    )
    if made["step"] < settings.steps:
        made["cut"] = f"step {made['step']} of {settings.steps}"
    return {"model": str(folder)} | made | _left_chance(model, examples, evaluator, folder, made)


def _left_chance(
    model: Retriever, examples: TrainDataset, evaluator: Evaluator, folder: Path, made: dict
) -> dict:
    """Tells whether the model has learned, and what to do if not; {"left_chance"} where that can be told."""
    loss = chance.last_loss(folder)
    verdict = chance.verdict(model, examples, evaluator, made, loss)
    if verdict is None:
        return {}
    if multihost.is_process_0():
        log(f"{folder}: {verdict.text}")
    return {"left_chance": verdict.left}


def _begin_docids(
    model: Retriever,
    examples: TrainDataset,
    mesh: Mesh,
    rules: partitioning.Rules,
    params: dict,
    given: Container[str],
) -> dict:
    """Lets docids begin as their passages, where no weights were given to begin with."""
    return params if OUTPUT in given else begin_as_passages(model, params, examples, mesh, rules)


def _pretrained_params(
    config: TrainConfig, folder: Path, model: Retriever, collection: Collection, work: Workspace
) -> Callable[[], dict[str, LazyArray]]:
    """Returns a function that gives the parameters to begin with.

    They are matched with the model at once, before anything is written. A run that goes on from a checkpoint
    does not need them: its prompts are in model.json, and nothing is downloaded.
    """
    initial = config.initial
    if not initial or not (initial.path or initial.docid_centroids or initial.lexical_idf):
        return dict
    centroids = None
    if initial.docid_centroids:
        if not config.docids:
            raise UserError(
                f"InitialCheckpoint.docid_centroids: a {model.family} writes no docids: leave it out"
            )
        centroids = docid_kind(config.docids).centroids(work.docids(config.docids))
    gains = lexical_gains(collection, initial.lexical_idf) if initial.lexical_idf else None
    give = functools.partial(initial.arrays_for, model, collection.vocabulary_path, centroids, gains)
    if not model_folder.is_begun(folder):
        return functools.partial(dict, give())
    if isinstance(model, DualEncoder):
        model.inherit_prompts(model_folder.read_description(folder)["settings"])
    return give


def lexical_gains(collection: Collection, power: float) -> LazyArray:
    """Gives a power of the tokens' inverse document frequencies, which are counted when they are read."""
    vocabulary = Vocabulary(collection.vocabulary_path)
    count = functools.cache(lambda: token_idf(collection, vocabulary) ** np.float32(power))
    return LazyArray((vocabulary.size,), np.dtype(np.float32), lambda index: count()[index])


def _prepare(config: TrainConfig, folder: Path, model, examples: TrainDataset) -> None:
    """Writes what the model is and what it is trained with, or compares it with what the folder says."""
    collection, table, initial = examples.collection, examples.table, config.initial
    description = model_folder.describe(
        model,
        input_length=config.data.input_length,
        passage_length=config.data.passage_length,
        collection_name=collection.name,
        collection=collection.fingerprint,
        docids=config.docids,
        docids_fingerprint=table.fingerprint() if table else None,
        initial_checkpoint=initial.name if initial else None,
        averaged_with=initial.averaged_name if initial else None,
        docid_centroids=initial.centroid_scales if initial else None,
        **({"lexical_idf": initial.lexical_idf} if initial and initial.lexical_idf else {}),
    )
    parameters = configuration.texts_of_parameters(settings_file.LEARNING, settings_file.REFERENCES)
    chosen = run_settings(model, examples, config.settings, parameters)
    if config.docids_from_passages:
        chosen["train.docids_from_passages"] = True

    def prepare() -> None:
        prepare_folder(folder, description, collection)
        settings_file.keep(folder, chosen, config.on_change, configuration.operative_text())

    multihost.on_process_0(prepare)
    # The others see what the first process wrote, and compare.
    multihost.on_every_process(lambda: multihost.is_process_0() or prepare())


def describe_batch(
    examples: TrainDataset, batch_size: int, seed: int, position: int, tasks: dict[str, Task] | None = None
) -> list[dict]:
    """Describes the examples of the batch at a position of the data.

    Args:
      examples: the collection's examples.
      batch_size: examples of a batch.
      seed: of the data's order.
      position: the number of examples before the batch.
      tasks: keeps the tasks from one call to the next, as making them reads all train queries; None: they
        are made for this call.

    Returns:
      {"task", "number" (of the example within its task), "text", "passages" (their ids)} of each example.
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
