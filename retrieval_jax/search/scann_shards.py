"""ScaNN's index of a whole collection: shards that are built one by one and searched together.

Several processes of a run share the shards: each builds and searches its own, and what they find is merged,
so that two processes find what one finds. How many shards there are depends on the number of vectors alone.

    shards/000/ …    a shard each; see `scann_index`
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval_jax.checkpoints import checksums
from retrieval_jax.core import arrow_ids, paths, storage, unfinished
from retrieval_jax.core.progress import bar, log
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.search import scann_index
from retrieval_jax.search.exact import ExactSearch
from retrieval_jax.search.scann_index import ScannShard, recall_at

_LEAF_FRACTIONS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)  # that `tune` tries
RECALL = 0.985  # the least recall@100 in `tune`, such that queries that were not measured have about 0.98
_NEAR = 0.998  # of the recall that is reached, where that is less than was asked for
_MAX_REORDER_FACTOR = 8  # times the setting, at most


@dataclasses.dataclass(frozen=True)
class Indexed:
    """An earlier index, to be updated: the passages in the order of the collection as it was.

    Attributes:
      folder: the folder of its shards, local or remote, which may lie in a folder with `checksums`.
      facts: what `ScannIndex.facts` returned.
      ids: passage ids by row.
      text_hashes_N: uint64, hashes of the passages' texts by row.
    """

    folder: Path
    facts: dict
    ids: pa.Array
    text_hashes_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a shard is made of.

    Attributes:
      new: int, rows of vectors to index, ascending.
      earlier: the number of the earlier shard that is updated; None for a new shard.
      now_M: int, for each vector of that shard its row now; -1 where it was removed or changed.
    """

    new: np.ndarray
    earlier: int | None = None
    now_M: np.ndarray | None = None

    @property
    def count(self) -> int:
        """The number of its vectors."""
        return len(self.new) + (0 if self.now_M is None else int((self.now_M >= 0).sum()))

    @property
    def recipe(self) -> dict:
        """What tells it from other parts of indexes of the same recipe."""
        kept = b"" if self.now_M is None else self.now_M.tobytes()
        return {"earlier": self.earlier, "rows": storage.digest([self.new.tobytes(), kept])}


