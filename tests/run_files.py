"""Files of runs, for tests of what reads them."""

import os

from retrieval_jax.core.storage import atomic_write
from retrieval_jax.data.trec import Run, format_run


def write_run(path: str | os.PathLike, run: Run, tag: str) -> None:
    """Writes a run without facts; missing folders are made, and a path in .gz is compressed."""
    atomic_write(path, format_run(path, run, tag))
