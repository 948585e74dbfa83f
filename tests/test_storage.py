"""Whole or absent: what `build` promises."""

from pathlib import Path

import pytest

from retrieval_jax import storage
from retrieval_jax.errors import UserError


def test_same_recipe_is_made_once_and_another_anew(tmp_path: Path):
    calls = []

    def make(folder: Path) -> dict:
        calls.append(1)
        (folder / "data").write_text(str(len(calls)))
        return {"count": len(calls)}

    target = tmp_path / "deep" / "thing"
    assert storage.build(target, {"a": (1, 2)}, make) == {"recipe": {"a": [1, 2]}, "count": 1}
    assert storage.build(target, {"a": [1, 2]}, make)["count"] == 1
    assert storage.build(target, {"a": [3]}, make)["count"] == 2
    assert (target / "data").read_text() == "2"
    assert [p.name for p in target.parent.iterdir()] == ["thing"]  # nothing else left


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path):
    def fail(folder: Path) -> dict:
        (folder / "half").write_text("…")
        raise UserError("no")

    target = tmp_path / "thing"
    with pytest.raises(UserError):
        storage.build(target, {"a": 1}, fail)
    assert not list(tmp_path.iterdir())
    storage.build(target, {"a": 1}, lambda folder: {"ok": True})
    with pytest.raises(UserError):
        storage.build(target, {"a": 2}, fail)
    assert storage.read_manifest(target, "x")["ok"]
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_what_a_kill_leaves_is_never_read_and_is_removed(tmp_path: Path):
    left = tmp_path / ".thing.making"
    left.mkdir()
    (left / storage.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"nothing finished here.*retrieval-jax x"):
        storage.read_manifest(tmp_path / "thing", "x")
    storage.build(tmp_path / "thing", {}, lambda folder: {"files": len(list(folder.iterdir()))})
    assert storage.read_manifest(tmp_path / "thing", "x")["files"] == 0
    assert not left.exists()


def test_a_persons_folder_is_never_overwritten(tmp_path: Path):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="holds files of something else"):
        storage.build(tmp_path / "thing", {}, lambda folder: {})
    assert (tmp_path / "thing" / "thesis.tex").read_text() == "years"


def test_hash_fraction_is_even_and_fixed():
    values = [storage.hash_fraction(str(i)) for i in range(2000)]
    assert abs(sum(v < 0.1 for v in values) - 200) < 60
    assert storage.hash_fraction("numpy.dot") == storage.hash_fraction("numpy.dot")
    assert storage.digest(["ab", "c"]) != storage.digest(["a", "bc"])