@dataclasses.dataclass
class ScannIndex:
    """The shards of an index that this process holds, and how they are searched.

    Attributes:
      shards: this process's shards.
      all_facts: the facts of all shards (see `ScannShard.write`), in order.
      settings: the structure, from `scann_index.settings`; `tune` may raise its "reorder".
      searched_leaves: leaves of each shard that a search visits, of settings["leaves"]; None without a tree.
    """

    shards: list[ScannShard]
    all_facts: list[dict]
    settings: dict
    searched_leaves: int | None = None

    @property
    def facts(self) -> dict:
        """What `open` needs, for the manifest."""
        return {
            "settings": self.settings,
            "searched_leaves": self.searched_leaves,
            "shards": self.all_facts,
        }

    @classmethod
    def open(cls, folder: Path, facts: dict) -> "ScannIndex":
        """Opens this process's shards.

        The caller must have compared the files with their checksums: ScaNN may end the process if they are
        damaged.

        Args:
          folder: the folder of the shards, local or remote.
          facts: see `facts`.

        Raises:
          UserError: a shard cannot be read.
        """
        shards = [
            ScannShard.open(paths.ensure_local(shard_folder(folder, number)), facts["shards"][number])
            for number in multihost.process_share(len(facts["shards"]))
        ]
        return cls(shards, facts["shards"], facts["settings"], facts["searched_leaves"])

    def search(self, queries_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Searches all shards on all cores. All processes of a run must call it with the same queries.

        Args:
          queries_BxE: float32, the queries' vectors.
          k: vectors to find, at most as many as there are.

        Returns:
          Rows of the collection (int32, B×k) and dot products (float32, B×k), best first; of equal ones the
          lower row comes first. Where fewer than k vectors are found, the last scores are NaN.
        """
        queries_BxE = np.ascontiguousarray(queries_BxE, np.float32)
        # Of n shards each has about an n-th of the best vectors, but may have all of them.
        least = max(-(-4 * k // len(self.all_facts)), k)
        reorder = max(self.settings["reorder"], least) if "reorder" in self.settings else None
        found = [(np.empty((len(queries_BxE), 0), np.int32), np.empty((len(queries_BxE), 0), np.float32))]
        for shard in self.shards:
            leaves = None
            if self.searched_leaves:
                leaves = max(round(self.searched_leaves * shard.leaves / self.settings["leaves"]), 1)
            found.append(shard.search(queries_BxE, min(k, len(shard.rows_M)), reorder, leaves))
        return merged(multihost.gather_from_processes(merged(found, k)), k)

    def tune(self, embeddings: Embeddings, queries_BxE: np.ndarray, recall: float = RECALL) -> dict:
        """Chooses how many candidates are re-ordered and how many leaves are searched.

        Doubles `reorder` (up to 8 times) until recall@100 reaches `recall`, then chooses the smallest number
        of leaves that keeps it. If all that is not enough (of bfloat16 and int8, also if whole vectors are
        rounded too much), the least work is chosen that reaches 99.8% of what all of it does. Reports the
        recall. All processes of a run must call it.

        Args:
          embeddings: the vectors of all passages.
          queries_BxE: float32, vectors of queries to measure with.
          recall: the least recall@100.

        Returns:
          "recall_at_10" and "recall_at_100": the fraction of the exact best passages that are found.
        """
        exact = ExactSearch(embeddings.vectors_NxE, all_devices())
        wanted_BxK, _ = exact(queries_BxE, min(100, exact.count))
        all_leaves, reorder = self.settings.get("leaves"), self.settings.get("reorder", 0)

        def measure(reorder: int, leaves: int | None) -> dict[str, float]:
            if reorder:
                self.settings = self.settings | {"reorder": reorder}
            self.searched_leaves = leaves
            rows, scores = self.search(queries_BxE, wanted_BxK.shape[1])
            found_BxK = np.where(np.isnan(scores), -1, rows)
            return {f"recall_at_{k}": recall_at(k, wanted_BxK, found_BxK) for k in (10, 100)}

        tried = {reorder: measure(reorder, all_leaves)}
        while tried[reorder]["recall_at_100"] < recall and reorder < _MAX_REORDER_FACTOR * min(tried):
            reorder *= 2
            tried[reorder] = measure(reorder, all_leaves)
        reached = max(recalls["recall_at_100"] for recalls in tried.values())
        enough = recall if reached >= recall else _NEAR * reached
        reorder = next(size for size, found in tried.items() if found["recall_at_100"] >= enough)
        for fraction in _LEAF_FRACTIONS if all_leaves else (1,):
            leaves = all_leaves and max(round(fraction * all_leaves), 1)
            recalls = measure(reorder, leaves)
            if recalls["recall_at_100"] >= enough:
                break
        self._report(recalls, len(queries_BxE))
        return recalls

    def _report(self, recalls: dict, queries: int) -> None:
        shards, leaves = len(self.all_facts), self.settings.get("leaves")
        reorder = self.settings.get("reorder")
        method = f"quantised, re-ordering {reorder}" if reorder else "searched exactly"
        method += f", {self.searched_leaves} of {leaves} leaves" if leaves else ""
        method += f" of each of {shards} shards" if shards > 1 else ""
        log(
            f"scann: recall@10 {recalls['recall_at_10']:.4f}, recall@100 {recalls['recall_at_100']:.4f} "
            f"against exact search for {queries} queries ({self.all_facts[0]['dtype']}, {method})"
        )


def build(
    folder: Path, embeddings: Embeddings, dtype: str, recipe: dict, earlier: Indexed | None = None
) -> ScannIndex:
    """Builds the shards that are not there yet, one after the other, and opens them.

    Of several processes each builds and opens its share. All must call it. Where there is an earlier index,
    its shards are updated: each gets a share of the new passages. All are built anew if the number of
    passages has doubled or halved or asks for another structure, if most passages were removed, or if a
    shard has more vectors than one is to have now.

    Args:
      folder: where the shards are made; after a kill, the shards that it holds are not built again.
      embeddings: the vectors of all passages.
      dtype: what whole vectors are kept as.
      recipe: what the index is made of, with everything that it depends on.
      earlier: an index of this model and dtype, of an earlier state of the collection.
    """
    count = len(embeddings.ids)
    chosen = scann_index.settings(count)
    parts = earlier and multihost.on_every_process(lambda: _updated(earlier, embeddings, chosen))
    if parts is None:
        earlier = None
        parts = [_Part(rows) for rows in np.array_split(np.arange(count), chosen.get("shards", 1))]

    share = multihost.process_share(len(parts))
    own = sum(parts[number].count for number in share)
    shards = f", in {len(parts)} shards" if len(parts) > 1 else ""
    log(f"scann: building an index of {count:,} vectors as {dtype}{shards}")
    marks = [shard_folder(folder, number) / storage.MANIFEST for number in range(len(parts))]
    multihost.on_process_0(lambda: unfinished.begin(folder, recipe, marks, "shards"))

    def build_share() -> None:
        with bar("ScaNN's shards (vectors)", own) as advance:
            for number in share:
                part = parts[number]
                make = functools.partial(_make, part, earlier, embeddings.vectors_NxE, dtype, chosen)
                storage.build_once(shard_folder(folder, number), recipe | {"shard": part.recipe}, make)
                advance(part.count)

    multihost.on_every_process(build_share)

    def open_share() -> ScannIndex:
        facts = [storage.read_manifest(mark.parent, "index") for mark in marks]
        for one in facts:
            del one["recipe"]
        settings = chosen | ({"shards": len(parts)} if len(parts) != chosen.get("shards", 1) else {})
        return ScannIndex.open(folder, {"settings": settings, "searched_leaves": None, "shards": facts})

    return multihost.on_every_process(open_share)


def copy_shards(source: Path, target: Path, count: int) -> None:
    """Puts the shards that `build` made into a searcher's folder, without a copy if the disk can."""
    for number in range(count):
        shard = paths.ensure_local(shard_folder(source, number))
        for path in paths.files(shard):
            name = path.relative_to(shard)
            if str(name) != storage.MANIFEST:
                (shard_folder(target, number) / name).parent.mkdir(parents=True, exist_ok=True)
                paths.link(path, shard_folder(target, number) / name)


def shard_folder(folder: Path, number: int) -> Path:
    """Returns the folder of a shard."""
    return folder / f"{number:03}"


def merged(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merges what several searches found.

    Args:
      found: rows (int32) and scores (float32, NaN for an empty place), B×any each.
      k: places to keep.

    Returns:
      The best rows and scores, B×k: by falling scores, of equal ones the lower row first. Empty places come
      last, with the row 0 and the score NaN.
    """
    rows, scores = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    falling = np.where(np.isnan(scores), np.inf, -scores)
    order = np.lexsort((rows, falling), axis=1)[:, :k]
    missing = [(0, 0), (0, max(k - order.shape[1], 0))]
    rows, scores = (np.take_along_axis(x, order, axis=1) for x in (rows, scores))
    return np.pad(rows, missing), np.pad(scores, missing, constant_values=np.nan)


def _make(
    part: _Part, earlier: Indexed | None, vectors_NxE: np.ndarray, dtype: str, chosen: dict, folder: Path
) -> dict:
    """Builds or updates a shard and writes it into a folder; returns its facts."""
    if part.now_M is not None:
        facts = earlier.facts["shards"][part.earlier]
        before = shard_folder(earlier.folder, part.earlier)
        if checksums.find_damage(earlier.folder.parent, [f"{earlier.folder.name}/{before.name}"]):
            rows_M = np.sort(np.concatenate([part.now_M[part.now_M >= 0], part.new]))
            made = ScannShard.build(vectors_NxE, rows_M, dtype, facts["reorder"], facts["leaves"])
        else:
            opened = ScannShard.open(paths.ensure_local(before), facts)
            made = opened.update(vectors_NxE, part.now_M, part.new)
        return made.write(folder)
    leaves = chosen.get("leaves", 0)
    if leaves:  # a shard of passages that were added may be smaller than the others
        leaves = max(min(leaves, round(len(part.new) ** 0.5)), 1)
    return ScannShard.build(vectors_NxE, part.new, dtype, chosen.get("reorder", 0), leaves).write(folder)


def _updated(earlier: Indexed, embeddings: Embeddings, chosen: dict) -> list[_Part] | None:
    """Returns the parts of an updated index; None if it is better built anew."""
    count, before = len(embeddings.ids), earlier.facts["shards"]
    now_N = rows_now(earlier.ids, earlier.text_hashes_N, embeddings)
    trained = sum(facts["training_size"] for facts in before)
    structure = {"leaves", "reorder"}
    other = chosen.keys() & structure != earlier.facts["settings"].keys() & structure
    if other or not 0.5 < count / trained < 2 or (now_N < 0).sum() > len(now_N) // 2:
        return None
    rows = [shard_folder(earlier.folder, number) / "rows.npy" for number in range(len(before))]
    names = [str(path.relative_to(earlier.folder.parent)) for path in rows]
    if checksums.find_damage(earlier.folder.parent, names):
        return None
    now = [now_N[np.load(paths.ensure_local(path))] for path in rows]
    if max(int((now_M >= 0).sum()) for now_M in now) > chosen.get("shard_size", count):
        return None  # fewer vectors than before are to be in a shard
    new = np.ones(count, bool)
    new[now_N[now_N >= 0]] = False
    new, parts = np.flatnonzero(new), []
    size = -(-count // chosen.get("shards", 1))
    for number, now_M in enumerate(now):
        room = max(size - int((now_M >= 0).sum()), 0)
        parts.append(_Part(new[:room], number, now_M))
        new = new[room:]
    if len(new):
        parts += [_Part(rows) for rows in np.array_split(new, -(-len(new) // size))]
    return [part for part in parts if part.count]


def rows_now(ids: pa.Array, text_hashes_N: np.ndarray, embeddings: Embeddings) -> np.ndarray:
    """Compares passages as they were with the vectors as they are now.

    Args:
      ids: the ids of the passages as they were, by row.
      text_hashes_N: uint64, hashes of their texts.
      embeddings: the vectors of all passages.

    Returns:
      int64, for each of the passages its row in the embeddings; -1 if it was removed, or has another text.
    """
    row_N = arrow_ids.find_rows(embeddings.ids, ids)
    same = (row_N >= 0) & (embeddings.text_hashes_N[row_N] == text_hashes_N)
    return np.where(same, row_N, -1)
