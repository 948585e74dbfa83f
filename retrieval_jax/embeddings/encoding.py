"""The vectors of a collection's passages: computed once, in parts, and kept.

    embeddings/NAME/vectors.npy    float32 N×E, in the collection's order
    embeddings/NAME/ids.arrow      passage ids by row
    embeddings/NAME/text_hashes.npy    uint64 by row, a hash of the passage's text
    embeddings/NAME.unfinished/    while they are computed: a file for each part, written whole or not at all

After a kill the same command goes on after the parts that are finished. If the same model's vectors of an
earlier state of the collection are there, only new and changed passages are encoded.
"""

import dataclasses
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from retrieval_jax.checkpoints.model_folder import LoadedModel, model_recipe
from retrieval_jax.core import arrow_ids, npy, paths, storage, unfinished
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar, log
from retrieval_jax.core.workspace import UNFINISHED, Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.embeddings.text_encoder import passage_encoder
from retrieval_jax.mesh import multihost

PART = 4096  # passages a part: at most so many for each device of a process are lost by a kill

Encode = Callable[[list[str], Callable[[int], None]], np.ndarray]
"""(texts, progress callback) -> one vector a text, N×E. The callback gets the number of texts newly done."""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The vectors of a collection's passages, as a finished folder holds them.

    Attributes:
      folder: the folder.
      vectors_NxE: float32, mapped into memory, in the collection's order.
      ids: the passage ids by row.
      text_hashes_N: uint64, a hash of each passage's text.
      manifest: the folder's manifest.
    """

    folder: Path
    vectors_NxE: np.ndarray
    ids: pa.Array
    text_hashes_N: np.ndarray
    manifest: dict

    @classmethod
    def open(cls, folder: Path) -> "Embeddings":
        """Opens a finished folder. Raises UserError where it cannot be read."""
        manifest = storage.read_manifest(folder, "index")
        try:
            vectors, texts = (
                np.load(paths.ensure_local(folder / f"{name}.npy"), mmap_mode="r")
                for name in ("vectors", "text_hashes")
            )
            ids = arrow_ids.read(folder / "ids.arrow")
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{folder}: cannot be read ({error}): delete it, it is made again") from None
        if not len(vectors) == len(texts) == len(ids):
            raise UserError(f"{folder}: its files differ in length: delete it, it is made again")
        return cls(folder, vectors, ids, texts, manifest)


def encode_by_model(
    model_dir: str | Path, opened: LoadedModel, mesh: Mesh, work: Workspace, collection: Collection
) -> Embeddings:
    """Encodes a collection by a dual encoder of a model folder.

    Args:
      model_dir: the model's folder.
      opened: the model, loaded on `mesh`.
      mesh: a mesh of this process's devices.
      work: the vectors are kept in its embeddings/, by the name of the model's folder.
      collection: the passages.

    Returns:
      The vectors, as `encode_collection` does.
    """
    model = model_recipe(model_dir, opened.step, opened.description)
    folder = work.embeddings(paths.absolute(model_dir).name)
    return encode_collection(folder, model, collection, lambda: passage_encoder(opened, mesh))


def encode_collection(
    folder: Path, model: dict, collection: Collection, make_encode: Callable[[], Encode]
) -> Embeddings:
    """Returns the vectors of all passages, which are computed unless `folder` holds them.

    Each of several processes encodes its share, on its own devices. All processes must call this.

    Args:
      folder: where the vectors are kept, an embeddings/NAME.
      model: names the model and its content, for the recipe.
      collection: the passages.
      make_encode: loads the model; called only if passages must be encoded.

    Raises:
      UserError: a vector is not finite, or the disk is full. Finished parts are kept.
    """
    recipe = model | {"collection": collection.fingerprint}
    of_parts, scratch = recipe | {"part": PART}, folder.with_name(f"{folder.name}{UNFINISHED}")

    def is_there() -> bool:
        return bool(multihost.broadcast_from_process_0(storage.is_up_to_date(folder, recipe)))

    if is_there():
        multihost.on_process_0(lambda: unfinished.remove_leftover(scratch, of_parts))
        return Embeddings.open(folder)
    with multihost.lock(scratch):
        if not is_there():  # another command may have made it meanwhile
            parts = [scratch / f"{number:05}.npz" for number in range(-(-collection.passage_count // PART))]
            multihost.on_process_0(lambda: unfinished.begin(scratch, of_parts, parts))
            multihost.on_every_process(lambda: _encode_parts(parts, folder, model, collection, make_encode))
            multihost.on_process_0(
                lambda: storage.build_once(folder, recipe, lambda tmp: _join(tmp, folder, parts, collection))
            )
            multihost.on_process_0(lambda: paths.remove(scratch))
    return Embeddings.open(folder)


def _encode_parts(
    parts: Sequence[Path],
    folder: Path,
    model: dict,
    collection: Collection,
    make_encode: Callable[[], Encode],
) -> None:
    """Encodes this process's missing parts. The model is loaded for the first passage that is new."""
    encode = None

    def rows(number: int) -> range:
        return range(number * PART, min((number + 1) * PART, collection.passage_count))

    share = multihost.process_share(len(parts))
    missing = [number for number in share if not parts[number].exists()]
    if not missing:
        return
    earlier = _earlier(folder, model)
    earlier_row_N = arrow_ids.find_rows(earlier.ids, collection.ids) if earlier else None
    total, left = (sum(len(rows(number)) for number in numbers) for numbers in (share, missing))
    with bar("encoding passages", total, total - left) as advance:
        # Several devices are given several parts at once, so that whole batches are full.
        at_once = jax.local_device_count()
        for numbers in (missing[i : i + at_once] for i in range(0, len(missing), at_once)):
            places = np.concatenate([rows(number) for number in numbers])
            passages = collection.get(places)
            text_hashes_N = text_hashes(passage.full_text for passage in passages)
            kept = np.zeros(len(passages), bool)
            if earlier:
                row_N = earlier_row_N[places]
                kept = (row_N >= 0) & (earlier.text_hashes_N[row_N] == text_hashes_N)
            new = np.flatnonzero(~kept)
            advance(len(passages) - len(new))
            if len(new):
                encode = encode or make_encode()
                encoded = np.asarray(encode([passages[i].full_text for i in new], advance), np.float32)
                check_finite(encoded, folder, places[new])
            width = encoded.shape[1] if len(new) else earlier.vectors_NxE.shape[1]
            vectors = np.empty((len(passages), width), np.float32)
            if len(new):
                vectors[new] = encoded
            if earlier:
                vectors[kept] = earlier.vectors_NxE[row_N[kept]]
            for number in numbers:
                own = np.flatnonzero(places // PART == number)
                facts = {"text_hashes": text_hashes_N[own], "encoded": int((~kept[own]).sum())}
                part = io.BytesIO()
                np.savez(part, vectors=vectors[own], **facts)
                storage.atomic_write(parts[number], part.getvalue())


def _earlier(folder: Path, model: dict) -> Embeddings | None:
    """Opens the same model's vectors of an earlier state of the collection; None where there are none."""
    try:
        earlier = Embeddings.open(folder)
    except UserError:
        return None
    recipe = {key: value for key, value in earlier.manifest["recipe"].items() if key != "collection"}
    return earlier if recipe == model else None


def _join(tmp: Path, folder: Path, parts: Sequence[Path], collection: Collection) -> dict:
    """Joins the parts into the files of a finished folder, and returns its manifest's facts."""
    texts, sha, encoded, width = [], hashlib.sha256(), 0, None
    with (tmp / "vectors.npy").open("wb") as file:
        for path in parts:
            try:
                with np.load(io.BytesIO(path.read_bytes())) as part:
                    vectors = part["vectors"]
                    texts.append(part["text_hashes"])
                    encoded += int(part["encoded"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{path}: cannot be read ({error}): delete it, then the same command goes on"
                ) from None
            if width is None:
                width = vectors.shape[1]
                npy.begin(file, "<f4", (collection.passage_count, width))
            sha.update(vectors.data)
            try:
                file.write(vectors.data)
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be written ({error.strerror}): make room, the same command goes on"
                ) from None
    np.save(tmp / "text_hashes.npy", np.concatenate(texts))
    arrow_ids.write(tmp / "ids.arrow", collection.ids)
    count = collection.passage_count
    if encoded < count:
        log(f"{folder}: {encoded} passages encoded, {count - encoded} as they were in an earlier collection")
    return {
        "passages": count,
        "dimensions": width,
        "encoded": encoded,
        "fingerprint": sha.hexdigest()[:16],
    }


def text_hashes(texts: Iterator[str]) -> np.ndarray:
    """Computes a uint64 hash of each text."""
    return np.frombuffer(b"".join(hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts), "<u8")


def check_finite(vectors_NxE: np.ndarray, where: object, rows: Sequence[int]) -> None:
    """Checks that vectors are finite.

    Args:
      vectors_NxE: the vectors.
      where: where they come from, for the error.
      rows: their rows in the collection, for the error.

    Raises:
      UserError: a vector has an infinity or NaN.
    """
    bad = ~np.isfinite(vectors_NxE).all(-1)
    if bad.any():
        row = rows[int(bad.argmax())]
        raise UserError(f"{where}: the vector of row {row} has an infinity or NaN: encode it again")
