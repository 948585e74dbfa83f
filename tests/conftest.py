"""A small real collection, imported once, and the command line as a function."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Most of the tests' time is XLA's compiler's, which takes less than half of it when LLVM does not optimize.
if os.environ["JAX_PLATFORMS"] == "cpu":
    quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ.setdefault("XLA_FLAGS", quickly)

# Many tests compile the same small step; each program is compiled once, for subprocesses too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import gin
import pytest
from gcs import Bucket
from hub import Hub

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.sources.python_docs import python_docs
from retrieval_jax.main import main

SHARED = Path(__file__).parents[2] / "shared"


# The files that take longest, which processes begin with, so that none is left alone with one at the end.
LONGEST = [
    "verbs/test_demo.py",
    "papers/test_rows_train.py",
    "test_main.py",
    "mesh/test_multihost.py",
    "training/test_step.py",
    "search/test_planned.py",
    "test_remote.py",
    "verbs/test_preflight.py",
    "models/test_dual_encoder.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)  # all others stay as they are


@pytest.fixture(autouse=True, scope="module")
def no_bindings_in_this_module() -> None:
    """A verb that ran in another test left the optimiser's settings behind."""
    gin.clear_config()


@pytest.fixture(autouse=True)
def no_bindings() -> None:
    gin.clear_config()


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
        "DataConfig.passage_length": 48,
        "make_docids.force": True,  # tests share this folder, and make its docids in many ways
        "make_index.beams": 10,
        "make_index.batch_size": 8,
    }
    return [f"--gin.{name}={value!r}" for name, value in settings.items()]


@pytest.fixture(scope="session")
def work(arguments: list[str]) -> Workspace:
    """The work folder of the small collection, with the collection imported."""
    assert main(["import", *arguments, "--json"]) == 0
    return Workspace(Path(arguments[1].split("=", 1)[1].strip("'")))


@pytest.fixture(scope="session")
def collection(work: Workspace) -> Collection:
    return Collection(work.collection)


@pytest.fixture
def own_work(collection: Collection, tmp_path: Path) -> Workspace:
    """A work folder of the test's own, with the small collection."""
    work = Workspace(tmp_path / "work")
    work.folder.mkdir()
    work.collection.symlink_to(collection.folder)
    return work


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
def grown(work: Workspace, arguments: list[str], grown_source: Path, tmp_path_factory) -> Collection:
    folder = tmp_path_factory.mktemp("grown_work") / "work"
    vocabulary = f"--gin.VOCABULARY='{work.collection / 'sentencepiece.model'}'"
    here = [f"--gin.COLLECTION='{grown_source}'", f"--gin.WORK_DIR='{folder}'", vocabulary]
    assert main(["import", *here, "--json"]) == 0
    return Collection(folder / "collection")


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script in a new process."""

    def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


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


@pytest.fixture
def own(arguments, source, tmp_path) -> list[str]:
    """Bindings of a work folder, and a source, that a test may change."""
    folder = shutil.copytree(source, tmp_path / "small_docs")
    return [f"--gin.COLLECTION={str(folder)!r}", f"--gin.WORK_DIR='{tmp_path / 'work'}'", *arguments[2:]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hugging Face hub, which this process and its children ask; their cache is in `tmp_path`/hf."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with Hub.serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        # The library read this variable when it was imported.
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        yield served
