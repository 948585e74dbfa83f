"""Docids of a collection: what each kind writes for a passage, and how tables grow with the collection."""

import json
import types
from collections.abc import Iterator
from pathlib import Path

import gin
import numpy as np
import pytest
from tables import KINDS

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary, learn
from retrieval_jax.docids import kinds, residual, semantic
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.verbs import docids as docids_verb
from retrieval_jax.verbs.docids import make_docids


def docids_of(table: DocidTable) -> dict[str, tuple[int, ...]]:
    """Passage id -> its tokens without the padding."""
    rows = (tuple(row[row > 0].tolist()) for row in table.tokens_NxL)
    return dict(zip(table.passage_ids.to_pylist(), rows, strict=True))


def test_atomic_docids_are_rows(collection: Collection):
    table = KINDS["atomic"](collection)
    assert table.tokens_NxL.tolist() == [[row + 1] for row in range(collection.passage_count)]
    assert table.output_size == 128
    assert table.passage_ids.equals(collection.ids)


def test_naive_docids_are_the_ids_in_the_vocabulary(collection: Collection, monkeypatch: pytest.MonkeyPatch):
    vocabulary = Vocabulary(collection.vocabulary_path)
    expected = [[*vocabulary.encode(key), EOS] for key in collection.ids.to_pylist()]
    batches = arrow_ids.batches
    for size in (1 << 16, 7):  # the batch does not matter
        monkeypatch.setattr(arrow_ids, "batches", lambda ids, size=size: batches(ids, size))
        table = KINDS["naive"](collection)
        assert table.tokens_NxL.dtype == np.int32
        assert [row[row > 0].tolist() for row in table.tokens_NxL] == expected
        assert table.length == max(map(len, expected))
        assert table.passage_ids.equals(collection.ids)


def stand_in(ids: list[str]) -> types.SimpleNamespace:
    """A collection of which there are only the ids."""
    return types.SimpleNamespace(
        ids=arrow_ids.array(ids), passage_count=len(ids), fingerprint=storage.digest(ids)
    )


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (["7", "1048", "007"], ["7", "1048", "007"]),
        (["7", "b", "9"], ["0", "1", "2"]),
        (["7", "٣", "9"], ["0", "1", "2"]),  # a digit, but not one of the ten
        ([f"p{row}" for row in range(12)], [str(row) for row in range(12)]),
    ],
)
def test_naive_digits_are_ids_or_rows(ids: list[str], numbers: list[str]):
    table = KINDS["naive_digits"](stand_in(ids))
    expected = [(*(2 + int(digit) for digit in number), EOS) for number in numbers]
    assert list(docids_of(table).values()) == expected
    assert table.tokens_NxL.dtype == np.uint8
    assert table.output_size == 128


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
    monkeypatch.setattr(docids_verb.quality, "plot", lambda *_: None)  # takes half a second

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


def job_of(ids: list[str], path: Path) -> kinds.Job:
    """What `naive` needs of a collection, with a vocabulary that was learned on other ids."""
    learn(["alpha beta gamma delta", "abcdefghijklmnopqrstuvwxyz 0123456789"], 60, path)
    collection = types.SimpleNamespace(
        ids=arrow_ids.array(ids), vocabulary_path=path, passage_count=len(ids), fingerprint=""
    )
    return kinds.Job(collection)


def test_ids_that_are_alike_for_lack_of_a_character_are_an_error(tmp_path):
    path = tmp_path / "pieces.model"
    with pytest.raises(UserError) as caught:
        kinds.naive(job_of(["a{1", "a}1", "a~1", "b{1", "c1", "d2"], path))
    assert "cannot write 4 of the ids, and 3 passages would share a docid" in str(caught.value)
    assert "as 'a{1' and 'a}1'" in str(caught.value)
    tokens = kinds.naive(job_of(["a{1", "b{1", "c1", "C1"], path)).tokens_NxL  # unknown, but told apart
    assert len(np.unique(tokens, axis=0)) == 3  # and C1 is c1 where case is folded


def test_one_long_id_is_told_of(tmp_path, capsys):
    kinds.naive(job_of(["a1", "b2", "c3", "z" * 1500], tmp_path / "pieces.model"))
    said = capsys.readouterr().err
    assert "docids/naive: the docid of passage 'zzzz" in said
    assert "are usual: all targets are padded to that" in said
    kinds.naive(job_of(["a1", "b2", "c3"], tmp_path / "pieces.model"))
    assert "usual" not in capsys.readouterr().err


