"""A small real collection, imported once, and the command line as a function."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import gin
import pytest
from gcs import Bucket

from retrieval_jax.core.workspace import Work
from retrieval_jax.data.records import Collection
from retrieval_jax.data.sources.python_docs import python_docs
from retrieval_jax.main import main

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real collections and checkpoints beside the checkout; tests that need them skip where they are not."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSV folder of about a hundred passages of API documentation, with train, dev and test queries."""
    folder = tmp_path_factory.mktemp("sources") / "small_docs"
    folder.mkdir()
    passages, queries = python_docs(size=100, packages=("optax", "rich"))
    (folder / "docs.tsv").write_text(
        "".join(f"{p.id}\t{p.title}\t{' '.join(p.text.split())}\n" for p in passages)
    )
    for split, some in {"train": queries[20:], "dev": queries[10:20], "test": queries[:10]}.items():
        (folder / f"queries.{split}.tsv").write_text("".join(f"{q.id}\t{q.text}\n" for q in some))
        (folder / f"qrels.{split}.tsv").write_text(
            "".join(f"{q.id}\t{pid}\t{grade}\n" for q in some for pid, grade in q.positives.items())
        )
    return folder


@pytest.fixture(scope="session")
def arguments(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Gin bindings that make every verb work on the small collection, in seconds."""
    work = tmp_path_factory.mktemp("work") / "small_docs"
    settings = {
        "COLLECTION": str(source),
        "WORK_DIR": str(work),
        "STEPS": 60,
        "import_collection.vocab_size": 1000,
        "train.batch_size": 32,
        "T5Config.emb_dim": 64,
        "T5Config.mlp_dim": 64,
        "T5Config.num_heads": 2,
        "T5Config.head_dim": 32,
        "TrainingData.passage_length": 48,
        "make_docids.force": True,  # tests share this folder, and make its docids in many ways
        "make_index.beams": 10,
        "make_index.batch_size": 8,
    }
    return [f"--gin.{name}={value!r}" for name, value in settings.items()]


@pytest.fixture(scope="session")
def work(arguments: list[str]) -> Work:
    """The work folder of the small collection, with the collection imported."""
    assert main(["import", *arguments, "--json"]) == 0
    return Work(Path(arguments[1].split("=", 1)[1].strip("'")))


@pytest.fixture(scope="session")
def collection(work: Work) -> Collection:
    return Collection(work.collection)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]):
    """`cli("train", …)` runs a verb with --json: (exit status, the JSON object or None, stderr)."""

    def run(*argv: str) -> tuple[int, dict | None, str]:
        status = main([*argv, "--json"])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    yield run
    gin.clear_config()  # or what these verbs were told holds for the tests after this one


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """An empty bucket, in a process of its own."""
    with Bucket.serve(tmp_path_factory.mktemp("gcs")) as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The bucket gs://bucket, which this process reaches; copies from it lie in `tmp_path`/cache."""
    for name, value in (server.environment | {"RETRIEVAL_JAX_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return server
