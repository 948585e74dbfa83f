"""The verb `index` with a dual encoder: what it writes, how it follows its collection, what it refuses."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from model_folders import random_params

from retrieval_jax.checkpoints import checkpoints, checksums, model_folder
from retrieval_jax.checkpoints.model_folder import LoadedModel
from retrieval_jax.core import storage, unfinished
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.trec import read_run
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.embeddings import encoding
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.index_inputs import IndexSettings
from retrieval_jax.search.indexing import default_name
from retrieval_jax.search.searcher import Searcher, searcher_class

DIMENSIONS = 8
QUERY = "smooth a noisy signal"
SCANN_FILES = ("dataset.npy", "scann_config.pb", "scann_assets.pbtxt")


@pytest.fixture(scope="module")
def model(collection: Collection, tmp_path_factory) -> Path:
    """A dual encoder as training leaves it, with random weights."""
    folder = tmp_path_factory.mktemp("models") / "dual_encoder"
    folder.mkdir()
    vocabulary = Vocabulary(collection.vocabulary_path)
    dual_encoder = DualEncoder(T5Config(vocabulary.size, 16, 2, 8, 16, 1, 1), None, vector_dim=DIMENSIONS)
    params = random_params(dual_encoder)
    lengths = {"input_length": 16, "passage_length": 24}
    of = {"collection_name": collection.name, "collection": collection.fingerprint}
    of |= {"docids": None, "docids_fingerprint": None}
    storage.write_json(folder / "model.json", model_folder.describe(dual_encoder, **lengths, **of))
    shutil.copyfile(collection.vocabulary_path, folder / "sentencepiece.model")
    save(folder, params)
    return folder


def save(folder: Path, params: dict) -> None:
    saved = checkpoints.Checkpoints(folder)
    saved.save(1, params, {"count": np.zeros(1)})
    saved.close()


@pytest.fixture
def index(arguments, cli, model: Path, tmp_path: Path, work: Workspace):
    """`index(kind)` runs the verb in a work folder of the test's own."""
    folder = tmp_path / "work"
    shutil.copytree(work.collection, folder / "collection")

    def run(kind: str, *more: str):
        binding = [f"--gin.WORK_DIR='{folder}'", f"--gin.MODEL_DIR='{model}'"]
        rest = [a for a in arguments if "WORK_DIR" not in a]
        return cli("index", *rest, *binding, f"--gin.make_index.kind='{kind}'", *more)

    return run


def test_both_kinds_share_the_vectors_and_tell_what_they_hold(
    index, collection: Collection, tmp_path, monkeypatch
):
    status, made, err = index("scann")
    assert status == 0, err
    assert made["recall_at_10"] == made["recall_at_100"] == 1
    assert "recall@10 1.0000, recall@100 1.0000" in err
    monkeypatch.setattr(encoding, "_encode_parts", None)  # not again
    status, _, err = index("exact")
    assert status == 0, err
    work = Workspace(tmp_path / "work")
    for kind in ("scann", "exact"):
        manifest = storage.read_manifest(work.searcher(kind), "index")
        assert manifest["passages"] == collection.passage_count
        assert manifest["dimensions"] == DIMENSIONS
        assert manifest["recipe"]["collection"] == collection.fingerprint
        assert len(manifest["recipe"]["checksum"]) == 16
    vectors = [work.embeddings("dual_encoder"), work.searcher("exact")]
    assert len({(folder / "vectors.npy").stat().st_ino for folder in vectors}) == 1  # on disk once
    # What a kill at the very end left goes with the next call.
    scratch = work.folder / "searchers/scann.unfinished"
    unfinished.begin(scratch, storage.read_manifest(work.searcher("scann"), "index")["recipe"], [])
    assert index("scann")[0] == 0
    assert not scratch.exists()
    exact, scann = (Searcher.open(work.searcher(kind)) for kind in ("exact", "scann"))
    found = exact.search([QUERY], 10)[0]
    again = scann.search([QUERY], 10)[0]
    assert [passage for passage, _ in found] == [passage for passage, _ in again]
    assert [score for _, score in found] == pytest.approx([score for _, score in again], abs=1e-5)


