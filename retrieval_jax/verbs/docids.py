"""The verb `docids`: a collection, and for some kinds its passages' vectors, become a table of docids."""

from pathlib import Path

import gin

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Seed
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.kinds import DocidKind, DocidRequest, PreviousTable, docid_kind
from retrieval_jax.docids.making import write_docids
from retrieval_jax.docids.table import VERSION, DocidTable
from retrieval_jax.embeddings.sources import SENTENCE_TRANSFORMERS, load_embeddings
from retrieval_jax.mesh.partitioning import make_partitioner

QUALITY_KEYS = ("tokens_to_uniqueness", "neighbour_prefix_overlap", "extension")
SUMMARY_KEYS = ("kind", "passages", "length", "distinct", *QUALITY_KEYS)  # of a table's manifest


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
    """Makes the docid table of an imported collection, and reports how good the docids are.

    Args:
      source: the collection, as `import` takes it.
      work_dir: its work folder; None is `work/NAME`.
      kind: "atomic", "naive", "naive_digits", "semantic", "semantic_2d", "rq_LxV" (L codes of V, used about
        equally often with --gin.residual.balanced=True), "file" (docids that somebody else made, of
        --gin.docid_file.path="'FILE'"), or a kind that a module of your own registers, which a gin file
        imports: see retrieval_jax/docids/README.md.
      embeddings: the passages' vectors, which semantic and rq docids cluster: a .npy or .safetensors file, a
        dual encoder's folder (this project's, or sentence-transformers' of a T5), hf:ORG/NAME with such a
        folder, or "sentence-transformers:NAME" (any model that this library opens: a folder, or a name on the
        hub); a name on the hub may end in @REVISION; None is models/dual_encoder of the work folder.
      extends: the folder of a table of an earlier state of the collection: its passages keep their docids,
        new ones get docids by the same clusters (and that table's settings).
      seed: the seed of the clustering, or of other random choices that a kind makes.
      force: whether to replace a table that a trained model of the work folder was trained to write.

    Returns:
      The table's folder, and facts of its manifest.

    Raises:
      UserError: there are no vectors to cluster, or a model was trained to write the docids that others would
        replace.
    """
    docids = docid_kind(kind)
    work = Workspace.for_source(source, work_dir)
    if docids.needs_vectors:
        embeddings = embeddings or _dual_encoder(work, docids)
    collection, folder = Collection(work.collection), work.docids(docids.name)
    recipe = {"version": VERSION, "kind": docids.name, "collection": collection.fingerprint}
    settings, vectors, previous = docids.settings and docids.settings(), None, None
    partitioner = make_partitioner() if docids.needs_vectors else None
    if embeddings:
        vectors, fingerprint = load_embeddings(embeddings, work, collection, partitioner)
        recipe |= {"embeddings": fingerprint}
    if embeddings or docids.uses_seed:  # with vectors, the report of the quality draws queries by the seed
        recipe |= {"seed": seed}
    if extends:
        previous = PreviousTable.open(extends, docids.name)
        settings = docids.settings and docids.settings(**previous.manifest["settings"])
    if docids.writes_text(settings):
        recipe |= {"vocabulary": Vocabulary(collection.vocabulary_path).checksum}
    if previous:
        recipe |= {"extends": previous.table.fingerprint()}
        if (
            paths.absolute(folder) == paths.absolute(previous.folder)
            and previous.table.collection == collection.fingerprint
        ):
            recipe = previous.manifest["recipe"]  # extended in its place, by an earlier call
    elif settings:
        recipe |= docids.recipe(settings)
    mesh = partitioner.mesh if partitioner else None
    request = DocidRequest(collection, previous, vectors, settings, seed % (1 << 32), mesh)
    if not force and not storage.is_up_to_date(folder, recipe):
        check_unused(folder, work, previous.table if previous else None)
    manifest = storage.build_once(folder, recipe, lambda tmp: write_docids(docids, request, tmp))
    return {"docids": str(folder), **{key: manifest[key] for key in SUMMARY_KEYS if key in manifest}}


def _dual_encoder(work: Workspace, docids: DocidKind) -> str:
    """Returns the folder of the work folder's dual encoder. Raises UserError where none was trained."""
    folder = work.model("dual_encoder")
    if not model_folder.is_model(folder):
        raise UserError(
            f"DOCIDS: {docids.name} docids cluster the passages' vectors: train a dual encoder "
            f"(`retrieval-jax train --gin_file=runs/dual_encoder.gin` makes {folder}), or name "
            f"--EMBEDDINGS=vectors.npy or {SENTENCE_TRANSFORMERS}NAME"
        )
    return str(folder)


def check_unused(folder: Path, work: Workspace, extended: DocidTable | None) -> None:
    """Raises UserError where a model of the work folder writes the docids in a folder and loses them.

    Args:
      folder: the table that another one replaces; it may be an extension of the one that a model learned.
      work: where the models are.
      extended: the table that the new one extends, so that models of this one and of its ancestors stay
        usable; None for a new table.
    """
    if not storage.finished(folder):
        return
    manifest = storage.read_manifest(folder, "docids")
    lost = {manifest["fingerprint"], *manifest.get("ancestors", ())}
    if extended is not None:
        lost -= {extended.fingerprint(), *extended.ancestors}
    for path in sorted((work.folder / "models").glob("*/model.json")):
        description = storage.read_json(path, "delete the model's folder")
        if model_folder.is_untrained(path.parent):
            continue  # an average of other models, which is made anew
        if description.get("docids_fingerprint") in lost:
            raise UserError(
                f"{folder}: {path.parent} was trained to write these docids, and others would replace "
                "them: name another WORK_DIR, extend them (EXTENDS), or replace them all the same with "
                "--gin.make_docids.force=True"
            )
