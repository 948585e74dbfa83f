"""The verb `export`: a searcher or a model becomes a folder that others open, with this package or not."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import gin

from retrieval_jax.checkpoints import (
    model_folder,
)
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegative
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.evaluation.runs import searcher_metrics
from retrieval_jax.interop import model_card
from retrieval_jax.interop.writers import WRITERS, Subject
from retrieval_jax.search.manifest import searcher_manifest


@gin.configurable
def export(
    source: str,
    work_dir: str | None = None,
    name: str = "bm25",
    model_dir: str | None = None,
    format: str = "searcher",
    output: str | None = None,
    step: NonNegative | None = None,
) -> dict:
    """Writes a searcher, or a model alone, into one folder.

    Args:
      source: the collection.
      work_dir: the collection's work folder; None is `work/NAME`.
      name: the searcher, one of searchers/.
      model_dir: a model to export instead.
      format: "searcher" (weights, vocabulary, docids or index: `Searcher.open(path)` answers queries with
        it), "huggingface" (T5ForConditionalGeneration.from_pretrained), "sentence_transformers", "t5x" (a
        legacy checkpoint), "stablehlo" (programs that JAX alone runs) or "parquet" (the passages with a dual
        encoder's vectors, for vector stores such as pgvector).
      output: the folder to make; None is exports/NAME of the work folder, or NAME.FORMAT for all formats but
        the first.
      step: which of the checkpoints of `model_dir` (--MODEL_STEP); None is the newest. A searcher has its
        own.

    Returns:
      The folder, its format, and its numbers of files and bytes.

    Raises:
      UserError: there is no such format.
    """
    if format not in WRITERS:
        raise UserError(f"export.format: no format {format!r}: {', '.join(WRITERS)}")
    work = Workspace.for_source(source, work_dir)
    if model_dir:
        description, step = model_folder.read_description_and_step(paths.as_path(model_dir), step)
        subject = Subject(paths.as_path(model_dir), step, work=work)
        name = paths.absolute(model_dir).name
        recipe = model_folder.model_recipe(model_dir, step, description)
    else:
        folder = work.searcher(name)
        collection = Collection(work.collection)
        manifest = searcher_manifest(folder, collection)
        subject = dataclasses.replace(Subject.of_searcher(folder, manifest), work=work)
        recipe = manifest["recipe"] | {"metrics": searcher_metrics(work, name, collection)}
    output = (
        paths.as_path(output) if output else work.export(name if format == "searcher" else f"{name}.{format}")
    )

    recipe |= {"format": format}
    if format == "parquet":
        recipe["collection"] = Collection(work.collection).fingerprint

    def make(tmp: Path) -> dict:
        facts = WRITERS[format](tmp, subject)
        facts |= {"files": storage.file_checksums(tmp)}
        write_model_card(tmp, name, format, subject, recipe.get("metrics", {}))
        return facts | {"manifest_digest": storage.manifest_digest({"recipe": recipe, **facts})}

    made = storage.build_once(output, recipe, make)
    size = sum(map(paths.size, paths.files(output)))
    return {"export": str(output), "format": format, "files": len(made["files"]), "bytes": size}


def write_model_card(
    folder: Path, name: str, format: str, subject: Subject, metrics: Mapping[str, Mapping]
) -> None:
    """Writes README.md of what the model's folder, the searcher's manifest and the reports tell.

    Args:
      folder: the exported folder.
      name: the title.
      format: the export's format.
      subject: what is exported.
      metrics: split -> what `evaluate` measured of the searcher.
    """
    description = {}
    if subject.model_dir:
        description = model_folder.read_description(subject.model_dir)
        metrics = model_card.dev_metrics(subject.model_dir, subject.step) | dict(metrics)
    facts = {**subject.manifest, "step": subject.step}
    model_card.write(folder, name, format, description, facts, metrics)
