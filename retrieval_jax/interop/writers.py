"""Writers of exported folders: a searcher, or a model for other programs.

A writer is called with an empty folder and a `Subject`, and returns the facts of the folder's manifest.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from retrieval_jax.checkpoints import (
    hugging_face,
    model_folder,
    sentence_transformers,
    t5x_checkpoints,
    tokenizer,
)
from retrieval_jax.checkpoints.model_folder import LoadedModel, load_model
from retrieval_jax.checkpoints.weights import LazyArray, lazy_arrays, write_safetensors
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.embeddings.encoding import encode_by_model
from retrieval_jax.interop import parquet, stablehlo
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.dual_encoder_network import TOWERS
from retrieval_jax.models.layers import STACK_AXIS
from retrieval_jax.models.lexical_encoder import LexicalEncoder

MODEL, DOCIDS, SETS, PARTS = "model", "docids", "sets", "parts"  # folders in an exported searcher's


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is exported: a model, and the searcher's folder and manifest, if there is one.

    Attributes:
      model_dir: the model's folder; None for a searcher without one, such as BM25.
      step: the model's checkpoint.
      searcher: the searcher's folder; None where a model is exported alone.
      manifest: the searcher's manifest.
      work: the work folder of the collection.
    """

    model_dir: Path | None
    step: int | None
    searcher: Path | None = None
    manifest: Mapping = dataclasses.field(default_factory=dict)
    work: Workspace | None = None

    @classmethod
    def of_searcher(cls, folder: Path, manifest: Mapping) -> "Subject":
        """Makes the subject of a searcher's folder, with its model if it has one."""
        model = paths.join(folder, manifest["model"]) if "model" in manifest else None
        return cls(model, manifest.get("step"), folder, manifest)

    def open(self, mesh: Mesh | None = None) -> LoadedModel:
        """Loads the model. Raises UserError for BM25 and fused searchers, which have none of their own.

        Args:
          mesh: the devices to load it on; None for one.
        """
        if self.model_dir is None:
            what = "a fused searcher" if self.manifest.get(PARTS) else "BM25"
            raise UserError(f"{self.searcher}: {what} has no weights: --gin.export.format=\"'searcher'\"")
        return load_model(self.model_dir, self.step, mesh)

    def open_for_others(self, mesh: Mesh | None = None) -> LoadedModel:
        """Loads the model for another format. Raises UserError for a lexical encoder, which none has."""
        opened = self.open(mesh)
        if isinstance(opened.model, LexicalEncoder):
            raise UserError(
                f"{self.model_dir}: a lexical encoder, which no other format has: export its searcher, "
                "--gin.export.format=\"'searcher'\""
            )
        return opened

    @property
    def docids(self) -> Path | None:
        """The folder of the docids that the searcher finds; None where it finds passages by vectors."""
        docids = self.manifest.get("docids")
        return paths.join(self.searcher, docids) if docids else None

    @property
    def sets(self) -> Path | None:
        """The folder of the sets of tokens that the searcher scores passages by; None without any."""
        sets = self.manifest.get("sets")
        return paths.join(self.searcher, sets) if sets else None


def write_searcher(folder: Path, subject: Subject) -> dict:
    """Writes everything that a Searcher is opened from, and returns the facts of its manifest.

    Raises:
      UserError: the subject is a model alone; or the model, docids or sets of the searcher, or a part of it,
        are missing or damaged.
    """
    if subject.searcher is None:
        raise UserError(f"{subject.model_dir}: no searcher: name one by --gin.SEARCHER, without MODEL_DIR")
    shutil.copytree(
        paths.ensure_local(subject.searcher),
        folder,
        ignore=lambda *_: (storage.MANIFEST,),
        dirs_exist_ok=True,
    )
    facts = {key: value for key, value in subject.manifest.items() if key not in ("recipe", "files")}
    if subject.model_dir:
        facts[MODEL] = MODEL
        write_model(folder / MODEL, subject.model_dir, subject.open())
    if subject.docids:
        facts[DOCIDS] = DOCIDS
        DocidTable.open(subject.docids)  # raises where it is not whole
        shutil.copytree(paths.ensure_local(subject.docids), folder / DOCIDS)
    if subject.sets:
        facts[SETS] = SETS
        TokenSets.open(subject.sets)
        shutil.copytree(paths.ensure_local(subject.sets), folder / SETS, copy_function=paths.link)
    if subject.manifest.get(PARTS):
        facts[PARTS] = [_write_part(folder, subject, part) for part in subject.manifest[PARTS]]
    return facts


def _write_part(folder: Path, subject: Subject, part: Mapping) -> dict:
    """Writes a part of a fused searcher into the folder, and returns what the manifest says of it."""
    source, target = paths.join(subject.searcher, part["folder"]), f"{PARTS}/{part['name']}"
    manifest = storage.read_manifest(source, "index")
    (folder / target).mkdir(parents=True)
    facts = write_searcher(folder / target, Subject.of_searcher(source, manifest))
    storage.write_manifest(folder / target, {"recipe": manifest["recipe"], **facts})
    return {**part, "folder": target}


