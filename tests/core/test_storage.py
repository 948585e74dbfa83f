"""Whole or absent, on a disk and in a bucket: what `build` promises."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gcs import Bucket
from reading import error_of

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty folder."""
    if request.param == "disk":
        (tmp_path / "place").mkdir()
        return tmp_path / "place"
    request.getfixturevalue("bucket")
    return paths.as_path(f"gs://bucket/{request.node.originalname}")


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths.files(folder)]


def test_same_recipe_is_made_once_and_another_anew(place: Path):
    calls = []

    def make(folder: Path) -> dict:
        calls.append(1)
        (folder / f"data{len(calls)}").write_text(str(len(calls)))
        return {"count": len(calls)}

    target = place / "deep" / "thing"
    assert storage.build_once(target, {"a": (1, 2)}, make) == {"recipe": {"a": [1, 2]}, "count": 1}
    assert storage.build_once(target, {"a": [1, 2]}, make)["count"] == 1
    assert storage.build_once(target, {"a": [3]}, make)["count"] == 2
    assert (target / "data2").read_text() == "2"
    assert names(place) == ["deep/thing/data2", "deep/thing/manifest.json"]  # nothing else left


def test_a_failure_leaves_nothing_and_keeps_the_old(place: Path):
    def fail(folder: Path) -> dict:
        (folder / "half").write_text("…")
        raise UserError("no")

    target = place / "thing"
    with pytest.raises(UserError):
        storage.build_once(target, {"a": 1}, fail)
    assert not names(place)
    storage.build_once(target, {"a": 1}, lambda folder: {"ok": True})
    with pytest.raises(UserError):
        storage.build_once(target, {"a": 2}, fail)
    assert storage.read_manifest(target, "x")["ok"]
    assert names(place) == ["thing/manifest.json"]


def test_what_a_kill_leaves_is_never_read_and_is_removed(tmp_path: Path):
    left = tmp_path / ".thing.making"
    left.mkdir()
    storage.write_manifest(left, {})
    with pytest.raises(UserError, match=r"nothing finished here.*retrieval-jax x"):
        storage.read_manifest(tmp_path / "thing", "x")
    storage.build_once(tmp_path / "thing", {}, lambda folder: {"files": len(list(folder.iterdir()))})
    assert storage.read_manifest(tmp_path / "thing", "x")["files"] == 0
    assert not left.exists()


FORMATS = {  # what a manifest says of its format -> what is said of that
    None: "was made by an earlier version of retrieval_jax",
    storage.FORMAT + 1: f"has format {storage.FORMAT + 1}, and this retrieval_jax reads {storage.FORMAT}",
}


@pytest.mark.parametrize(("version", "what"), FORMATS.items())
def test_a_folder_of_another_version_is_refused_in_a_line(place: Path, version: int | None, what: str):
    """It is neither read nor made again in silence, whatever its recipe says."""
    target = place / f"thing_{version}"
    storage.build_once(target, {"a": 1}, lambda folder: {"kept": True})
    assert storage.read_json(target / storage.MANIFEST, "")["format"] == storage.FORMAT
    facts = {"recipe": {"a": 1}} | ({} if version is None else {"format": version})
    storage.write_json(target / storage.MANIFEST, facts)
    told = error_of(lambda: storage.read_manifest(target, "index"))
    assert told == f"{target}: {what}: delete the folder, then `retrieval-jax index`"
    for recipe in ({"a": 1}, {"a": 2}):
        told = [
            error_of(lambda: storage.build_once(target, recipe, lambda folder: {})),  # noqa: B023
            error_of(lambda: storage.is_up_to_date(target, recipe)),  # noqa: B023
        ]
        assert told == 2 * [f"{target}: {what}: delete the folder, then the same command again"]
    assert storage.read_json(target / storage.MANIFEST, "") == facts


BUILD = """
import os, signal, sys, time
from pathlib import Path
from retrieval_jax.core import storage

def make(folder):
    (folder / "by").write_text(sys.argv[2])
    time.sleep(float(sys.argv[3]))
    return {"by": sys.argv[2]}

print(storage.build_once(sys.argv[1], {"a": int(sys.argv[4])}, make)["by"])
"""


