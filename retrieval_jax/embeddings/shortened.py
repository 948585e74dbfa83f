"""The first dimensions of a collection's vectors, which a model can search alone (`DualEncoder.matryoshka`).

They are kept in embeddings/NAME.first64, beside the whole vectors, of which they are made in one pass.
"""

from pathlib import Path

import numpy as np

from retrieval_jax.core import npy, paths, storage
from retrieval_jax.core.progress import bar
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.mesh import multihost
from retrieval_jax.models.dual_encoder_network import shorten

_BLOCK = 1 << 14  # rows that are read at once


def shorten_embeddings(embeddings: Embeddings, dimensions: int, normalize: bool) -> Embeddings:
    """Shortens a collection's vectors, unless that is done. All processes must call this.

    Args:
      embeddings: the whole vectors.
      dimensions: see `dual_encoder_network.shorten`.
      normalize: see there.

    Returns:
      The shortened vectors.
    """
    source, vectors_NxE = embeddings.folder, embeddings.vectors_NxE
    folder = source.with_name(f"{source.name}.first{dimensions}")
    recipe = embeddings.manifest["recipe"] | {
        "of": embeddings.manifest["fingerprint"],
        "dimensions": dimensions,
        "normalize": normalize,
    }

    def write(tmp: Path) -> dict:
        N = len(vectors_NxE)
        with (
            (tmp / "vectors.npy").open("wb") as file,
            bar("first dimensions", N) as advance,
        ):
            npy.begin(file, "<f4", (N, dimensions))
            for first in range(0, N, _BLOCK):
                block = shorten(vectors_NxE[first : first + _BLOCK], dimensions, normalize)
                file.write(np.ascontiguousarray(block, "<f4").data)
                advance(len(block))
        for name in ("text_hashes.npy", "ids.arrow"):
            paths.link(paths.ensure_local(source / name), tmp / name)
        return {"passages": N, "dimensions": dimensions}

    multihost.on_process_0(lambda: storage.build_once(folder, recipe, write))
    return Embeddings.open(folder)
