"""Sources of the vectors of a collection's passages: files, dual encoders, the hub, sentence-transformers."""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from retrieval_jax.checkpoints import hub, sentence_transformers, tokenizer
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.model_folder import LoadedModel, model_from_description, params_to_devices
from retrieval_jax.checkpoints.pretrained import Pretrained, fingerprint, open_pretrained
from retrieval_jax.core import npy, paths, storage
from retrieval_jax.core.errors import UserError, first_line
from retrieval_jax.core.progress import bar
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.embeddings.encoding import (
    Embeddings,
    Encode,
    check_finite,
    encode_by_model,
    encode_collection,
)
from retrieval_jax.embeddings.text_encoder import passage_encoder
from retrieval_jax.mesh.partitioning import Partitioner, all_devices
from retrieval_jax.models.dual_encoder import DualEncoder

SENTENCE_TRANSFORMERS = "sentence-transformers:"
_LENGTH = 256  # tokens of a passage at most, where the folder of a model does not say
_BLOCK = 1 << 24  # bytes looked at, at once
_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def load_embeddings(
    where: str, work: Workspace, collection: Collection, partitioner: Partitioner | None = None
) -> tuple[np.ndarray, str]:
    """Loads or computes the vectors of a collection's passages.

    Args:
      where: a `.npy` file; a `.safetensors` file with one matrix, or with one that is named "embeddings"; the
        folder of a dual encoder, of this project or in the format of sentence-transformers; `hf:ORG/NAME`, a
        repository of the Hugging Face hub with such a folder; or "sentence-transformers:NAME" for any model
        that the library sentence-transformers opens: a folder, or a name on the hub. `@REVISION` after a name
        on the hub takes one revision of it.
      work: vectors that must be computed, or converted to float32, are kept in its embeddings/NAME.
      collection: the passages.
      partitioner: the devices that a dual encoder runs on, and how it is divided over them; None: all
        of them.

    Returns:
      The vectors, float32 N×E in the collection's order, memory-mapped; and their fingerprint.

    Raises:
      UserError: the vectors cannot be read, are not as many as the passages, or are not all finite.
    """
    if where.startswith(SENTENCE_TRANSFORMERS):
        made = _sentence_transformer(where.removeprefix(SENTENCE_TRANSFORMERS), work, collection)
        return made.vectors_NxE, made.manifest["fingerprint"]
    partitioner = partitioner or Partitioner(all_devices())
    located = hub.locate(where, "EMBEDDINGS")
    path = located.path
    if (path / "model.json").is_file():
        made = _dual_encoder(path, work, collection, partitioner)
        return made.vectors_NxE, made.manifest["fingerprint"]
    if sentence_transformers.is_model(path):
        made = _pretrained_encoder(located, work, collection, partitioner)
        return made.vectors_NxE, made.manifest["fingerprint"]
    if path.suffix not in (".npy", ".safetensors") or not path.is_file():
        raise UserError(
            f"EMBEDDINGS: {where}: neither a .npy or .safetensors file that exists, nor a dual encoder's "
            f"folder, nor {SENTENCE_TRANSFORMERS}NAME: name one of these"
        )
    path = paths.ensure_local(path)
    vectors = _map_npy(path) if path.suffix == ".npy" else _map_safetensors(path)
    if vectors.ndim != 2 or len(vectors) != collection.passage_count:
        raise UserError(
            f"{path}: holds an array of {' × '.join(map(str, vectors.shape))} for {collection.passage_count} "
            "passages: give it one row a passage, in the collection's order"
        )
    sha = hashlib.sha256()
    for _ in _checked(path, _blocks(vectors), sha):
        pass
    fingerprint = sha.hexdigest()[:16]
    if vectors.dtype == np.float32:
        return vectors, fingerprint
    return _as_float32(work.embeddings(path.stem), fingerprint, vectors, collection), fingerprint


def _map_npy(path: Path) -> np.ndarray:
    try:
        vectors = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a NumPy file ({error}): write it by numpy.save") from None
    if vectors.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"{path}: holds {vectors.dtype}: write the vectors as float32")
    return vectors


