"""The verb `generate-queries` (doc2query): queries for every passage, from a model or from released files."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import gin
import jax
import numpy as np
from jax.experimental import multihost_utils

from retrieval_jax.checkpoints.model_folder import load_model, model_recipe
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar, log
from retrieval_jax.core.values import Positive, PositiveFloat, Seed
from retrieval_jax.core.workspace import UNFINISHED, Workspace
from retrieval_jax.data import synthetic
from retrieval_jax.data.predictions import Advance, open_predictions
from retrieval_jax.data.records import Collection
from retrieval_jax.data.synthetic import QueryShards
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.mesh import partitioning
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.search.batched import BATCH_SIZE
from retrieval_jax.search.searcher import Searcher, searcher_manifest


class QuerySource(Protocol):
    """Where queries come from: a model (Sampler), or released files (see predictions.py)."""

    def prepare(self, collection: Collection, parts: QueryShards) -> None:
        """Called once, on the first host, before parts are made."""

    def queries(
        self, collection: Collection, parts: QueryShards, numbers: Sequence[int], advance: Advance
    ) -> Iterator[list[list[str]]]:
        """For each of these parts (ascending) the queries of each of its passages."""
        ...


@gin.configurable
def generate_queries(
    source: str,
    work_dir: str | None = None,
    name: str = "doc2query",
    model_dir: str | None = None,
    predictions: str | None = None,
    count: Positive = 10,
    temperature: PositiveFloat = 1.0,
    top_k: Positive = 10,
    seed: Seed = 0,
    batch_size: Positive = 32,
    filter_searcher: str | None = None,
    filter_k: Positive = 10,
    shard_size: Positive = 1024,
    step: Positive | None = None,
) -> dict:
    """Makes synthetic/NAME: queries for each passage, without repetitions.

    Goes on after a kill from the parts that are finished. With several hosts, each makes its share of them.

    Args:
      source, work_dir: the collection, and where its work lies.
      name: the name of these queries.
      model_dir: the query generator to sample from; None is models/doc2query of the work folder.
      predictions: a folder of released docT5query predictions to read instead.
      count: queries sampled a passage, or the most that are taken from the predictions.
      temperature, top_k: each token is drawn from the top_k likeliest, their logits divided by temperature.
      seed: of the sampling. A passage's queries depend on this and its row, not on batches, hosts or devices.
      batch_size: passages that a host samples for at once (rounded up to its devices).
      filter_searcher: one of searchers/; only queries for which it finds their own passage are kept.
      filter_k: among so many.
      shard_size: passages a part: at most so many are lost when it is killed.
      step: which of the query generator's checkpoints (--MODEL_STEP); None is the newest.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    settings = {"count": count, "shard_size": shard_size}
    if predictions:
        origin: QuerySource = open_predictions(predictions)
        stats = ((file.resolve(), file.stat()) for file in origin.files)
        settings["predictions"] = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    else:
        model_dir = model_dir or work.model("doc2query")
        origin = Sampler(model_dir, count, temperature, top_k, seed, batch_size, step)
        settings |= {"temperature": temperature, "top_k": top_k, "seed": seed, **origin.recipe}
    found_by = ConsistencyFilter(work, collection, filter_searcher, filter_k) if filter_searcher else None
    recipe = {"collection": collection.fingerprint, **settings, "filter": found_by and found_by.recipe}

    folder = work.synthetic(name)
    parts = QueryShards(folder.with_name(f"{name}{UNFINISHED}"), collection.passage_count, shard_size)
    first = jax.process_index() == 0
    # The first process's lock keeps out other commands; the rest of this one wait for it in `_meet`.
    with storage.lock(parts.folder) if first else contextlib.nullcontext():
        _meet("the lock is held")
        if not storage.is_up_to_date(folder, recipe):
            if first:
                begin(parts, recipe)
                origin.prepare(collection, parts)
            _meet("the parts can be made")
            make_parts(collection, parts, origin, found_by, count, name)
            _meet("all parts are there")
            if first:
                storage.build_once(folder, recipe, lambda tmp: synthetic.join(tmp, collection, parts))
            _meet("the parts are joined")
        if first and begun(parts, recipe):
            paths.remove(parts.folder)
    manifest = storage.read_manifest(folder, synthetic.VERB)
    told = ("passages", "made", "distinct", "queries")
    return {"synthetic": str(folder), **{key: manifest[key] for key in told}}


def begun(parts: QueryShards, recipe: dict) -> bool:
    """Whether there are parts of this recipe."""
    path = parts.folder / "recipe.json"
    return path.exists() and storage.read_json(path, "delete the folder") == json.loads(json.dumps(recipe))


def begin(parts: QueryShards, recipe: dict) -> None:
    """Makes the folder of the parts, unless it holds parts of the same recipe."""
    if begun(parts, recipe):
        left = len(parts.missing(0, 1))
        log(f"{parts.folder}: going on, {parts.count - left} of {parts.count} parts are finished")
        return
    paths.remove(parts.folder)
    storage.write_json(parts.folder / "recipe.json", recipe)