def start(target: Path, name: str, seconds: float, recipe: int, code: str = BUILD) -> subprocess.Popen:
    command = [sys.executable, "-c", code, str(target), name, str(seconds), str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("recipe", "by"), [(1, "first"), (2, "second")])
def test_of_two_processes_the_second_waits(tmp_path: Path, recipe: int, by: str):
    """It takes the first one's work where the recipe is the same, else makes its own; none is lost."""
    target = tmp_path / "thing"
    first = start(target, "first", 1.5, 1)
    wait_for(tmp_path / ".thing.making" / "by")
    second = start(target, "second", 0, recipe)
    (out, _), (second_out, told) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert (out, second_out) == ("first\n", f"{by}\n")
    assert (first.returncode, second.returncode) == (0, 0)
    assert told == f"{target}: another process is making it: waiting for that to end\n"
    assert storage.read_manifest(target, "x") == {"recipe": {"a": recipe}, "by": by}
    assert names(tmp_path) == ["thing/by", "thing/manifest.json"]


def test_a_kill_releases_the_lock(tmp_path: Path):
    killed = start(tmp_path / "thing", "killed", 60, 1)
    wait_for(tmp_path / ".thing.making" / "by")
    killed.kill()
    killed.communicate()
    assert storage.build_once(tmp_path / "thing", {"a": 1}, lambda folder: {"by": "next"})["by"] == "next"
    assert names(tmp_path) == ["thing/manifest.json"]


def test_a_kill_between_the_two_renames_keeps_the_old(tmp_path: Path):
    target = tmp_path / "thing"
    storage.build_once(target, {"a": 1}, lambda folder: {"by": "old"})
    die = "Path.rename = lambda a, b: os.kill(os.getpid(), 9) if 'making' in a.name else os.rename(a, b)\n"
    killed = start(target, "new", 0, 2, BUILD.replace("print", die + "print"))
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    assert storage.read_manifest(target, "x")["by"] == "old"
    assert storage.is_up_to_date(target, {"a": 1})
    storage.build_once(target, {"a": 2}, lambda folder: {"by": "newer"})
    assert names(tmp_path) == ["thing/manifest.json"]


def test_a_kill_while_the_old_is_removed_leaves_nothing_that_looks_whole(tmp_path: Path):
    target = tmp_path / "thing"

    def two_files(folder: Path) -> dict:
        (folder / "a").touch(), (folder / "b").touch()
        return {"by": "old"}

    storage.build_once(target, {"a": 1}, two_files)
    die = (
        "def rmtree(path, **_):\n    if path.name == '.thing.old' and path.exists():\n"
        "        (path / 'a').unlink()\n        os.kill(os.getpid(), 9)\n"
        "import shutil\nshutil.rmtree = rmtree\n"
    )
    killed = start(target, "new", 0, 2, BUILD.replace("print", die + "print", 1))
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert storage.read_manifest(target, "x")["by"] == "new"
    assert names(tmp_path / ".thing.old") == ["b"]
    shutil.rmtree(target)  # as messages advise
    assert not storage.finished(target)
    storage.build_once(target, {"a": 2}, lambda folder: {"by": "newer"})
    assert names(tmp_path) == ["thing/manifest.json"]


def test_finished_folders_are_listed_without_those_in_the_making(place: Path):
    for name in ("b", "a", ".c.making", ".d.old"):
        (place / name).mkdir(parents=True)
        storage.write_manifest(place / name, {})
    (place / "e").mkdir()
    assert storage.finished_folders(place) == [place / "a", place / "b"]
    assert storage.finished_folders(place, "b*") == [place / "b"]


def test_where_the_new_cannot_be_moved_in_the_old_is_moved_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target, rename = tmp_path / "thing", Path.rename
    storage.build_once(target, {"a": 1}, lambda folder: {"by": "old"})

    def fails(source: Path, to: Path) -> Path:
        if source.name == ".thing.making":
            raise PermissionError(13, "Permission denied")
        return rename(source, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fails)
        message = error_of(lambda: storage.build_once(target, {"a": 2}, lambda folder: {"by": "new"}))
    assert message == f"{target}: cannot be written (Permission denied): the same command again"
    assert storage.read_manifest(target, "x")["by"] == "old"
    assert names(tmp_path) == ["thing/manifest.json"]


