"""The verb `generate-queries` (doc2query): queries for every passage, from a model or from released files."""

from collections.abc import Sequence
from pathlib import Path

import gin

from retrieval_jax.checkpoints.model_folder import load_model, model_recipe
from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegative, Positive, PositiveFloat, Seed
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import generation, synthetic
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.predictions import open_predictions
from retrieval_jax.data.synthetic import QueryShards
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.query_sampler import QuerySampler, SamplingSettings
from retrieval_jax.search.batched import BATCH_SIZE
from retrieval_jax.search.manifest import searcher_manifest
from retrieval_jax.search.shared_work import make_in_shards, open_for_share, scratch_folder


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
    step: NonNegative | None = None,
) -> dict:
    """Makes synthetic/NAME: queries for each passage, without repetitions.

    After a kill, the same command goes on from the shards that are finished. With several hosts, each one
    makes its share of them.

    Args:
      source: the collection, as `import` takes it.
      work_dir: its work folder; None is `work/NAME`.
      name: the name of these queries.
      model_dir: the query generator to sample from; None is models/doc2query of the work folder.
      predictions: a folder of released docT5query predictions to read instead.
      count: queries that are sampled for a passage, or the most that are taken from the predictions.
      temperature: the logits are divided by it before a token is drawn.
      top_k: each token is drawn from this many likeliest ones.
      seed: the seed of the sampling. A passage's queries depend on it and on the passage's row, not on
        batches, hosts or devices.
      batch_size: passages that a host samples for at once (rounded up to its devices).
      filter_searcher: the name of a searcher. A query is kept only if this searcher finds its passage with
        it. None keeps all queries.
      filter_k: how many passages that searcher finds for a query.
      shard_size: passages of a shard: a kill loses the work of at most this many.
      step: the step of the query generator's checkpoint (--MODEL_STEP); None is the newest.

    Returns:
      The folder, the number of passages, and how many queries were made, were distinct and are kept.

    Raises:
      UserError: the model is no query generator.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    recipe = {"collection": collection.fingerprint, "count": count, "shard_size": shard_size, "filter": None}
    if predictions:
        query_source: generation.QuerySource = open_predictions(predictions)
        stats = ((file.resolve(), file.stat()) for file in query_source.files)
        recipe["predictions"] = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    else:
        sampling = {"count": count, "temperature": temperature, "top_k": top_k, "seed": seed}
        model_dir = model_dir or work.model("doc2query")
        query_source, model = _sampler(model_dir, step, batch_size=batch_size, **sampling)
        recipe |= sampling | model
    consistency_filter = None
    if filter_searcher:
        searcher = work.searcher(filter_searcher)
        recipe["filter"] = {"searcher": searcher_manifest(searcher, collection)["recipe"], "k": filter_k}
        opened = open_for_share(searcher, "generate_queries.filter_searcher", make_partitioner)
        consistency_filter = generation.ConsistencyFilter(opened.search, filter_k, BATCH_SIZE)

    folder = work.synthetic(name)
    shards = QueryShards(scratch_folder(folder), collection.passage_count, shard_size)

    def make(_: str, numbers: Sequence[int]) -> None:
        generation.make_shards(collection, shards, numbers, query_source, count, consistency_filter, name)

    make_in_shards(
        folder,
        recipe,
        {"passages": shards},
        make,
        join=lambda tmp: synthetic.join(tmp, collection, shards),
        prepare=lambda: query_source.prepare(collection, shards),
    )
    manifest = storage.read_manifest(folder, synthetic.VERB)
    shown = ("passages", "made", "distinct", "queries")
    return {"synthetic": str(folder), **{key: manifest[key] for key in shown}}


def _sampler(model_dir: str | Path, step: int | None, **sampling) -> tuple[QuerySampler, dict]:
    """Returns the sampler of a query generator, and the part of the recipe that the model is."""
    mesh, rules = make_partitioner().local  # hosts work on their own
    opened = load_model(model_dir, step, mesh, rules)
    if not isinstance(opened.model, QueryGenerator):
        raise UserError(
            f"{model_dir}: holds a {opened.model.family} model, not a query generator: "
            "`retrieval-jax train --gin_file=runs/doc2query.gin`"
        )
    settings = SamplingSettings(
        **sampling,
        passage_length=opened.description["passage_length"],
        query_length=opened.description["input_length"],
    )
    sampler = QuerySampler(opened.model, opened.params, opened.vocabulary, mesh, settings)
    return sampler, model_recipe(model_dir, opened.step, opened.description)
