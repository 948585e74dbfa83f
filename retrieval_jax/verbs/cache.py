"""The verb `cache`: tokenised examples on disk, as seqio's caches are; see examples/write_cache.py."""

from collections.abc import Sequence

import gin

from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import parallel
from retrieval_jax.data.vocabulary import NO_PROMPTS, Prompts
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.examples.write_cache import DatasetFolders, write_cache
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training.families import family_of


@gin.configurable
def cache(
    source: str,
    data: DataConfig,
    work_dir: str | None = None,
    docids: str | None = "naive",
    retriever: type[Retriever] = GenerativeRetriever,
    initial: InitialCheckpoint | None = None,
    beam_options: Sequence[str] = (),
) -> dict:
    """Writes the tokenised examples of the tasks that a training run mixes, in as many processes as cores.

    Training with the same settings then reads them, and so do seqio and T5X. A cache holds one epoch: a task
    whose examples are drawn again in each is left out, and training makes them as it reads them. A task that
    is there already is not made again. After a kill, the same command goes on from the finished files.

    Args:
      source: the collection, as `import` takes it.
      work_dir: its work folder; None is `work/NAME`.
      data: which tasks, as in training.
      docids: kind of docids that a generative retriever writes.
      retriever: the class of the models that train on the examples: GenerativeRetriever, DualEncoder,
        LexicalEncoder or QueryGenerator.
      initial: the weights that training begins with (--INITIAL_CHECKPOINT). A dual encoder for which no
        prompts are set reads theirs before its texts, here as in training.
      beam_options: flags of a Beam runner that makes the files instead of this machine's cores, as in
        ('--runner=FlinkRunner', …). Its workers must share this file system.

    Returns:
      The folder of the cache, the number of examples of each task that is there, and the bytes of all.

    Raises:
      UserError: the retriever writes docids, and `docids` is of no kind.
    """
    if retriever.writes_docids and not docids:
        raise UserError("cache: docids of no kind: --DOCIDS=naive, or --gin.cache.retriever=@DualEncoder")
    work = Workspace.for_source(source, work_dir)
    work = Workspace(paths.absolute(work.folder))  # for processes in other folders
    parallel.check_beam_options(beam_options, work.folder)
    target_type = family_of(retriever).targets_for(data)
    docids = docids if retriever.writes_docids else None
    dataset = DatasetFolders(data, work, target_type, docids, _prompts(retriever, initial))
    opened = dataset.open()
    made, size = {}, 0
    examples = {task: found for _, shares in opened.stages() for task, (found, _) in shares.items()}
    for task in sorted(examples):
        if examples[task].draws:
            log(
                f"{task}: not cached, as training draws its examples again in each epoch: typos, candidates "
                "of a group, or one of a passage's docids"
            )
            continue
        log(f"cache {opened.prefix}.{task}")
        manifest = write_cache(dataset, opened, task, beam_options)
        made[f"{opened.prefix}.{task}"] = manifest["examples"]
        size += manifest["bytes"]
    return {"cache": str(work.cache("")), "examples": made, "bytes": size}


def _prompts(retriever: type[Retriever], initial: InitialCheckpoint | None) -> Prompts:
    """Returns the texts that training would put before queries and passages."""
    if not issubclass(retriever, DualEncoder):
        return NO_PROMPTS
    model = retriever(T5Config(1, 1, 1, 1, 1, 1, 1))  # whatever its sizes
    if initial:
        initial.give_prompts(model)
    return model.prompts
