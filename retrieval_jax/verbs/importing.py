"""The verb `import`: any source of passages and queries becomes a `collection` folder."""

from pathlib import Path

import gin

from retrieval_jax.checkpoints import hub
from retrieval_jax.core import storage
from retrieval_jax.core.values import Fraction, Positive, Seed
from retrieval_jax.core.workspace import PYTHON_DOCS, Workspace, source_path
from retrieval_jax.data import parallel, writing
from retrieval_jax.data.sources import from_packages
from retrieval_jax.data.sources.lines import ErrorLog
from retrieval_jax.data.sources.python_docs import PACKAGES


@gin.configurable
def import_collection(
    source: str,
    work_dir: str | None = None,
    vocabulary_path: str | None = None,
    vocab_size: Positive = 8000,
    held_out: Fraction = 0.05,
    on_error: str = "fail",
    subset: Positive | None = None,
    subset_seed: Seed = 0,
    shard_bytes: Positive = 32 << 20,
    beam_options: tuple[str, ...] = (),
    docs_size: Positive = 5000,
    docs_packages: tuple[str, ...] = PACKAGES,
) -> dict:
    """Writes the records and the vocabulary of a collection, once.

    Args:
      source: `python_docs` (embedded), `ir_datasets:ID` or `ir_datasets:ID,ID` (splits of one corpus), or a
        folder in the layout of BEIR, TSV, MS MARCO, NCI or Tevatron, or in a registered one.
      work_dir: the work folder, for everything that is made of this collection; None is `work/NAME`.
      vocabulary_path: a SentencePiece model to use (--VOCABULARY): a file, or hf:ORG/NAME or
        hf:ORG/NAME@REVISION on the Hugging Face hub; None learns one on passages, their ids and train
        queries.
      vocab_size: pieces of a learned vocabulary, which reads "When" as "when", and punctuation and symbols
        with a space on both sides. Texts that a model writes (doc2query) have these spaces, too.
      held_out: if there are train but no dev queries, this share of them becomes the dev split. A hash of
        its id chooses a query.
      on_error: a bad line ends the import ("fail") or is left out and counted ("skip").
      subset: the number of passages to keep: those relevant to dev and test queries, then those relevant to
        train queries, then others, in a random order; None keeps all.
      subset_seed: the seed of that order.
      shard_bytes: about how much source text goes into a file of records (MS MARCO's 3 GB into 94 files).
      beam_options: flags of a Beam runner that writes the records instead of this machine's cores, as in
        ("--runner=FlinkRunner", …). Its workers must share this file system.
      docs_size: the most passages of `python_docs`.
      docs_packages: the packages whose documentation `python_docs` reads.

    Returns:
      The collection's folder, and facts of its manifest: its name, numbers of passages and queries, and what
      was left out.
    """
    skip_errors = ErrorLog.skips(on_error)
    docs = {"docs_size": docs_size, "docs_packages": docs_packages}
    opened = from_packages.open_any_source(source, **docs)
    path = Workspace.for_source(source, work_dir, imports=True).collection
    parallel.check_beam_options(beam_options, path)
    pieces = hub.locate_vocabulary(vocabulary_path) if vocabulary_path else None
    settings = writing.ImportSettings(
        vocabulary_path=pieces and str(pieces.path),
        vocab_size=vocab_size,
        held_out=held_out,
        skip_errors=skip_errors,
        subset=subset,
        subset_seed=subset_seed,
        shard_bytes=shard_bytes,
        beam_options=beam_options,
    )
    recipe = writing.source_recipe(opened) | settings.recipe()
    if not opened.files:
        recipe |= {"source": source}
    if source == PYTHON_DOCS:
        recipe |= docs

    def make(folder: Path) -> dict:
        made = writing.write_collection(folder, opened, settings)
        facts = {"source": source, "source_path": source_path(source), "vocabulary": pieces and pieces.name}
        return facts | made

    manifest = storage.build_once(path, recipe, make)
    shown = ("name", "passages", "copies", "queries", "skipped", "without_positives", "subset")
    return {"collection": str(path), **{key: manifest[key] for key in shown if manifest.get(key)}}