def test_a_searcher_has_the_name_of_the_docids_only_as_its_models_default():
    """Else a lexical one would replace the beam search of the same model."""
    generative = GenerativeRetriever(T5Config(8, 4, 1, 4, 4, 0, 0))
    opened = LoadedModel(generative, {}, 1, None, {"docids": "naive"})
    for kind, name in (
        ("generative", "naive"),
        ("planned", "naive_planned"),
        ("lexical", "naive_lexical"),
        ("softmax_vectors", "naive_softmax_vectors"),
    ):
        assert default_name(searcher_class(kind), opened, IndexSettings()) == name


def test_vectors_are_kept_in_the_dtype_that_is_asked_for(index, collection, tmp_path):
    """Each tells its recall against float32; another dtype is another searcher; scores are near float32's."""
    work, count = Workspace(tmp_path / "work"), len(collection.ids)
    assert index("exact")[0] == 0
    expected = dict(Searcher.open(work.searcher("exact")).search([QUERY], count)[0])
    for kind in ("exact", "scann"):
        for dtype, item in (("bfloat16", 2), ("int8", 1)):
            status, made, err = index(kind, f"--gin.make_index.vector_dtype='{dtype}'")
            assert status == 0, err
            assert made["vector_dtype"] == dtype
            assert 0.9 < made["recall_at_100"] <= 1
            assert f"recall@10 {made['recall_at_10']:.4f}" in err
            assert dtype in err
            pattern = "vectors.npy" if kind == "exact" else f"shards/000/scann/{dtype}_dataset.npy"
            (file,) = work.searcher(kind).glob(pattern)
            assert file.stat().st_size == pytest.approx(count * DIMENSIONS * item, abs=256)
            found = dict(Searcher.open(work.searcher(kind)).search([QUERY], count)[0])
            largest = max(map(abs, expected.values()))
            assert found == pytest.approx(expected, abs=0.02 * largest)
    status, _, err = index("exact", "--gin.make_index.vector_dtype='float16'")
    assert status == 2
    assert "float16" in err
    assert "bfloat16" in err


def test_the_first_dimensions_alone_are_searched(index, collection, tmp_path):
    """As NumPy ranks the whole vectors' first dimensions, of unit length again, whatever they are kept as."""
    work, count, size = Workspace(tmp_path / "work"), len(collection.ids), DIMENSIONS // 2
    assert index("exact")[0] == 0
    whole = Searcher.open(work.searcher("exact"))
    query_E, vectors_NxE = whole.encoder([QUERY])[0], np.load(work.searcher("exact") / "vectors.npy")
    query, passages = (
        x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query_E[:size], vectors_NxE[:, :size])
    )
    expected = dict(zip(collection.ids.to_pylist(), (passages @ query).tolist(), strict=True))
    assert expected != pytest.approx(dict(whole.search([QUERY], count)[0]), abs=1e-2)

    shorter = f"--gin.make_index.dimensions={size}"
    for kind, dtype, tolerance in (
        ("exact", "float32", 1e-5),
        ("scann", "float32", 1e-5),
        ("exact", "int8", 0.02),
    ):
        status, made, err = index(kind, shorter, f"--gin.make_index.vector_dtype='{dtype}'")
        assert status == 0, err
        assert made["dimensions"] == size
        assert f"was not trained for its first {size} dimensions alone" in err
        found = dict(Searcher.open(work.searcher(kind)).search([QUERY], count)[0])
        assert found == pytest.approx(expected, abs=tolerance)
    for dimensions, told in (
        (DIMENSIONS, f"{DIMENSIONS} of {DIMENSIONS} that .* can shorten"),
        (0, "of at least 1"),
    ):
        status, _, err = index("exact", f"--gin.make_index.dimensions={dimensions}")
        assert status == 2
        assert re.search(told, err)


