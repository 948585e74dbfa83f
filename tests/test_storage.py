"""Whole or absent, on a disk and in a bucket: what `build` promises."""

import gzip
import sys
from pathlib import Path

import pytest
from gcs import Bucket
from reading import error_of

from retrieval_jax import paths, storage
from retrieval_jax.errors import UserError


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty folder."""
    if request.param == "disk":
        (tmp_path / "place").mkdir()
        return tmp_path / "place"
    request.getfixturevalue("bucket")
    return paths.of(f"gs://bucket/{request.node.originalname}")


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths.files(folder)]


def test_same_recipe_is_made_once_and_another_anew(place: Path):
    calls = []

    def make(folder: Path) -> dict:
        calls.append(1)
        (folder / f"data{len(calls)}").write_text(str(len(calls)))
        return {"count": len(calls)}

    target = place / "deep" / "thing"
    assert storage.build(target, {"a": (1, 2)}, make) == {"recipe": {"a": [1, 2]}, "count": 1}
    assert storage.build(target, {"a": [1, 2]}, make)["count"] == 1
    assert storage.build(target, {"a": [3]}, make)["count"] == 2
    assert (target / "data2").read_text() == "2"
    assert names(place) == ["deep/thing/data2", "deep/thing/manifest.json"]  # nothing else left


def test_a_failure_leaves_nothing_and_keeps_the_old(place: Path):
    def fail(folder: Path) -> dict:
        (folder / "half").write_text("…")
        raise UserError("no")

    target = place / "thing"
    with pytest.raises(UserError):
        storage.build(target, {"a": 1}, fail)
    assert not names(place)
    storage.build(target, {"a": 1}, lambda folder: {"ok": True})
    with pytest.raises(UserError):
        storage.build(target, {"a": 2}, fail)
    assert storage.read_manifest(target, "x")["ok"]
    assert names(place) == ["thing/manifest.json"]


def test_what_a_kill_leaves_is_never_read_and_is_removed(tmp_path: Path):
    left = tmp_path / ".thing.making"
    left.mkdir()
    (left / storage.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"nothing finished here.*retrieval-jax x"):
        storage.read_manifest(tmp_path / "thing", "x")
    storage.build(tmp_path / "thing", {}, lambda folder: {"files": len(list(folder.iterdir()))})
    assert storage.read_manifest(tmp_path / "thing", "x")["files"] == 0
    assert not left.exists()


def test_a_kill_before_the_manifest_is_in_the_bucket(bucket: Bucket):
    """Neither what was there nor what was to come is read; the next call removes both."""
    target = paths.of("gs://bucket/killed/thing")

    def make(name: str):
        def write(folder: Path) -> dict:
            (folder / name).write_text(name)
            return {}

        return write

    storage.build(target, {"a": 1}, make("old"))
    make_new = "lambda folder: (folder / 'new').write_text('new') and {}"
    code = f"from retrieval_jax import storage; storage.build({str(target)!r}, {{'a': 2}}, {make_new})"
    bucket.kill_at("thing/manifest.json", [sys.executable, "-c", code])
    assert names(target) == ["new"]
    for recipe in ({"a": 1}, {"a": 2}):
        assert not storage.holds(target, recipe)
    assert "nothing finished here" in error_of(lambda: storage.read_manifest(target, "x"))

    def fail(folder: Path) -> dict:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        storage.build(target, {"a": 3}, fail)
    storage.build(target, {"a": 3}, make("newer"))
    assert sorted(bucket.objects("killed/")) == ["killed/thing/manifest.json", "killed/thing/newer"]


def test_a_persons_folder_is_never_overwritten(place: Path):
    storage.write_aside(place / "thing" / "thesis.tex", b"years")
    with pytest.raises(UserError, match="holds files of something else"):
        storage.build(place / "thing", {}, lambda folder: {})
    assert (place / "thing" / "thesis.tex").read_text() == "years"


def test_files_are_written_whole(place: Path):
    storage.write_json(place / "a" / "facts.json", {"é": [1]})
    assert storage.read_json(place / "a" / "facts.json", "…") == {"é": [1]}
    storage.write_aside(place / "a" / "run.gz", b"text")
    assert gzip.decompress((place / "a" / "run.gz").read_bytes()) == b"text"
    assert names(place) == ["a/facts.json", "a/run.gz"]
    mend = "make it"
    assert error_of(lambda: storage.read_json(place / "none", mend)).endswith(
        "there is no such file: make it"
    )


def test_a_bucket_that_is_not_there_is_told_before_the_work(bucket: Bucket):
    def never(folder: Path) -> dict:
        raise AssertionError("the work was done")

    message = error_of(lambda: storage.build("gs://missing/work/thing", {}, never))
    assert "gs://missing/work/.thing.making: cannot be written" in message


def test_hash_fraction_is_even_and_fixed():
    values = [storage.hash_fraction(str(i)) for i in range(2000)]
    assert abs(sum(v < 0.1 for v in values) - 200) < 60
    assert storage.hash_fraction("numpy.dot") == storage.hash_fraction("numpy.dot")
    assert storage.digest(["ab", "c"]) != storage.digest(["a", "bc"])
