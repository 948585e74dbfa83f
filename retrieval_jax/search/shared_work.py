"""Work on queries or passages that the processes of a run share out: shards, made by searchers or models."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from retrieval_jax.core import paths, storage, unfinished
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.unfinished import Shards
from retrieval_jax.core.workspace import UNFINISHED
from retrieval_jax.mesh import multihost
from retrieval_jax.search.searcher import Searcher

if TYPE_CHECKING:
    from retrieval_jax.mesh.partitioning import Partitioner


def scratch_folder(folder: Path) -> Path:
    """Returns the folder in which the shards of a folder lie until they are joined."""
    return folder.with_name(f"{folder.name}{UNFINISHED}")


def make_in_shards(
    folder: Path,
    recipe: dict,
    shards: Mapping[str, Shards],
    make: Callable[[str, Sequence[int]], None],
    join: Callable[[Path], dict],
    prepare: Callable[[], None] | None = None,
) -> None:
    """Makes a folder by shards, unless it is up to date. All processes of a run must call this.

    After a kill, the same call goes on from the shards that are finished. Afterwards they are removed.

    Args:
      folder: the folder.
      recipe: everything that its content depends on, as JSON.
      shards: the shards, all of one size, in folders in `scratch_folder(folder)` or in that folder itself.
      make: makes shards: (a key of `shards`, numbers of those that this process has to make, at least one).
      join: writes the content into a new folder, from all shards, and returns the manifest's facts.
      prepare: called before any shard is made, by process 0 alone; None for nothing.
    """
    scratch = scratch_folder(folder)
    begun = recipe | {"shard_size": max(some.size for some in shards.values())}

    def begin() -> None:
        files = [path for some in shards.values() for path in some.paths]
        unfinished.begin(scratch, begun, files, "shards")
        if prepare:
            prepare()

    def make_share() -> None:
        for name, some in shards.items():
            share = multihost.process_share(some.count)
            if numbers := some.missing(share.start, share.step):
                make(name, numbers)

    with multihost.lock(scratch):
        if not multihost.broadcast_from_process_0(storage.is_up_to_date(folder, recipe)):
            multihost.on_process_0(begin)
            multihost.on_every_process(make_share)
            multihost.on_process_0(lambda: storage.build_once(folder, recipe, join))
        if multihost.is_process_0() and unfinished.has_begun(scratch, begun):
            paths.remove(scratch)


def open_for_share(folder: Path, setting: str, make_partitioner: "Callable[[], Partitioner]") -> Searcher:
    """Opens a searcher on the devices of this process, which has queries of its own.

    Args:
      folder: the searcher's folder.
      setting: the setting that names it, for the error.
      make_partitioner: makes the mesh of all devices.

    Raises:
      UserError: the processes of the run would hold a part of it each.
    """
    searcher = Searcher.open(folder, lambda: make_partitioner().local)
    if searcher.is_shared and jax.process_count() > 1:
        raise UserError(
            f"{setting}: the hosts share {folder.name}, and each has other queries: take a bm25 or exact "
            "one, or one host"
        )
    return searcher