def test_a_searcher_follows_its_collection(index, grown: Collection, collection, grown_source, tmp_path, cli):
    work = Workspace(tmp_path / "work")
    for kind in ("scann", "exact"):
        assert index(kind)[0] == 0
    shutil.rmtree(work.collection)
    shutil.copytree(grown.folder, work.collection)
    here = [f"--gin.COLLECTION='{grown_source}'", f"--gin.WORK_DIR='{work.folder}'", f"--gin.QUERY={QUERY!r}"]
    for kind in ("scann", "exact"):
        status, _, err = cli("search", *here, f"--gin.SEARCHER={kind!r}")
        assert status == 2
        assert "made of another collection" in err
        status, made, err = index(kind, f"--gin.COLLECTION='{grown_source}'")
        assert status == 0, err
        assert (made["added"], made["removed"]) == (2, 2)
        assert "trained on another collection" in err
        if kind == "scann":
            assert "2 passages encoded" in err
        status, made, _ = cli("search", *here, f"--gin.SEARCHER={kind!r}", "--gin.K=1000")
        assert status == 0
        found = {passage["id"] for passage in made["passages"]}
        assert found == set(grown.ids.to_pylist())
        assert found != set(collection.ids.to_pylist())
    exact, scann = (Searcher.open(work.searcher(kind)) for kind in ("exact", "scann"))
    text = next(p.full_text for p in grown.passages() if p.id == "one.more")
    expected, found = (dict(searcher.search([text], 1000)[0]) for searcher in (exact, scann))
    assert found == pytest.approx(expected, abs=1e-5)


