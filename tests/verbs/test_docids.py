"""The verb `docids`: tables on disk, what they depend on, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from model_folders import GOLDENS
from tables import KINDS, docids_of

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids import quality, residual, semantic
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.verbs.docids import check_unused, make_docids


@pytest.fixture
def vectors(collection: Collection, tmp_path: Path) -> str:
    path = tmp_path / "vectors.npy"
    np.save(path, np.random.default_rng(0).normal(size=(collection.passage_count, 8)).astype(np.float32))
    return str(path)


def test_a_table_on_disk_is_the_one_that_was_made(collection: Collection, source: Path):
    made = make_docids(str(source), str(collection.folder.parent), "naive")
    table = DocidTable.open(made["docids"])
    report = json.loads((Path(made["docids"]) / "quality.json").read_text())
    assert made == {
        "docids": made["docids"],
        "kind": "naive",
        "passages": collection.passage_count,
        "length": table.length,
        "distinct": table.count_distinct(),
        "tokens_to_uniqueness": report["tokens_to_uniqueness"]["mean"],
    }
    assert table.collection == collection.fingerprint
    assert np.array_equal(table.tokens_NxL, KINDS["naive"](collection).tokens_NxL)
    assert (Path(made["docids"]) / "quality.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("kind", "settings", "fitted", "output_size"),
    [
        ("naive_digits", [], None, 128),
        ("semantic", ["semantic.leaf_size=20"], semantic.FILE, 128),
        ("semantic_2d", ["semantic.leaf_size=20"], semantic.FILE, 128),
        ("rq_2x200", [], residual.FILE, 512),
    ],
)
def test_each_kind_by_the_verb(cli, arguments, work, vectors, kind, settings, fitted, output_size):
    bindings = [f"--gin.DOCIDS={kind!r}", f"--gin.EMBEDDINGS={vectors!r}", *(f"--gin.{s}" for s in settings)]
    status, made, _ = cli("docids", *arguments, *bindings)
    assert status == 0
    assert made["docids"] == str(work.docids(kind))
    table = DocidTable.open(made["docids"])
    assert table.kind == made["kind"] == kind
    assert made["distinct"] == made["passages"] == len(set(docids_of(table).values()))
    assert table.output_size == output_size
    assert "neighbour_prefix_overlap" in made
    assert fitted is None or (work.docids(kind) / fitted).is_file()
    time = (work.docids(kind) / "tokens.npy").stat().st_mtime_ns
    assert cli("docids", *arguments, *bindings)[1] == made
    assert (work.docids(kind) / "tokens.npy").stat().st_mtime_ns == time  # not made again


def test_what_docids_depend_on_makes_them_anew(cli, arguments, work, vectors, monkeypatch):
    monkeypatch.setattr(quality, "plot", lambda *_: None)  # takes half a second

    def recipe(*bindings: str) -> dict:
        given = ["--gin.DOCIDS='semantic'", f"--gin.EMBEDDINGS={vectors!r}", *bindings]
        assert cli("docids", *arguments, *given)[0] == 0
        return storage.read_manifest(work.docids("semantic"), "docids")

    first = recipe()
    fingerprints = {
        recipe(*change)["fingerprint"]
        for change in (
            ["--gin.semantic.leaf_size=20"],
            ["--gin.semantic.leaf_size=20", "--gin.semantic.clusters_per_node=5"],
            ["--gin.semantic.leaf_size=20", "--gin.SEED=1"],
        )
    }
    np.save(vectors, np.load(vectors)[::-1])
    fingerprints.add(recipe("--gin.semantic.leaf_size=20")["fingerprint"])
    assert len(fingerprints) == 4
    assert first["fingerprint"] not in fingerprints
    assert first["settings"] == {"clusters_per_node": 10, "leaf_size": 100}


def test_docids_that_a_model_writes_are_replaced_only_if_told_to(cli, arguments, work, vectors):
    def status_and_error(seed: int, *bindings: str) -> tuple[int, str]:
        given = ["--gin.DOCIDS='rq_2x4'", f"--gin.EMBEDDINGS={vectors!r}", f"--gin.SEED={seed}"]
        status, _, err = cli("docids", *arguments, *given, "--gin.make_docids.force=False", *bindings)
        return status, err

    def fingerprint() -> str:
        return storage.read_manifest(work.docids("rq_2x4"), "docids")["fingerprint"]

    assert cli("docids", *arguments, "--gin.DOCIDS='rq_2x4'", f"--gin.EMBEDDINGS={vectors!r}")[0] == 0
    assert status_and_error(1)[0] == 0  # no model writes them
    first, model = fingerprint(), work.model("reader")
    storage.write_json(model / "model.json", {"docids_fingerprint": first})
    try:
        assert status_and_error(1)[0] == 0  # the same ones
        status, err = status_and_error(2)
        assert status == 2
        assert f"{model} was trained to write these docids" in err
        assert fingerprint() == first
        assert status_and_error(2, "--gin.make_docids.force=True")[0] == 0
        assert fingerprint() != first
    finally:
        paths.remove(model)


def test_an_extension_of_docids_that_a_model_writes_is_replaced_by_another_one_alone(own_work, collection):
    learned = KINDS["atomic"](collection)
    shorter = learned.without([collection.ids[0].as_py()])
    folder, other = own_work.docids("atomic"), learned.without([collection.ids[1].as_py()])
    storage.build_once(folder, {}, shorter.write)
    storage.write_json(own_work.model("reader") / "model.json", {"docids_fingerprint": learned.fingerprint()})
    for extended in (learned, shorter, other):
        check_unused(folder, own_work, extended)
    unrelated = dataclasses.replace(other, ancestors=())
    for extended in (None, unrelated):
        with pytest.raises(UserError, match="reader was trained to write these docids"):
            check_unused(folder, own_work, extended)


def test_vectors_are_those_of_a_dual_encoder_that_was_converted(cli, arguments, own_work):
    model = own_work.model("dual_encoder")
    given = [f"--gin.INITIAL_CHECKPOINT='{GOLDENS / 'gtr'}'", f"--gin.WORK_DIR='{own_work.folder}'"]
    assert cli("convert", *arguments, *given, f"--gin.MODEL_DIR='{model}'")[0] == 0
    status, made, err = cli("docids", *arguments, *given[1:], "--gin.DOCIDS='rq_2x4'")
    assert status == 0, err
    assert made["kind"] == "rq_2x4"


def test_bad_requests_are_told(cli, arguments, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(Workspace, "model", lambda _, name: tmp_path / name)  # no dual encoder was trained
    for bindings, what in (
        (
            ["DOCIDS='rq_8x1'"],
            "no kind 'rq_8x1': choose one of atomic, naive, naive_digits, file, semantic, ",
        ),
        (["DOCIDS='semantic'"], "cluster the passages' vectors: train a dual encoder"),
        (["DOCIDS='naive'", f"EXTENDS={str(tmp_path)!r}"], "nothing finished here"),
        (["DOCIDS='semantic'", f"EMBEDDINGS={vectors!r}", "semantic.clusters_per_node=1"], "set at least 2"),
        (["DOCIDS='rq_2x8'", f"EMBEDDINGS={vectors!r}", "residual.shared_codes='x'"], "no way 'x'"),
    ):
        status, _, told = cli("docids", *arguments, *(f"--gin.{binding}" for binding in bindings))
        assert status == 2
        assert what in told


def test_docids_of_a_file_by_the_verb(cli, arguments, work, collection: Collection, tmp_path: Path):
    """Texts, several of a passage; the file's content is what makes the table again, wherever it lies."""
    passages = list(collection.passages())
    docids = {
        passage.id: [passage.title or passage.id, f"{passage.id} {passage.title}"] for passage in passages
    }
    file = tmp_path / "docids.json"
    file.write_text(json.dumps(docids))
    given = [*arguments, "--gin.DOCIDS='file'", "--gin.docid_file.text=True"]
    status, made, err = cli("docids", *given, f"--gin.docid_file.path='{file}'")
    assert status == 0, err
    table, manifest = DocidTable.open(made["docids"]), storage.read_manifest(made["docids"], "docids")
    assert made["passages"] == len(passages)
    assert manifest["docids"] == len(table.tokens_NxL) == 2 * len(passages)
    assert not table.has_docid_vocab
    moved = file.rename(tmp_path / "moved.json")
    status, *_ = cli("docids", *given, f"--gin.docid_file.path='{moved}'")
    assert status == 0
    assert storage.read_manifest(made["docids"], "docids") == manifest
    moved.write_text(json.dumps({id: f"other {id}" for id in docids}))
    status, made, _ = cli("docids", *given, f"--gin.docid_file.path='{moved}'")
    assert status == 0
    assert "docids" not in storage.read_manifest(made["docids"], "docids")
    status, _, err = cli("docids", *given)
    assert status == 2
    assert "docid_file.path: not set: name a file of docids, --gin.docid_file.path=" in err
