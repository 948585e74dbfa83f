"""Docid tables that grow with their collection: old docids stay, new passages get docids of their own."""

from collections.abc import Iterator
from pathlib import Path

import gin
import numpy as np
import pytest
from tables import docids_of, stand_in

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids import quality
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.verbs import docids as docids_verb
from retrieval_jax.verbs.docids import make_docids


class Growing:
    """A collection that changes, with a vector a passage id; `make` runs the verb on its present state."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        monkeypatch.setattr(docids_verb, "Collection", lambda _: self.state)
        monkeypatch.setattr(quality, "plot", lambda *_: None)  # takes half a second

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
    assert manifest["settings"] == {"shared_codes": way, "balanced": False}
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
