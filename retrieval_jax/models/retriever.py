"""The base class of all models: T5X's model interface, and the facts that the rest of the package needs."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from retrieval_jax.core import configuration, registry
from retrieval_jax.data.vocabulary import NO_PROMPTS, Prompts
from retrieval_jax.models.layers import T5Config

Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (total, count)

RETRIEVERS: dict[str, type["Retriever"]] = {}
"""Name of a class -> the class, as model.json names it. See `register_retriever`."""


class Retriever(abc.ABC):
    """The base of all models: T5X's `BaseModel` interface as plain functions of parameters and a batch.

    How models of a class are trained (their examples, their evaluation) is a `RetrieverFamily`; see
    training/families.py.

    Attributes:
      family: what reports and error messages call models of this class.
      writes_docids: whether the model writes docids, so that it needs a docid table.
      examples_interact: whether the loss of an example depends on the other examples of its batch, as with
        in-batch negatives or a mean over the batch. If so, dividing a batch into microbatches changes what is
        learned.
      text_arrays: the names of a batch's arrays of texts that are encoded by length, in groups. If there are
        any, `loss_fn` takes the groups (TextGroups or None) as its fourth argument.
      reads_step: whether `loss_fn` reads the number of steps taken before, which a training batch then has
        as `step` (int32 B). In an evaluation, and under T5X's own train, it is not there.
      reads_sets: whether `loss_fn` reads the set docids of a query's candidates (`DataConfig.sets`).
      unbounded_loss: whether the loss has no natural scale, so that a rise is not taken for a fault (see
        `LossSpikeGuard.on_spike`).
      config: the sizes of the network.
      module: the Flax module.
      optimizer_def: the optax optimiser; None for a model that is only searched with.
      prompts: the texts that come before every query and every passage.
      settings: the constructor's arguments, besides the sizes, that change the parameters or the results of
        a trained model; model.json holds them.
    """

    family: str
    writes_docids = False
    examples_interact: bool = False
    text_arrays: Sequence[str] = ()
    reads_step: bool = False
    reads_sets: bool = False
    unbounded_loss: bool = False

    config: T5Config
    module: Any
    optimizer_def: optax.GradientTransformation | None
    prompts: Prompts = NO_PROMPTS
    settings: Mapping[str, object] = {}

    @property
    @abc.abstractmethod
    def FEATURE_CONVERTER_CLS(self) -> type:
        """The seqio feature converter that turns examples into the model's batches."""

    @abc.abstractmethod
    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, tuple], input_types: object = None
    ) -> dict:
        """Makes random parameters.

        Args:
          rng: the key.
          input_shapes: the shape of each array of a batch, by name.
          input_types: not used; T5X passes it.

        Returns:
          {"params": parameters, boxed with the logical names of their axes}.
        """

    @abc.abstractmethod
    def loss_fn(self, params: dict, batch: Batch, dropout_rng: jax.Array | None) -> tuple[jax.Array, Metrics]:
        """Computes the mean loss of a batch.

        Args:
          params: the parameters.
          batch: int32 arrays by name.
          dropout_rng: the key of the dropout; None: no dropout.

        Returns:
          (the loss in nats, a float32 scalar; metrics: name -> (total, count)).
        """

    def eval_fn(self, params: dict, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Computes `loss_fn` without dropout and without random draws."""
        return self.loss_fn(params, batch, None)

    @abc.abstractmethod
    def score_batch(self, params: dict, batch: Batch) -> jax.Array:
        """Computes the score of each example's target, float32 B."""


def objective_says(objective: Callable | None, name: str) -> bool:
    """Tells whether an objective, or the one that it is added to (its argument `objective`), says something.

    Args:
      objective: the objective; None says nothing.
      name: of the attribute that is true where it says it, such as "unbounded_loss".
    """
    function = objective.func if isinstance(objective, functools.partial) else objective
    if function is None or getattr(function, name, False):
        return function is not None
    return objective_says(configuration.argument(objective, "objective"), name)


def register_retriever(cls: type[Retriever]) -> type[Retriever]:
    """Makes a model class known by its name, so that model folders of it can be opened. A decorator.

    Raises:
      ValueError: another class has the name.
    """
    registry.register(RETRIEVERS, cls.__name__, cls, "the retriever")
    return cls