def test_bad_requests_are_told(cli, arguments, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(Workspace, "model", lambda _, name: tmp_path / name)  # no dual encoder was trained
    for bindings, what in (
        (["DOCIDS='rq_8x1'"], "no kind 'rq_8x1': choose one of atomic, naive, naive_digits, semantic, "),
        (["DOCIDS='semantic'"], "cluster the passages' vectors: train a dual encoder"),
        (["DOCIDS='naive'", f"EXTENDS={str(tmp_path)!r}"], "nothing finished here"),
        (["DOCIDS='semantic'", f"EMBEDDINGS={vectors!r}", "semantic.clusters_per_node=1"], "set at least 2"),
        (["DOCIDS='rq_2x8'", f"EMBEDDINGS={vectors!r}", "residual.shared_codes='x'"], "no way 'x'"),
    ):
        status, _, told = cli("docids", *arguments, *(f"--gin.{binding}" for binding in bindings))
        assert status == 2
        assert what in told


class Growing:
    """A collection that changes, with a vector a passage id; `make` runs the verb on its present state."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        monkeypatch.setattr(docids_verb, "Collection", lambda _: self.state)
        monkeypatch.setattr(docids_verb.quality, "plot", lambda *_: None)  # takes half a second

    def make(self, kind: str, ids: list[str], dimensions: int = 8, **more) -> tuple[dict, dict, dict]:
        """(what the verb gave, docid by passage id, manifest)."""
        self.state = stand_in(ids)
        vectors = [np.random.default_rng(int(key.strip("ab"))).normal(size=dimensions) for key in ids]
        np.save(self.folder / "vectors.npy", np.array(vectors, np.float32))
        work = more.pop("work", str(self.folder / f"{len(ids)}"))
        made = make_docids("any", work, kind, str(self.folder / "vectors.npy"), **more)
        return (
            made,
            docids_of(DocidTable.open(made["docids"])),
            storage.read_manifest(made["docids"], "docids"),
        )


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Growing]:
    gin.clear_config()
    yield Growing(tmp_path, monkeypatch)
    gin.clear_config()


OLD = [f"a{row}" for row in range(300)]
# Passages went, others came between, one with the vector of an old passage; the order is another.
NEW = ["b7", *reversed(OLD[:280]), *(f"b{row}" for row in range(1000, 1040))]


@pytest.mark.parametrize("kind", ["atomic", "naive_digits", "semantic", "semantic_2d", "rq_2x16"])
def test_old_docids_stay_and_new_ones_differ_from_all(growing: Growing, kind: str):
    made, old, manifest = growing.make(kind, OLD)
    assert "extension" not in made
    again, new, grown = growing.make(kind, NEW, extends=made["docids"])
    assert again["extension"] == {"kept": 280, "added": 41, "removed": 20}
    assert {key: new[key] for key in OLD[:280]} == {key: old[key] for key in OLD[:280]}
    added = [new[key] for key in new if key not in old]
    assert len({*added, *old.values()}) == 341  # also from those of passages that went
    assert grown["ancestors"] == [manifest["fingerprint"]]
    last, newest, grown_again = growing.make(kind, [*NEW, "b2000", "b7000"], extends=again["docids"])
    assert grown_again["ancestors"] == [grown["fingerprint"], manifest["fingerprint"]]
    assert {key: newest[key] for key in NEW} == new
    assert last["extension"]["added"] == 2
    assert len(set(newest.values())) == len(NEW) + 2


def test_a_like_passage_comes_to_the_same_leaf(growing: Growing):
    made, old, _ = growing.make("semantic", OLD)
    _, new, _ = growing.make("semantic", NEW, extends=made["docids"])
    assert new["b7"][0] == old["a7"][0]  # b7 has the vector of a7
    made, old, _ = growing.make("rq_2x16", OLD)
    _, new, _ = growing.make("rq_2x16", NEW, extends=made["docids"])
    assert new["b7"][:2] == old["a7"][:2]


def test_a_table_is_extended_in_its_place_once(growing: Growing):
    made, old, manifest = growing.make("semantic", OLD, work=str(growing.folder / "w"))
    settings = {"work": str(growing.folder / "w"), "extends": made["docids"]}
    _, new, grown = growing.make("semantic", NEW, **settings)
    assert grown["ancestors"] == [manifest["fingerprint"]]
    assert new["a5"] == old["a5"]
    assert growing.make("semantic", NEW, **settings)[2] == grown


@pytest.mark.parametrize("way", ["token", "list"])
def test_passages_with_the_same_codes(growing: Growing, way: str):
    gin.bind_parameter("residual.shared_codes", way)
    made, old, manifest = growing.make("rq_1x4", OLD)
    assert manifest["settings"] == {"shared_codes": way}
    if way == "list":
        assert made["length"] == 1
        assert manifest["distinct"] == 4
        assert manifest["collisions"] == 296
    else:
        assert made["length"] == 5  # of 300 in four clusters, at least 75 have the same code: four digits
        assert manifest["distinct"] == 300
        assert manifest["collisions"] == 0
    many = [*OLD, *(f"b{row}" for row in range(1000, 2200))]
    grown, new, manifest = growing.make("rq_1x4", many, extends=made["docids"])
    assert grown["length"] == made["length"]
    assert {key: new[key] for key in OLD} == old
    # Four digits of base 4 tell 256 passages of a code apart; what comes after shares the last number.
    assert manifest["collisions"] == (1200 if way == "list" else 1500 - manifest["distinct"])
    assert manifest["distinct"] == (4 if way == "list" else 1024)


def test_tables_that_cannot_be_extended_are_told(growing: Growing):
    made, _, _ = growing.make("semantic", OLD)
    with pytest.raises(UserError, match="holds semantic docids: name a table of atomic docids"):
        growing.make("atomic", NEW, extends=made["docids"])
    with pytest.raises(UserError, match=r"vectors of 5 dimensions, but .* was made of 8"):
        growing.make("semantic", NEW, dimensions=5, extends=made["docids"])
    made, _, _ = growing.make("naive_digits", ["1", "2"])
    with pytest.raises(UserError, match="now not all ids are numbers"):
        growing.make("naive_digits", ["1", "2", "b3"], extends=made["docids"])