def make_parts(
    collection: Collection,
    parts: QueryShards,
    origin: QuerySource,
    found_by: "ConsistencyFilter | None",
    most: int,
    name: str,
) -> None:
    """Makes this host's missing parts."""
    numbers = parts.missing(jax.process_index(), jax.process_count())
    if not numbers:
        return
    with bar(f"generate {name}", sum(len(parts.rows(number)) for number in numbers)) as advance:
        made_of_parts = origin.queries(collection, parts, numbers, advance)
        for number, made in zip(numbers, made_of_parts, strict=True):
            made = [some[:most] for some in made]
            different = [distinct(some) for some in made]
            kept = different
            if found_by:
                ids = collection.ids.take(list(parts.rows(number))).to_pylist()
                kept = found_by.keep(ids, different)
            parts.write(
                number,
                (
                    {"queries": queries, "made": len(all_), "distinct": len(some)}
                    for queries, all_, some in zip(kept, made, different, strict=True)
                ),
            )


def distinct(queries: Sequence[str]) -> list[str]:
    """Queries that differ in more than case and white space, which is normalised; none that is empty."""
    first: dict[str, str] = {}
    for query in queries:
        words = " ".join(query.split())
        first.setdefault(words.casefold(), words)
    first.pop("", None)
    return list(first.values())


class Sampler:
    """Samples queries from a query generator, over this host's devices."""

    def __init__(
        self,
        model_dir: str | Path,
        count: int,
        temperature: float,
        top_k: int,
        seed: int,
        batch_size: int,
        step: int | None = None,
    ):
        mesh = make_mesh().local_mesh  # hosts work on their own
        opened = load_model(model_dir, step, mesh)
        if not isinstance(opened.model, QueryGenerator):
            raise UserError(
                f"{model_dir}: holds a {opened.model.family} model, not a query generator: "
                "`retrieval-jax train --gin_file=runs/doc2query.gin`"
            )
        self.recipe = model_recipe(model_dir, opened.step, opened.description)
        self.params, self.vocabulary = opened.params, opened.vocabulary
        self.passage_length = opened.description["passage_length"]
        self.batch_size = round_up(batch_size, mesh.shape["data"])
        self.sharding = partitioning.batch_sharding(mesh)

        @jax.jit
        def sample(params: dict, passages_BxS: jax.Array, rows_B: jax.Array) -> jax.Array:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
            length = opened.description["input_length"]
            return opened.model.sample(params, passages_BxS, keys_B, count, length, temperature, top_k)[0]

        self.sample = sample

    def prepare(self, collection: Collection, parts: QueryShards) -> None:
        """Nothing: passages are read as they are sampled for."""

    def queries(
        self, collection: Collection, parts: QueryShards, numbers: Sequence[int], advance: Advance
    ) -> Iterator[list[list[str]]]:
        """For each of these parts, `count` queries for each of its passages."""
        tokens, began = 0, None
        for number in numbers:
            made: list[list[str]] = []
            for some in self._dispatch(collection, parts.rows(number)):
                sampled_BxNxT = np.asarray(some[0])[: some[1]]
                made += map(self.vocabulary.decode, sampled_BxNxT)
                if began is None:  # the first batch waited for the compilation
                    began = time.monotonic()
                    advance(some[1])
                    continue
                tokens += int((sampled_BxNxT > 0).sum())
                advance(some[1], f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
            yield made

    def _dispatch(self, collection: Collection, rows: range) -> list[tuple[jax.Array, int]]:
        """(samples on their way, how many of them are real) of each batch; the devices work through them."""
        passages = self.vocabulary.batch([p.full_text for p in collection.get(rows)], self.passage_length)
        on_the_way = []
        for first in range(0, len(rows), self.batch_size):
            some = passages[first : first + self.batch_size]
            real, short = len(some), self.batch_size - len(some)
            batch = (np.pad(some, ((0, short), (0, 0))), rows.start + first + np.arange(self.batch_size))
            on_the_way.append((self.sample(self.params, *jax.device_put(batch, self.sharding)), real))
        return on_the_way


class ConsistencyFilter:
    """Keeps the queries for which a searcher finds their own passage (Alberti et al. 2019, for retrieval)."""

    def __init__(self, work: Workspace, collection: Collection, name: str, k: int):
        folder = work.searcher(name)
        self.recipe = {"searcher": searcher_manifest(folder, collection)["recipe"], "k": k}
        self.k = k
        self.searcher = Searcher.open(folder, lambda: make_mesh().local_mesh)  # hosts work on their own

    def keep(self, passage_ids: Sequence[str], queries: Sequence[Sequence[str]]) -> list[list[str]]:
        """For each passage, those of its queries that find it."""
        kept: list[list[str]] = [[] for _ in queries]
        asked = [(row, query) for row, some in enumerate(queries) for query in some]
        for first in range(0, len(asked), BATCH_SIZE):
            some = asked[first : first + BATCH_SIZE]
            rankings = self.searcher.search([query for _, query in some], self.k)
            for (row, query), ranking in zip(some, rankings, strict=True):
                if any(found == passage_ids[row] for found, _ in ranking):
                    kept[row].append(query)
        return kept


def _meet(what: str) -> None:
    """Waits for the other hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
