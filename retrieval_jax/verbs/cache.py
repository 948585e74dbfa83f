"""The verb `cache`: tokenised examples on disk, written by seqio's Beam job; see examples/write_cache.py."""

import functools
from collections.abc import Sequence

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import parallel
from retrieval_jax.data.records import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.examples.write_cache import write_cache
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training.families import family_of


@gin.configurable
def cache(
    source: str,
    data: DataConfig,
    work_dir: str | None = None,
    docids: str | None = "naive",
    retriever: type[Retriever] = GenerativeRetriever,
    beam_options: Sequence[str] = (),
) -> dict:
    """Writes the tokenised examples of the tasks that a training run mixes, by seqio's Beam job.

    Training with the same settings then reads them. A task that is there already is not made again.

    Args:
      source: the collection, as `import` takes it.
      work_dir: its work folder; None is `work/NAME`.
      data: which tasks, as in training.
      docids: kind of docids that a generative retriever writes.
      retriever: the class of the models that train on the examples: GenerativeRetriever, DualEncoder or
        QueryGenerator.
      beam_options: flags for Beam, such as ('--runner=DataflowRunner', '--project=…'); the default runs here.
    """
    if retriever.writes_docids and not docids:
        raise UserError("cache: docids of no kind: --DOCIDS=naive, or --gin.cache.retriever=@DualEncoder")
    work = Workspace.for_source(source, work_dir)
    parallel.check_beam_options(beam_options, work.folder)
    collection = Collection(work.collection)
    table = DocidTable.open(work.docids(docids)) if retriever.writes_docids else None
    opened = TrainDataset(data, work, collection, family_of(retriever).target_type, table)
    tasks = {task for _, shares in opened.stages() for task in shares}
    made = {}
    for task in sorted(tasks):
        name = f"{opened.prefix}.{task}"
        log(f"cache {name}")
        make = functools.partial(write_cache, opened, task, beam_options)
        made[name] = storage.build_once(work.cache(name), opened.recipe(task), make)["examples"]
    return {"cache": str(work.cache("")), "examples": made}
