"""The verb `docids`: a collection, and for some kinds its passages' vectors, become a table of docids."""

import dataclasses
from pathlib import Path

import gin

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Seed
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids import quality
from retrieval_jax.docids.kinds import Earlier, Job, maker_of
from retrieval_jax.docids.table import VERSION
from retrieval_jax.embeddings.sources import SENTENCE_TRANSFORMERS, load_embeddings
from retrieval_jax.mesh.partitioning import make_mesh


@gin.configurable
def make_docids(
    source: str,
    work_dir: str | None = None,
    kind: str | None = "naive",
    embeddings: str | None = None,
    extends: str | None = None,
    seed: Seed = 0,
    force: bool = False,
) -> dict:
    """Makes the docid table of a collection that was imported, and reports how good the docids are.

    Args:
      source, work_dir: the collection, and where its work lies.
      kind: "atomic", "naive", "naive_digits", "semantic", "semantic_2d", or "rq_LxV": L codes of V.
      embeddings: the passages' vectors, which all kinds but the first three cluster: a .npy or .safetensors
        file, a dual encoder's folder, or "sentence-transformers:NAME" (a folder, or a name on Hugging Face's
        hub, where NAME@REVISION is one state of it); None is models/dual_encoder of the work folder.
      extends: the folder of a table of an earlier state of the collection: its passages keep their docids,
        new ones get docids by the same clusters (and that table's settings).
      seed: of the clustering.
      force: whether a table may be replaced that a trained model of the work folder writes.
    """
    make, settings_class = maker_of(kind)
    work = Workspace.for_source(source, work_dir)
    if settings_class and not embeddings:
        embeddings = str(work.model("dual_encoder"))
        if not (paths.as_path(embeddings) / "checkpoints").is_dir():
            raise UserError(
                f"DOCIDS: {kind} docids cluster the passages' vectors: train a dual encoder "
                f"(`retrieval-jax train --gin_file=runs/dual_encoder.gin` makes {embeddings}), or name "
                f"--EMBEDDINGS=vectors.npy or {SENTENCE_TRANSFORMERS}NAME"
            )
    collection, folder = Collection(work.collection), work.docids(kind)
    recipe = {"version": VERSION, "kind": kind, "collection": collection.fingerprint}
    if kind == "naive":
        recipe |= {"vocabulary": Vocabulary(collection.vocabulary_path).checksum}
    settings, vectors, earlier = settings_class and settings_class(), None, None
    mesh = make_mesh() if settings_class else None
    if embeddings:
        vectors, fingerprint = load_embeddings(embeddings, work, collection, mesh)
        recipe |= {"embeddings": fingerprint, "seed": seed}
    if extends:
        earlier = Earlier.open(extends, kind)
        recipe |= {"extends": earlier.table.fingerprint()}
        if (
            paths.absolute(folder) == paths.absolute(earlier.folder)
            and earlier.table.collection == collection.fingerprint
        ):
            recipe = earlier.manifest["recipe"]  # extended in its place, by an earlier call
    elif settings:
        recipe |= {"settings": dataclasses.asdict(settings)}
    job = Job(collection, earlier, vectors, settings, seed % (1 << 32), mesh)

    def build(tmp: Path) -> dict:
        made = make(job)
        table = job.table(kind, made)
        made.write(tmp)
        report = quality.report(table, vectors, seed=job.seed)
        storage.write_json(tmp / "quality.json", report)
        quality.plot(report, tmp / "quality.png")
        return table.write(tmp) | made.facts | _figures(job, report)

    if not force and not storage.is_up_to_date(folder, recipe) and earlier is None:
        check_unused(folder, work)
    manifest = storage.build_once(folder, recipe, build)
    told = (
        "kind",
        "passages",
        "length",
        "distinct",
        "tokens_to_uniqueness",
        "neighbour_prefix_overlap",
        "extension",
    )
    return {"docids": str(folder), **{key: manifest[key] for key in told if key in manifest}}


def check_unused(folder: Path, work: Workspace) -> None:
    """Raises UserError where a model of the work folder was trained to write the docids in a folder."""
    if not storage.finished(folder):
        return
    fingerprint = storage.read_manifest(folder, "docids")["fingerprint"]
    for path in sorted((work.folder / "models").glob("*/model.json")):
        description = storage.read_json(path, "delete the model's folder")
        if description.get("docids_fingerprint") == fingerprint:
            raise UserError(
                f"{folder}: {path.parent} was trained to write these docids, and others would replace "
                "them: name another WORK_DIR, extend them (EXTENDS), or replace them all the same with "
                "--gin.make_docids.force=True"
            )


def _figures(job: Job, report: dict) -> dict:
    """What the manifest says of quality (tokens until unique; how much neighbours share, against chance)."""
    figures = {"tokens_to_uniqueness": report["tokens_to_uniqueness"]["mean"]}
    if "neighbours" in report:
        figures["neighbour_prefix_overlap"] = report["neighbours"]["ratio"]
    if job.earlier:
        kept = job.collection.passage_count - len(job.rows)
        removed = len(job.earlier.table.passage_ids) - kept
        figures["extension"] = {"kept": kept, "added": len(job.rows), "removed": removed}
    return figures