def _map_safetensors(path: Path) -> np.ndarray:
    """Maps the matrix of a file into memory; the library safetensors would read all of it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}): write it anew") from None
    name = names[0] if len(names) == 1 else "embeddings"
    if name not in names:
        there = ", ".join(names) or "nothing"
        raise UserError(f"{path}: holds {there}: keep one matrix in it, or name it 'embeddings'")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(size))[name]
    if tensor["dtype"] not in _TYPES:
        raise UserError(f"{path}: {name} holds {tensor['dtype']}: write the vectors as float32")
    if 0 in tensor["shape"]:
        return np.zeros(tensor["shape"], np.float32)
    start = 8 + size + tensor["data_offsets"][0]
    return np.memmap(path, _TYPES[tensor["dtype"]], "r", start, tuple(tensor["shape"]))


def _blocks(vectors_NxE: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(_BLOCK // max(vectors_NxE[:1].nbytes, 1), 1)
    with bar("reading vectors", len(vectors_NxE)) as advance:
        for first in range(0, len(vectors_NxE), rows):
            yield vectors_NxE[first : first + rows]
            advance(len(vectors_NxE[first : first + rows]))


def _checked(where: Path, blocks: Iterable[np.ndarray], sha: "hashlib._Hash") -> Iterator[np.ndarray]:
    """Yields blocks of rows and adds them to a digest. Raises UserError where a vector is not finite."""
    first = 0
    for block in blocks:
        check_finite(block, where, range(first, first + len(block)))
        sha.update(np.ascontiguousarray(block).view(np.uint8).data)
        yield block
        first += len(block)


def _as_float32(folder: Path, file: str, vectors_NxE: np.ndarray, collection: Collection) -> np.ndarray:
    """Converts vectors to float32, kept in a folder; `file` is their fingerprint."""

    def make(tmp: Path) -> dict:
        first = 0
        with (tmp / "vectors.npy").open("wb") as file:
            npy.begin(file, np.float32, vectors_NxE.shape)
            for block in _blocks(vectors_NxE):
                converted = np.asarray(block, np.float32)
                check_finite(converted, folder, range(first, first + len(converted)))
                file.write(converted.tobytes())
                first += len(converted)
        return {"passages": first, "dimensions": vectors_NxE.shape[1]}

    storage.build_once(folder, {"file": file, "collection": collection.fingerprint}, make)
    return np.load(paths.ensure_local(folder / "vectors.npy"), mmap_mode="r")


def _dual_encoder(
    folder: Path, work: Workspace, collection: Collection, partitioner: Partitioner
) -> Embeddings:
    from retrieval_jax.checkpoints.model_folder import load_model

    mesh, rules = partitioner
    opened = load_model(folder, mesh=mesh, rules=rules)
    if opened.model.family != DualEncoder.family:  # a lexical encoder's vectors are as wide as the vocabulary
        raise UserError(f"EMBEDDINGS: {folder}: holds a {opened.model.family} model: name a dual encoder's")
    return encode_by_model(folder, opened, mesh, work, collection)


def _pretrained_encoder(
    located: hub.Located, work: Workspace, collection: Collection, partitioner: Partitioner
) -> Embeddings:
    """Encodes the passages by a dual encoder in the format of sentence-transformers, without that library."""
    pretrained = open_pretrained(located.path)
    if pretrained.vocabulary is None:
        raise UserError(f"EMBEDDINGS: {located.name}: no spiece.model is in it: name a T5's folder")
    length = pretrained.length or _LENGTH
    recipe = {"model": located.name, "passage_length": length}
    if located.commit is None:  # a commit's content never changes; a folder's may
        recipe["fingerprint"] = fingerprint(pretrained)

    def make_encode() -> Encode:
        return passage_encoder(_load_pretrained(pretrained, length, partitioner), partitioner.mesh)

    label = located.label
    if located.commit:  # hf--ORG--NAME: a model of this work folder, or another organisation's, may be a NAME
        label = re.sub("[:/]", "--", located.name.partition("@")[0])
    return encode_collection(work.embeddings(label), recipe, collection, make_encode)


def _load_pretrained(pretrained: Pretrained, length: int, partitioner: Partitioner) -> LoadedModel:
    described = {"network": pretrained.network, "settings": pretrained.settings}
    model = model_from_description({"retriever": DualEncoder.__name__, **described})
    match = InitialCheckpoint(None, missing_ok=(), unexpected_ok=(), resize_vocab=()).match(pretrained, model)
    if mismatch := match.mismatch(pretrained.path, trains=False):
        raise UserError(mismatch)
    vocabulary = Vocabulary(pretrained.vocabulary, tokenizer.symbols(pretrained.vocabulary))
    params = params_to_devices(match.arrays, model, *partitioner)
    return LoadedModel(model, params, pretrained.step, vocabulary, {"passage_length": length})


def _sentence_transformer(name: str, work: Workspace, collection: Collection) -> Embeddings:
    """Encodes the passages by the library sentence-transformers."""
    of_folder = paths.as_path(name).is_dir()
    if of_folder:
        model_name, revision = name, {}
        checksums = storage.file_checksums(paths.as_path(name))
        recipe = {"sentence_transformer": name, "encodes": "document"}
        recipe["checksum"] = storage.digest(itertools.chain(*sorted(checksums.items())))
    else:
        model_name, commit = _resolve_sentence_transformer(name)
        revision = {"revision": commit}
        recipe = {"sentence_transformer": f"{model_name}@{commit}", "encodes": "document"}

    def make_encode() -> Encode:
        library = _import_sentence_transformer(name)
        try:
            model = library.SentenceTransformer(model_name, **revision)
        except (OSError, ValueError) as error:
            where = f"EMBEDDINGS: {SENTENCE_TRANSFORMERS}{name}"
            raise UserError(f"{where}: cannot be opened ({first_line(error)}): check the name") from None

        encode_texts = getattr(model, "encode_document", None)
        if encode_texts is None:  # before sentence-transformers 5
            prompt = getattr(model, "prompts", {}).get("document")
            encode_texts = functools.partial(model.encode, prompt=prompt)

        def encode(texts: list[str], advance: Callable[[int], None]) -> np.ndarray:
            vectors = encode_texts(texts, batch_size=64, show_progress_bar=False, convert_to_numpy=True)
            advance(len(texts))
            return vectors

        return encode

    folder = work.embeddings(re.sub(r"[/\\:]", "_", name))
    return encode_collection(folder, recipe, collection, make_encode)


def _resolve_sentence_transformer(name: str) -> tuple[str, str]:
    """Returns (repository, commit) of a model on the hub.

    A name without an organisation is one of the library's own models, or else one of the hub's first models,
    such as t5-base, which have no organisation.
    """
    repo, _, branch = name.partition("@")
    where = f"EMBEDDINGS: {SENTENCE_TRANSFORMERS}{name}"
    if "/" not in repo:
        own = f"sentence-transformers/{repo}"
        with contextlib.suppress(hub.NoRepository):
            return own, hub.resolve_commit(own, branch or None, where)
    return repo, hub.resolve_commit(repo, branch or None, where)


def _import_sentence_transformer(name: str):
    try:
        import sentence_transformers
    except ImportError:
        raise UserError(
            f"EMBEDDINGS: {SENTENCE_TRANSFORMERS}{name} needs a package that is not installed: "
            "pip install 'retrieval_jax[sentence_transformers]'"
        ) from None
    return sentence_transformers
