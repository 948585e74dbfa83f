"""Programs: jitted functions with the shapes of their arguments, before they are compiled.

`plan_train_step` gives the training step: the training loop runs the function that it gives, and preflight
compiles the same function for a mesh of devices that are not there. So does `plan_search` for the search of a
generative retriever, whose function the searcher runs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.checkpoints.model_folder import abstract_params
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.atomic import DocidTokens
from retrieval_jax.decoding.bonuses import Planning
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.docids.search_strategy import SearchStrategy
from retrieval_jax.examples.features import array_dtype
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.text_groups import TextGroups
from retrieval_jax.search.generative import search_function
from retrieval_jax.search.index_inputs import IndexSettings
from retrieval_jax.training.settings import TrainSettings
from retrieval_jax.training.step import abstract_state, make_train_step


class DoesNotDivide(Exception):
    """An array cannot be divided over a mesh as its sharding says."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function on a mesh, and the shapes of what it is called with.

    Attributes:
      function: the jitted function.
      arguments: its arguments: trees of jax.ShapeDtypeStruct with shardings, and static values.
      memory: name -> tree, the same arguments as a report names them. Scalars may be left out.
      loop_trips: the most iterations of its `lax.while_loop`, if it has one, for counting FLOPs.
    """

    function: Callable
    arguments: tuple
    memory: Mapping[str, object]
    loop_trips: int = 1

    def trace(self) -> jax.stages.Traced:
        """Traces the function on the shapes of its arguments. No array is made."""
        return self.function.trace(*self.arguments)

    def argument_bytes(self) -> dict[str, int]:
        """Gives the bytes that each group of arguments takes on one device.

        Raises:
          DoesNotDivide: an array does not divide over the mesh.
        """
        return {name: bytes_per_device(tree) for name, tree in self.memory.items()}


def plan_train_step(
    model,
    shapes: Mapping[str, tuple[int, ...]],
    settings: TrainSettings,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    groups: TextGroups | None = None,
) -> Program:
    """Plans the training step of a model on a mesh.

    Args:
      model: has T5X's model interface, and an optimiser.
      shapes: name -> shape of the arrays of a global batch.
      settings: the run's settings; the step depends on its seed, microbatches, random bits and on whether its
        spike guard skips updates.
      mesh: the devices to run on.
      rules: the mesh axes of each logical axis; see `partitioning.axis_rules`.
      groups: the lengths at which the texts of a batch are encoded; None: the full ones, which take the most
        memory.

    Returns:
      The program of (TrainState, batch) -> (TrainState, metrics), or, where the guard skips updates, of
      (TrainState, batch, limit); see `make_train_step`.
    """
    state = abstract_state(model, mesh, shapes, rules)
    can_skip = settings.spike_guard.skips
    step = make_train_step(
        model,
        mesh,
        state,
        settings.seed,
        microbatches=settings.microbatches,
        random_bits=settings.random_bits,
        can_skip=can_skip,
        rules=rules,
        groups=groups,
    )
    rows = partitioning.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, array_dtype(name), sharding=rows) for name, shape in shapes.items()
    }
    limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=state.step.sharding)
    memory = {"parameters": state.params, "optimizer": state.optimizer, "batch": batch}
    return Program(step, (state, batch, *[limit] * can_skip), memory)


def bytes_per_device(tree: object) -> int:
    """Gives the bytes, without padding, that a tree of arrays or shapes with shardings takes on one device.

    Raises:
      DoesNotDivide: an array does not divide over the mesh.
    """
    total = 0
    for x in jax.tree.leaves(tree):
        try:
            total += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        except ValueError:
            shape = "×".join(map(str, x.shape))
            raise DoesNotDivide(f"an array of {shape} does not divide as {x.sharding.spec}") from None
    return total


def plan_search(
    model: GenerativeRetriever,
    input_length: int,
    strategy: type[SearchStrategy],
    docids: Trie | DocidTokens,
    *,
    settings: IndexSettings,
    k: int,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    planning: Planning | None = None,
) -> Program:
    """Plans the search of a generative retriever on a mesh.

    Args:
      model: the retriever.
      input_length: the number of tokens of a query.
      strategy: how the docids are found.
      docids: the docids as the strategy takes them, of arrays or jax.ShapeDtypeStruct.
      settings: those of the searcher.
      k: the number of passages to find for a query.
      mesh: the devices to run on.
      rules: the mesh axes of each logical axis.
      planning: what a planned search takes, of arrays or jax.ShapeDtypeStruct; None for a search without.

    Returns:
      The program that `GenerativeSearcher` (with `planning`, `PlannedSearcher`) runs; see `search_function`.
    """
    rows = partitioning.batch_sharding(mesh)
    shape = (round_up(settings.batch_size, mesh.shape["data"]), input_length)  # as GenerativeSearcher does
    batch = {"encoder_input_tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)}
    params = abstract_params(model, mesh, rules)

    def place(tree: object, *axes: str) -> object:
        where = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    arrays, sets = place(docids, *strategy.mesh_axes), {}
    if planning is not None:
        sets = {"planning": strategy.place_planning(planning, place)}
    width = strategy.width(settings.beams, k, model.config.outputs)
    return Program(
        search_function(model, mesh),
        (strategy, params, batch, arrays, width, settings.recall_target, *sets.values()),
        {"parameters": params, "batch": batch, "docids": arrays} | sets,
        loop_trips=strategy.steps(docids),
    )