def test_no_other_artefact_is_touched(tmp_path: Path):
    """A hidden neighbour whose name begins like the lock's is another export."""
    for name in (".thing.huggingface", ".thing.old.2", "[t]hing"):
        storage.build_once(tmp_path / name, {}, lambda folder: {"kept": True})
    storage.build_once(tmp_path / "thing", {"a": 1}, lambda folder: {})
    storage.build_once(tmp_path / "thing", {"a": 2}, lambda folder: {})
    for name in (".thing.huggingface", ".thing.old.2", "[t]hing"):
        assert storage.read_manifest(tmp_path / name, "x")["kept"]


def test_a_kill_before_the_manifest_is_in_the_bucket(bucket: Bucket):
    """Neither what was there nor what was to come is read; the next call removes both."""
    target = paths.as_path("gs://bucket/killed/thing")

    def make(name: str):
        def write(folder: Path) -> dict:
            (folder / name).write_text(name)
            return {}

        return write

    storage.build_once(target, {"a": 1}, make("old"))
    make_new = "lambda folder: (folder / 'new').write_text('new') and {}"
    code = (
        f"from retrieval_jax.core import storage; storage.build_once({str(target)!r}, {{'a': 2}}, {make_new})"
    )
    bucket.kill_at("thing/manifest.json", [sys.executable, "-c", code])
    assert names(target) == ["new"]
    for recipe in ({"a": 1}, {"a": 2}):
        assert not storage.is_up_to_date(target, recipe)
    assert "nothing finished here" in error_of(lambda: storage.read_manifest(target, "x"))

    def fail(folder: Path) -> dict:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        storage.build_once(target, {"a": 3}, fail)
    storage.build_once(target, {"a": 3}, make("newer"))
    assert sorted(bucket.objects("killed/")) == ["killed/thing/manifest.json", "killed/thing/newer"]


def test_a_persons_folder_is_never_overwritten(place: Path):
    storage.atomic_write(place / "thing" / "thesis.tex", b"years")
    with pytest.raises(UserError, match="holds files of something else"):
        storage.build_once(place / "thing", {}, lambda folder: {})
    assert (place / "thing" / "thesis.tex").read_text() == "years"


def test_files_are_written_whole(place: Path):
    storage.write_json(place / "a" / "facts.json", {"é": [1]})
    assert storage.read_json(place / "a" / "facts.json", "…") == {"é": [1]}
    storage.atomic_write(place / "a" / "run.gz", b"text")
    assert gzip.decompress((place / "a" / "run.gz").read_bytes()) == b"text"
    assert names(place) == ["a/facts.json", "a/run.gz"]
    hint = "make it"
    assert error_of(lambda: storage.read_json(place / "none", hint)).endswith(
        "there is no such file: make it"
    )


def test_a_bucket_that_is_not_there_is_told_before_the_work(bucket: Bucket):
    def never(folder: Path) -> dict:
        raise AssertionError("the work was done")

    message = error_of(lambda: storage.build_once("gs://missing/work/thing", {}, never))
    assert "gs://missing/work/.thing.making: cannot be written" in message


def test_hash_fraction_is_even_and_fixed():
    values = [storage.hash_fraction(str(i)) for i in range(2000)]
    assert abs(sum(v < 0.1 for v in values) - 200) < 60
    assert storage.hash_fraction("numpy.dot") == storage.hash_fraction("numpy.dot")
    assert storage.digest(["ab", "c"]) != storage.digest(["a", "bc"])


@pytest.mark.parametrize(("text", "kind"), [("[1]", dict), ("3", dict), ('{"a": 1}', list), ("null", list)])
def test_json_of_another_kind_is_told(tmp_path: Path, text: str, kind: type):
    path = tmp_path / "facts.json"
    path.write_text(text)
    wanted = {dict: "object", list: "list"}[kind]
    assert (
        error_of(lambda: storage.read_json(path, "mend it", kind))
        == f"{path}: holds no JSON {wanted}: mend it"
    )
    assert storage.read_json(path, "mend it", object) == json.loads(text)
