"""A work folder with a tiny searcher of every kind, and the app over it, in this process."""

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import gin
import httpx
import jax
import pytest
from model_folders import random_params, write_model_folder

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.main import main
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.serving.app import create_app
from retrieval_jax.serving.batching import BatchSettings
from retrieval_jax.serving.catalogue import Catalogue
from retrieval_jax.serving.settings import ServeSettings
from retrieval_jax.training.run import docid_softmax

QUICK = ServeSettings(BatchSettings(sizes=(1, 4)), max_hits=20)  # few shapes to compile


@pytest.fixture(scope="session")
def bindings(source: Path, arguments: list[str], tmp_path_factory) -> list[str]:
    """The command line's arguments for the work folder that is served."""
    work = tmp_path_factory.mktemp("served") / "work"
    return [f"--gin.COLLECTION={str(source)!r}", f"--gin.WORK_DIR={str(work)!r}", *arguments[2:]]


@pytest.fixture(scope="session")
def served_work(bindings: list[str], tmp_path_factory) -> Workspace:
    """A work folder with the searchers bm25, exact and naive, of models with random weights."""
    work = Workspace(Path(bindings[1].split("=", 1)[1].strip("'")))
    made = [["import"], ["docids", "--DOCIDS=naive"], ["index"]]
    for command in made:
        assert main([command[0], *bindings, *command[1:], "--json"]) == 0
    collection, models = Collection(work.collection), tmp_path_factory.mktemp("models")
    table = DocidTable.open(work.docids("naive"))
    facts = {"docids": "naive", "docids_fingerprint": table.fingerprint()}
    generative = GenerativeRetriever(T5Config(1152, 16, 2, 8, 20, 1, 1, **docid_softmax(table)))
    write_model_folder(models / "naive", generative, random_params(generative), collection, **facts)
    dense = DualEncoder(T5Config(1152, 16, 2, 8, 20, 1, 1), vector_dim=8)
    write_model_folder(models / "dense", dense, random_params(dense), collection)
    index = ["index", *bindings, "--json"]
    assert main([*index, f"--MODEL_DIR={models / 'naive'}"]) == 0
    assert main([*index, f"--MODEL_DIR={models / 'dense'}", "--gin.make_index.kind='exact'"]) == 0
    gin.clear_config()
    return work


@pytest.fixture(scope="session")
def weighing(served_work: Workspace, bindings: list[str], tmp_path_factory) -> dict[str, Path]:
    """The folders of a lexical and of a planned searcher, of random weights and BM25's sets of tokens, and of
    both fused.
    """
    work = Workspace(tmp_path_factory.mktemp("weighing") / "work")
    work.docids("naive").parent.mkdir(parents=True)
    work.docids("naive").symlink_to(served_work.docids("naive"))
    work.collection.symlink_to(served_work.collection)
    collection, table = Collection(work.collection), DocidTable.open(work.docids("naive"))
    facts = {"docids": "naive", "docids_fingerprint": table.fingerprint()}
    config = T5Config(1152, 16, 2, 8, 20, 1, 1, lexical_head=True, **docid_softmax(table))
    lexical, planned = LexicalEncoder(T5Config(1152, 16, 2, 8, 20, 0, 1)), GenerativeRetriever(config)
    write_model_folder(work.model("lexical"), lexical, random_params(lexical), collection)
    params = random_params(planned)
    params["lexical_head"] = jax.tree.map(abs, params["lexical_head"])  # so that some weights are above 0
    write_model_folder(work.model("planned"), planned, params, collection, **facts)
    given = [bindings[0], f"--gin.WORK_DIR={str(work.folder)!r}", *bindings[2:]]
    plan = ("kind='planned'", "name='planned'", "sequential_weight=0.5", "plan_size=30", "beams=10")
    assert main(["sets", *given, "--gin.make_sets.m=8"]) == 0
    assert main(["index", *given, f"--MODEL_DIR={work.model('lexical')}"]) == 0
    settings = [f"--gin.make_index.{setting}" for setting in plan]
    assert main(["index", *given, f"--MODEL_DIR={work.model('planned')}", *settings]) == 0
    parts = ("kind='fused'", "parts=('lexical', 'planned')", "fusion='min_max'", "weights=(0.3, 0.7)")
    assert main(["index", *given, *(f"--gin.make_index.{setting}" for setting in parts)]) == 0
    gin.clear_config()
    return {name: work.searcher(name) for name in ("lexical", "planned", "fused")}


@pytest.fixture(scope="session")
def searchers(served_work: Workspace) -> dict[str, Searcher]:
    """The same searchers, opened beside the app: what its answers are compared with."""
    return {name: Searcher.open(served_work.searcher(name)) for name in ("bm25", "exact", "naive")}


@pytest.fixture(scope="session")
def catalogue_of(served_work: Workspace) -> Callable[..., Catalogue]:
    """Makes a catalogue of some of the work folder's searchers, or of other folders."""

    def make(*names: str, settings: ServeSettings = QUICK, folders: Mapping[str, Path] | None = None):
        folders = folders or {name: served_work.searcher(name) for name in names}
        return Catalogue(folders, served_work.collection, settings)

    return make


@pytest.fixture(scope="session")
def client_of() -> Callable[..., contextlib.AbstractAsyncContextManager[httpx.AsyncClient]]:
    """A client of an app that runs in this process; with `ready`, once its searchers are warm."""

    @contextlib.asynccontextmanager
    async def client(catalogue: Catalogue, ready: bool = True) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(catalogue)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                while ready and (await client.get("/ready")).status_code != 200:
                    assert catalogue.failure is None, catalogue.failure
                    await asyncio.sleep(0.05)
                yield client

    return client


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of asynchronous tests."""
    return "asyncio"


@pytest.fixture(scope="session")
async def client(catalogue_of, client_of, anyio_backend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of all three searchers."""
    async with client_of(catalogue_of("bm25", "exact", "naive")) as client:
        yield client


@pytest.fixture(scope="module")
def start(bindings, served_work) -> Iterator[Callable[..., tuple[subprocess.Popen, str]]]:
    """Starts `retrieval-jax serve` of some searchers; gives the process and its address when it is ready."""
    running = []

    def begin(*arguments: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "retrieval_jax.main", "serve", *bindings, "--gin.serve.port=0"]
        process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
        running.append(process)
        said = []
        for line in process.stderr:
            said.append(line)
            if match := re.search(r"ready: (http://\S+)", line):
                return process, match[1]
        raise AssertionError(f"it ended with {process.wait()}: {''.join(said)}")

    yield begin
    for process in running:
        process.kill()
        process.wait()
