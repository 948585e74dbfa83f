"""The folder of a dense searcher.

Beside its manifest, it holds the passage ids by row (ids.arrow), the hashes of the passages' texts by row
(text_hashes.npy), the vectors (see `stored_vectors`) or ScaNN's shards (shards/; see `scann_shards`), and the
size and checksum of each file.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval_jax.checkpoints import checksums
from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.search.index_inputs import IndexInputs

FIRST_DIMENSIONS = "first_dimensions"  # in a manifest, where `make_index.dimensions` is set
SHARDS = "shards"
OF_PASSAGES = ("ids.arrow", "text_hashes.npy")


def indexed_passages(inputs: IndexInputs, kind: str) -> tuple[pa.Array, np.ndarray] | None:
    """Returns the ids and text hashes of an earlier searcher in the folder.

    They are None unless that searcher is whole and of this kind, model and dtype.
    """
    earlier = inputs.folder
    if not storage.finished(earlier) or not (earlier / checksums.NAME).is_file():
        return None
    recipe, wanted = storage.read_manifest(earlier, "index")["recipe"], inputs.embeddings.manifest["recipe"]
    wanted = {"kind": kind, "checksum": wanted["checksum"], "vector_dtype": inputs.settings.vector_dtype}
    wanted[FIRST_DIMENSIONS] = inputs.settings.dimensions
    if any(recipe.get(name) != value for name, value in wanted.items()):
        return None
    if checksums.find_damage(earlier, OF_PASSAGES):
        return None
    text_hashes_N = np.load(paths.ensure_local(earlier / "text_hashes.npy"), mmap_mode="r")
    return arrow_ids.read(earlier / "ids.arrow"), text_hashes_N


def check_files(folder: Path, manifest: dict, parts: Sequence[str] | None = None) -> None:
    """Raises UserError unless a searcher's files (some: see `find_damage`) are as they were written."""
    hint = "delete it, then `retrieval-jax index`"
    if not (folder / checksums.NAME).is_file():
        raise UserError(f"{folder}: {checksums.NAME} is missing: {hint}")
    if "vector_dtype" not in manifest:
        raise UserError(f"{folder}: was made by an earlier version of retrieval_jax: {hint}")
    if reason := checksums.find_damage(folder, parts):
        raise UserError(f"{folder}: damaged ({reason}): {hint}")