def write_model(folder: Path, model_dir: Path, opened: LoadedModel) -> None:
    """Writes a model folder with weights and without checkpoints, and the gin that trained it."""
    folder.mkdir()
    write_safetensors(folder, model_folder.WEIGHTS, lazy_arrays(opened.params))
    storage.write_json(folder / model_folder.DESCRIPTION, opened.description | {"step": opened.step})
    for name in (model_folder.VOCABULARY, model_folder.GIN):
        if (model_dir / name).is_file():
            paths.copy(model_dir / name, folder / name)


def layers_of(params: Mapping) -> dict[str, LazyArray]:
    """Returns a model's parameters by name, an array a layer."""
    return t5x_checkpoints.unscanned(lazy_arrays(params), STACK_AXIS)


def write_hugging_face(folder: Path, subject: Subject) -> dict:
    """Writes a T5ForConditionalGeneration and its tokenizer. A docid vocabulary follows the texts' one.

    Raises:
      UserError: the model cannot be loaded; it is a dual encoder or a lexical encoder, or has a PAWA decoder
        or an MLP that Hugging Face's T5 has not; or transformers has no tokenizer of its vocabulary's kind.
    """
    opened = subject.open_for_others()
    config = opened.model.config
    if isinstance(opened.model, DualEncoder):
        other = "stablehlo" if opened.model.module.pooling == "decoder" else "sentence_transformers"
        raise UserError(f"{subject.model_dir}: a dual encoder: --gin.export.format=\"'{other}'\"")
    if config.pawa_layers:
        raise UserError(f"{subject.model_dir}: Hugging Face's T5 has no PAWA decoder: export a searcher")
    arrays, start = layers_of(opened.params), 0
    if config.output_size is not None:
        arrays, start = hugging_face.with_docids(arrays, config), config.vocab_size
    hugging_face.write(folder, arrays, config, start=start)
    tokenizer.write(folder, opened.vocabulary, opened.description.get("input_length"))
    if subject.docids:
        shutil.copytree(paths.ensure_local(subject.docids), folder / DOCIDS)
    return {"docid_tokens_from": start if config.output_size is not None else None}


def write_sentence_transformers(folder: Path, subject: Subject) -> dict:
    """Writes what SentenceTransformer opens: separate towers in folders queries/ and passages/.

    Raises:
      UserError: the model cannot be loaded; it is no dual encoder, or one whose vectors are the decoder's
        states or whose MLP Hugging Face's T5 has not; or transformers has no tokenizer of its vocabulary's
        kind.
    """
    opened = subject.open_for_others()
    model = opened.model
    if not isinstance(model, DualEncoder):
        raise UserError(f"{subject.model_dir}: not a dual encoder: --gin.export.format=\"'huggingface'\"")
    if model.module.pooling == "decoder":
        raise UserError(
            f"{subject.model_dir}: its vectors are the decoder's first states, and sentence-transformers has "
            "no module for one: --gin.export.format=\"'stablehlo'\", 't5x', 'parquet' or 'searcher'"
        )
    lengths = {side: opened.description[f"{side}_length"] for side in ("input", "passage")}
    towers = {"": (opened.params, max(lengths.values()))}
    if not model.shared_towers:
        sides = zip(("queries", "passages"), TOWERS, lengths.values(), strict=True)
        towers = {name: (opened.params[tower], length) for name, tower, length in sides}
    for name, (params, length) in towers.items():
        (folder / name).mkdir(exist_ok=True)
        normalize = model.module.normalize
        arrays = layers_of(params)
        sentence_transformers.write(folder / name, arrays, model.config, normalize, length, model.prompts)
        tokenizer.write(folder / name, opened.vocabulary, length)
    return {}


def write_t5x(folder: Path, subject: Subject) -> dict:
    """Writes T5X's checkpoint_STEP, an array a layer."""
    opened = subject.open_for_others()
    checkpoint = folder / f"checkpoint_{opened.step}"
    checkpoint.mkdir()
    t5x_checkpoints.write(checkpoint, layers_of(opened.params), opened.step)
    return {}


def write_stablehlo(folder: Path, subject: Subject) -> dict:
    """Writes StableHLO programs and the arrays that they take; see stablehlo.py."""
    opened = subject.open_for_others()
    table = DocidTable.open(subject.docids) if subject.docids else None
    sets = TokenSets.open(subject.sets) if subject.sets else None
    made = stablehlo.write(folder, opened, table, subject.manifest, sets)
    paths.copy(subject.model_dir / model_folder.VOCABULARY, folder / model_folder.VOCABULARY)
    return made


def write_parquet(folder: Path, subject: Subject) -> dict:
    """Writes the passages with a dual encoder's vectors, which are computed unless they are there.

    Raises:
      UserError: the model cannot be loaded or is no dual encoder; the collection cannot be read; or the
        vectors cannot be computed, see `encode_collection`.
    """
    mesh = all_devices()
    opened = subject.open_for_others(mesh)
    if not isinstance(opened.model, DualEncoder):
        raise UserError(
            f"{subject.model_dir}: not a dual encoder, which alone makes vectors of passages: name one by "
            "--MODEL_DIR, or its searcher by --SEARCHER"
        )
    collection = Collection(subject.work.collection)
    vectors = encode_by_model(subject.model_dir, opened, mesh, subject.work, collection)
    return parquet.write(folder, vectors, collection)


WRITERS = {
    "searcher": write_searcher,
    "huggingface": write_hugging_face,
    "sentence_transformers": write_sentence_transformers,
    "t5x": write_t5x,
    "stablehlo": write_stablehlo,
    "parquet": write_parquet,
}
