"""Chooses for each batch the lengths at which its texts are encoded, the same on all hosts.

See `models/text_groups.py`. The training step is compiled once for each choice that occurs. So queries and
passages have one level in common, the higher one that they need: there are four choices, not sixteen.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.examples.features import Batch
from retrieval_jax.mesh import multihost
from retrieval_jax.models.text_groups import LEVELS, TextGroups, length_at, level_of, needed_lengths

Grouped = tuple[Batch, TextGroups | None]


def group_texts(
    batches: Iterator[Batch], arrays: Sequence[str], mesh: Mesh, microbatches: int = 1
) -> Iterator[Grouped]:
    """Yields each batch with the groups of its texts. All processes must iterate in step.

    Each process sees its own rows of a batch alone. Of several processes, each reads a batch ahead: the
    largest of all their lengths is computed on the devices before the step that comes before, so that no
    step waits for it.

    Args:
      batches: this process's rows of each batch.
      arrays: the names of the arrays of texts, the last axis of which are tokens; () for no groups.
      mesh: the mesh over whose axis `data` the rows lie.
      microbatches: the number of parts of a batch, each of which is encoded by itself.

    Yields:
      (the batch, its groups); None where all texts are encoded at their full length.
    """
    if not arrays:
        yield from ((batch, None) for batch in batches)
        return
    shards = mesh.shape["data"]
    own_shards = len(multihost.local_rows(mesh, shards))
    largest = _largest(mesh)
    before: tuple[Batch, jax.Array | np.ndarray] | None = None

    def grouped(batch: Batch, level: jax.Array | np.ndarray) -> Grouped:
        full = tuple(batch[name].shape[-1] for name in arrays)
        chosen = tuple(length_at(n, int(level)) for n in full)
        return batch, None if chosen == full else TextGroups(chosen, shards)

    for batch in batches:
        levels = np.max([_levels(batch[name], own_shards, microbatches) for name in arrays], axis=0)
        if jax.process_count() == 1:
            yield grouped(batch, levels.max())
            continue
        now = batch, largest(multihost.make_global_batch(mesh, {"levels": levels})["levels"])
        if before:
            yield grouped(*before)
        before = now
    if before:
        yield grouped(*before)


@functools.lru_cache(1)
def _largest(mesh: Mesh):
    """Makes the function that gives the largest number to every process."""
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _levels(tokens: np.ndarray, shards: int, microbatches: int) -> np.ndarray:
    """Gives the level (int32, see `level_of`) that each shard's texts need.

    Args:
      tokens: this process's rows, B × … × S.
      shards: the shards that this process holds.
      microbatches: see `group_texts`.
    """
    S, rows = tokens.shape[-1], len(tokens) // shards
    if rows % microbatches:  # the parts mix the rows of shards
        return np.full(shards, LEVELS - 1, np.int32)
    # Part i has the rows i, i + microbatches, … of a shard.
    parts = np.moveaxis(tokens.reshape((shards, rows // microbatches, microbatches, -1, S)), 2, 1)
    needed = needed_lengths(parts.reshape(shards, microbatches, -1, S)).max(axis=1)
    return np.array([level_of(S, int(length)) for length in needed], np.int32)
