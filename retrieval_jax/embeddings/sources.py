"""Vectors of a collection's passages, from wherever they come: on disk, mapped into memory, row by row."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.embeddings.encoding import (
    Embeddings,
    Encode,
    check_finite,
    encode_by_model,
    encode_collection,
)
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.dual_encoder import DualEncoder

SENTENCE_TRANSFORMERS = "sentence-transformers:"
_BLOCK = 1 << 24  # bytes looked at, at once
_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def load_embeddings(
    where: str, work: Workspace, collection: Collection, mesh: Mesh | None = None
) -> tuple[np.ndarray, str]:
    """The passages' vectors, float32 N×E in the collection's order, memory-mapped; and their fingerprint.

    Args:
      where: a `.npy` file; a `.safetensors` file with one matrix, or one that is named "embeddings"; the
        folder of a dual encoder; or "sentence-transformers:NAME", a folder or a name on the Hugging Face hub,
        of which "NAME@REVISION" names one state.
      work: what must be encoded, or turned to float32, is kept in its embeddings/NAME.
      collection: the passages.
      mesh: what a dual encoder runs on; None: all devices.

    Raises UserError where the vectors cannot be read, are not as many as the passages, or not all finite.
    """
    if where.startswith(SENTENCE_TRANSFORMERS):
        made = _sentence_transformer(where.removeprefix(SENTENCE_TRANSFORMERS), work, collection)
        return made.vectors_NxE, made.manifest["fingerprint"]
    path = paths.as_path(where)
    if (path / "model.json").is_file():
        made = _dual_encoder(path, work, collection, mesh or all_devices())
        return made.vectors_NxE, made.manifest["fingerprint"]
    if path.suffix not in (".npy", ".safetensors") or not path.is_file():
        raise UserError(
            f"EMBEDDINGS: {where}: neither a .npy or .safetensors file that exists, nor a model's folder, "
            f"nor {SENTENCE_TRANSFORMERS}NAME: name one of these"
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
    """The matrix in a file, mapped; the library would read all of it."""
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
    """Passes blocks of rows through, into a digest; UserError where a vector is not finite."""
    first = 0
    for block in blocks:
        check_finite(block, where, range(first, first + len(block)))
        sha.update(np.ascontiguousarray(block).view(np.uint8).data)
        yield block
        first += len(block)


def _as_float32(folder: Path, file: str, vectors_NxE: np.ndarray, collection: Collection) -> np.ndarray:
    """The same vectors in float32, by way of a folder; `file` is their fingerprint."""

    def make(tmp: Path) -> dict:
        out = np.lib.format.open_memmap(tmp / "vectors.npy", "w+", np.float32, vectors_NxE.shape)
        first = 0
        for block in _blocks(vectors_NxE):
            out[first : first + len(block)] = block
            check_finite(out[first : first + len(block)], folder, range(first, first + len(block)))
            first += len(block)
        out.flush()
        return {"passages": first, "dimensions": out.shape[1]}

    storage.build_once(folder, {"file": file, "collection": collection.fingerprint}, make)
    return np.load(paths.ensure_local(folder / "vectors.npy"), mmap_mode="r")


def _dual_encoder(folder: Path, work: Workspace, collection: Collection, mesh: Mesh) -> Embeddings:
    from retrieval_jax.checkpoints.model_folder import load_model

    opened = load_model(folder, mesh=mesh)
    if not isinstance(opened.model, DualEncoder):
        raise UserError(f"EMBEDDINGS: {folder}: holds a {opened.model.family} model: name a dual encoder's")
    return encode_by_model(folder, opened, mesh, work, collection)


def _sentence_transformer(name: str, work: Workspace, collection: Collection) -> Embeddings:
    of_folder = paths.as_path(name).is_dir()
    model_name, _, revision = (name, "", "") if of_folder else name.partition("@")

    def make_encode() -> Encode:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError(
                f"EMBEDDINGS: {SENTENCE_TRANSFORMERS}{name} needs a package that is not installed: "
                "pip install 'retrieval_jax[sentence_transformers]'"
            ) from None
        try:
            model = SentenceTransformer(model_name, **({"revision": revision} if revision else {}))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"EMBEDDINGS: {SENTENCE_TRANSFORMERS}{name}: cannot be opened ({reason}): check the name"
            ) from None

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
    recipe = {"sentence_transformer": name, "encodes": "document"}
    if of_folder:  # its content; a name on the hub, with or without a revision, stands for itself
        checksums = storage.file_checksums(paths.as_path(name))
        recipe["checksum"] = storage.digest(itertools.chain(*sorted(checksums.items())))
    return encode_collection(folder, recipe, collection, make_encode)