def test_damage_is_named_before_searching(index, tmp_path: Path, cli, arguments):
    work = Workspace(tmp_path / "work")
    assert index("scann")[0] == 0
    assert index("exact")[0] == 0
    rest = [a for a in arguments if "WORK_DIR" not in a]

    def refused(kind: str) -> str:
        status, _, err = cli(
            "search",
            *rest,
            f"--gin.WORK_DIR='{work.folder}'",
            f"--gin.SEARCHER={kind!r}",
            f"--gin.QUERY={QUERY!r}",
        )
        assert status == 2
        (line,) = [line for line in err.splitlines() if line.startswith("retrieval-jax:")]
        assert str(work.searcher(kind)) in line
        return line

    for kind, names in (
        ("exact", ["vectors.npy", "ids.arrow"]),
        (
            "scann",
            [f"shards/000/scann/{name}" for name in SCANN_FILES] + ["shards/000/rows.npy", "ids.arrow"],
        ),
    ):
        for name in names:
            path = work.searcher(kind) / name
            data = path.read_bytes()
            path.unlink()  # the file may be another folder's too
            path.write_bytes(data[: len(data) // 2])
            assert "has" in (line := refused(kind))
            assert f"{name} has {len(data) // 2} bytes, not {len(data)}" in line
            assert "`retrieval-jax index`" in line
            path.unlink()
            assert f"{name}: No such file" in refused(kind)
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
            assert f"{name} is not what was written" in refused(kind)
            path.write_bytes(data)
        sums = work.searcher(kind) / checksums.NAME
        sums.rename(tmp_path / "sums")
        assert "checksums.json is missing" in refused(kind)
        (tmp_path / "sums").rename(sums)
        Searcher.open(work.searcher(kind))


def test_a_moved_searcher_and_another_model_are_named(index, model: Path, tmp_path: Path):
    work = Workspace(tmp_path / "work")
    assert index("scann")[0] == 0
    moved = work.searcher("scann").rename(tmp_path / "alone")
    with pytest.raises(UserError, match=r"alone: its model is not at .*move both together"):
        Searcher.open(moved)
    # With its model beside it as before it opens anywhere.
    other = tmp_path / "elsewhere/deep/folder/searchers/scann"
    shutil.copytree(moved, other)
    manifest = json.loads((other / "manifest.json").read_text())
    place = Path(os.path.normpath(other / manifest["model"]))
    shutil.copytree(model, place)
    found = Searcher.open(other).search([QUERY], 3)
    assert len(found[0]) == 3

    # The same step of another training.
    params = model_folder.load_model(place).params
    shutil.rmtree(place / "checkpoints")
    save(place, jax.tree.map(lambda x: 1.01 * x, params))
    with pytest.raises(UserError, match=r"not the model \(of step 1\) that .*scann was made of"):
        Searcher.open(other)


@pytest.mark.slow
def test_two_processes_build_what_one_does(index, model: Path, collection, arguments, tmp_path: Path):
    """They encode together; the first one writes, and both tell the same."""
    assert index("exact")[0] == 0
    alone = Workspace(tmp_path / "work")
    queries = [QUERY, "progress bar", "gradient clipping"]
    expected = Searcher.open(alone.searcher("exact")).search(queries, 20)
    together = Workspace(tmp_path / "together")
    shutil.copytree(alone.collection, together.collection)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    rest = [argument for argument in arguments if "WORK_DIR" not in argument]
    here = [*rest, f"--WORK_DIR={together.folder}", f"--MODEL_DIR={model}"]

    def run(verb: str, *more: str) -> list[dict]:
        command = [sys.executable, "-m", "retrieval_jax.main", verb, *here, "--json", *more]
        environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        started = [
            subprocess.Popen(
                command,
                env=environment | {"JAX_PROCESS_ID": str(process)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(2)
        ]
        first, second = (process.communicate(timeout=300) for process in started)
        assert [process.returncode for process in started] == [0, 0], first[1] + second[1]
        return [json.loads(out.splitlines()[-1]) for out, _ in (first, second)]  # after Gloo's

    size = f"--gin.scann.shard_size={len(collection.ids) // 3}"
    for kind, more in (("exact", ()), ("scann", (size,))):
        made = run("index", f"--gin.make_index.kind={kind!r}", *more)
        assert made[0] == made[1]
        assert made[0]["passages"] == len(collection.ids)
        shards = together.searcher(kind) / "shards"
        assert kind == "exact" or len([*shards.iterdir()]) in (3, 4)
        found = Searcher.open(together.searcher(kind)).search(queries, 20)
        for query, ranked_list in zip(expected, found, strict=True):
            assert [passage for passage, _ in query] == [passage for passage, _ in ranked_list]
            np.testing.assert_allclose([s for _, s in query], [s for _, s in ranked_list], atol=1e-5)
        answers = run("search", f"--SEARCHER={kind}", f"--QUERY={QUERY}", "--K=20")
        assert answers[0] == answers[1]
        assert [p["id"] for p in answers[0]["passages"]] == [passage for passage, _ in found[0]]
    (path,) = {made["run"] for made in run("search", "--SEARCHER=scann", "--SPLIT=dev", "--K=5")}
    queries = collection.queries("dev")
    lists = Searcher.open(together.searcher("scann")).search([query.text for query in queries], 5)
    run_of = {q.id: [p for p, _ in ranked] for q, ranked in zip(queries, lists, strict=True)}
    assert {qid: [p for p, _ in ranked] for qid, ranked in read_run(path).items()} == run_of

    # Weights are chosen by searching with both, and a fused searcher searches with both.
    settings = ["kind='fused'", "parts=('exact', 'scann')"]
    fused = run("index", "--MODEL_DIR=None", *(f"--gin.make_index.{setting}" for setting in settings))
    assert fused[0] == fused[1]
    assert fused[0]["fitted"]["queries"] == len(queries)
    answers = run("search", "--SEARCHER=fused", f"--QUERY={QUERY}", "--K=20")
    (found,) = Searcher.open(together.searcher("fused")).search([QUERY], 20)
    assert [p["id"] for p in answers[1]["passages"]] == [passage for passage, _ in found]
