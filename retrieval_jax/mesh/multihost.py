"""Several processes as one run: how they connect, which rows each one reads, and what only process 0 does.

Every process runs the same program on its own devices; all these devices together are the mesh. The hosts of
a pod are such processes, and so are two processes on one machine that are given each other's address.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import gin
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.core import locks
from retrieval_jax.core.errors import UserError, first_line
from retrieval_jax.mesh import partitioning

T = TypeVar("T")
VERBS = ("train", "generate-queries", "mine", "sets", "score", "index", "search")


@gin.configurable("multihost", denylist=["verb"])
def initialize(
    verb: str,
    enabled: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects to the other processes of the run, before anything uses a device. Does nothing by default.

    Args:
      verb: the verb that will run, one of VERBS.
      enabled: connect on a platform that knows the processes (TPU pods, GKE, SLURM); nothing more is needed
        there.
      coordinator_address: elsewhere, HOST:PORT of process 0; None is the environment's
        JAX_COORDINATOR_ADDRESS.
      num_processes: how many processes there are; None is the environment's JAX_NUM_PROCESSES.
      process_id: which one this is, from 0; None is the environment's JAX_PROCESS_ID.

    Raises:
      UserError: the verb runs in one process only, or the processes cannot connect.
    """
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not (enabled or coordinator_address):
        return
    if verb not in VERBS:
        raise UserError(
            f"{verb}: runs in one process, only {', '.join(VERBS)} in several: leave multihost.* and "
            "JAX_COORDINATOR_ADDRESS away"
        )
    if num_processes is None:
        num_processes = _number("JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"multihost: {first_line(error)}: away from TPU pods, GKE and SLURM, give "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    try:
        return None if text is None else int(text)
    except ValueError:
        raise UserError(f"{variable}: {text!r} is not a number: set it to one") from None


def is_process_0() -> bool:
    """Returns whether this is the process that writes everything that is written once."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def broadcast_from_process_0(value: int) -> int:
    """Returns the value of process 0 on all processes, all of which must call it."""
    if not jax.distributed.is_initialized():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def value_from_process_0(what: Callable[[], int]) -> int:
    """Calls a function on process 0 and returns its result, an int, on all processes. All must call this.

    Args:
      what: the function, which is called on process 0 alone.

    Raises:
      Exception: on process 0, whatever the function raised.
      UserError: on the other processes, if the function raised.
    """
    value, failure = 0, None
    if is_process_0():
        try:
            value = what()
        except Exception as error:  # of any kind: the others must not be left waiting
            failure = error
    if broadcast_from_process_0(failure is None):
        return broadcast_from_process_0(value)
    raise failure or UserError("process 0 met an error, which it tells: mend that, and start all again")


def on_process_0(what: Callable[[], object]) -> None:
    """Calls a function on process 0 while the others wait. Errors are those of `value_from_process_0`."""

    def do() -> int:
        what()
        return 0

    value_from_process_0(do)


def on_every_process(what: Callable[[], T]) -> T:
    """Calls a function on every process, and returns its result when all have done so. All must call this.

    Args:
      what: the function, which must not wait for other processes.

    Raises:
      Exception: on each process whose function raised, what it raised.
      UserError: on the others, if any raised: none is left waiting.
    """
    value, failure = None, None
    try:
        value = what()
    except Exception as error:  # of any kind, as above
        failure = error
    failed = [int(x) for x in gather_from_processes(np.int32(failure is not None))]
    if failure:
        raise failure
    if any(failed):
        raise UserError(
            f"process {failed.index(1)} met an error, which it tells: mend that, and start all again"
        )
    return value


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder (`locks.lock`), which keeps out other commands, for all processes.

    Process 0 has it, and the others wait until it has. All must call this. What was looked up before may have
    changed meanwhile.
    """
    with contextlib.ExitStack() as held:
        on_process_0(lambda: held.enter_context(locks.lock(folder)))
        yield


def process_share(count: int) -> range:
    """Returns the share of this process where things that are numbered from 0 are dealt out to all."""
    if not jax.distributed.is_initialized():
        return range(count)
    return range(jax.process_index(), count, jax.process_count())


def gather_from_processes(tree: object) -> list:
    """Returns the tree of NumPy arrays of each process. All processes must call it, with the same shapes."""
    if not jax.distributed.is_initialized():
        return [tree]
    from jax.experimental import multihost_utils

    stacked = multihost_utils.process_allgather(tree)
    return [jax.tree.map(lambda x: np.asarray(x[i]), stacked) for i in range(jax.process_count())]  # noqa: B023


def barrier(name: str) -> None:
    """Waits until every process has called it with the same name."""
    if jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Finds the rows of a batch that the devices of this process hold.

    Processes that hold the same shards of `data` (a model that is divided over several hosts) read the same
    rows.

    Args:
      mesh: the mesh of all processes.
      batch_size: rows of the whole batch.

    Returns:
      The rows, ascending.

    Raises:
      UserError: the mesh's shards of data do not divide `batch_size`.
    """
    shards = mesh.shape["data"]
    if batch_size % shards:
        raise UserError(
            f"train.batch_size: {batch_size} does not divide over the mesh's {shards} shards of data: "
            f"set a multiple of {shards}"
        )
    places = partitioning.batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in places.values()]))


def make_global_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes arrays of the whole batch, of which each process provides its own rows (`local_rows`)."""
    return jax.make_array_from_process_local_data(partitioning.batch_sharding(mesh), dict(batch))


def make_global_arrays(mesh: Mesh, tree: object, *axes: str | None) -> object:
    """Places arrays that every process has completely on the mesh; processes send each other nothing.

    Args:
      mesh: the mesh of all processes.
      tree: a tree of arrays, equal on all processes.
      *axes: the mesh axis over which each dimension is divided, None for none.

    Returns:
      The tree with `jax.Array`s.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def global_batch_shapes(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, tuple]:
    """Returns the shapes of the arrays that `make_global_batch` makes."""
    shards = mesh.shape["data"]
    own = len(local_rows(mesh, shards))
    return {name: (len(x) * shards // own, *x.shape[1:]) for name, x in batch.items()}
