"""A collection that grows, and the vectors of passages without a model."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.workspace import Work
from retrieval_jax.data.records import Collection
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.main import main


def embeddings_of(folder: Path, vectors: np.ndarray, ids: list[str], texts: np.ndarray | None = None):
    """What `encode_collection` would give; `texts` are digests, else all texts are alike."""
    folder.mkdir(parents=True)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "texts.npy", np.zeros(len(ids), np.uint64) if texts is None else texts)
    arrow_ids.write(folder / "ids.arrow", ids)
    return Embeddings(
        folder,
        np.load(folder / "vectors.npy", mmap_mode="r"),
        arrow_ids.read(folder / "ids.arrow"),
        np.load(folder / "texts.npy"),
        {"recipe": {"checksum": "0"}},
    )


@pytest.fixture
def embeddings() -> Callable[..., Embeddings]:
    return embeddings_of


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script in a new process."""

    def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def grown_source(source: Path, tmp_path_factory) -> Path:
    """The small collection later: a passage is gone, one is new, one has another text."""
    folder = tmp_path_factory.mktemp("sources") / "grown"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    lines = (folder / "docs.tsv").read_text().splitlines(keepends=True)
    gone = lines.pop(3).split("\t")[0]
    lines[10] = lines[10].rstrip("\n") + " And a sentence that was not here before.\n"
    new = "one.more\tprogress\tA progress bar that shows how long a task still takes.\n"
    (folder / "docs.tsv").write_text("".join([new, *lines]))
    for file in folder.glob("qrels.*.tsv"):
        kept = [line for line in file.read_text().splitlines(keepends=True) if f"\t{gone}\t" not in line]
        file.write_text("".join(kept))
    return folder


@pytest.fixture(scope="session")
def grown(work: Work, arguments: list[str], grown_source: Path, tmp_path_factory) -> Collection:
    folder = tmp_path_factory.mktemp("grown_work") / "work"
    vocabulary = f"--gin.VOCABULARY='{work.collection / 'sentencepiece.model'}'"
    here = [f"--gin.COLLECTION='{grown_source}'", f"--gin.WORK_DIR='{folder}'", vocabulary]
    assert main(["import", *here, "--json"]) == 0
    return Collection(folder / "collection")
