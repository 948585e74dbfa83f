"""The same calls on a disk and on gs://, which the libraries' own clients ask."""

import os
import time
from pathlib import Path

import pytest
from gcs import Bucket
from reading import error_of

from retrieval_jax.core import paths


@pytest.mark.parametrize(
    ("path", "folder", "way"),
    [
        ("gs://bucket/w/models/naive", "gs://bucket/w/searchers/naive", "../../models/naive"),
        ("gs://other/m", "gs://bucket/w/s", "../../../other/m"),
        ("gs://bucket/m", "/disk/s", "gs://bucket/m"),
        ("/disk/m", "gs://bucket/s", "/disk/m"),
        ("/disk/models/m", "/disk/searchers/s", "../../models/m"),
    ],
)
def test_a_way_leads_back(path: str, folder: str, way: str):
    assert paths.relative(path, folder) == way
    found = paths.join(folder, way)
    assert str(found if paths.is_remote(found) else found.resolve()) == path


def test_what_a_path_is(tmp_path: Path):
    assert paths.as_path(str(tmp_path)) == tmp_path
    assert isinstance(paths.as_path(tmp_path), Path)
    assert str(paths.as_path("gs://bucket/a") / "b" / "c.npy") == "gs://bucket/a/b/c.npy"
    assert str(paths.absolute("gs://bucket/a")) == "gs://bucket/a"
    assert paths.ensure_local(tmp_path / "none") == tmp_path / "none"  # and nothing is looked at
    assert "s3://bucket/x: neither a local path nor one of gs://" in error_of(
        lambda: paths.as_path("s3://bucket/x")
    )
    assert "must lie on a local disk" in error_of(lambda: paths.require_local("gs://bucket/tsv", "a source"))


def test_a_file_is_copied_once_and_again_when_it_changed(bucket: Bucket, tmp_path: Path):
    remote = paths.as_path("gs://bucket/test_paths/file.txt")
    with pytest.raises(FileNotFoundError):
        paths.ensure_local(remote)
    remote.write_text("one")
    copy = paths.ensure_local(remote)
    assert (copy.name, copy.read_text()) == ("file.txt", "one")
    assert copy.is_relative_to(tmp_path / "cache")
    inode = copy.stat().st_ino
    killed, copying = (copy.parents[1] / name for name in (".killed", ".copying"))
    for folder in (killed, copying):
        folder.mkdir()
        (folder / "half").touch()
    two_days_ago = time.time() - 2 * 24 * 60 * 60
    os.utime(killed, (two_days_ago, two_days_ago))
    assert paths.ensure_local(str(remote)).stat().st_ino == inode
    remote.write_text("two")  # as many bytes
    assert paths.ensure_local(remote).read_text() == "two"
    assert not copy.exists()
    assert not killed.exists()
    assert (copying / "half").exists()  # another process's


def test_a_folder_is_copied_whole(bucket: Bucket, tmp_path: Path):
    names = [f"part {i:03}/x" for i in range(30)] + ["empty", "deep/er/file"]  # a listing has 20
    for name in names:
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text("" if name == "empty" else name)
    remote = paths.as_path("gs://bucket/test_paths/folder")
    paths.copy_files(tmp_path / "here", remote, names, "send")
    assert [str(path.relative_to(remote)) for path in paths.files(remote)] == sorted(names)
    assert len(bucket.objects("test_paths/folder/")) == len(names)
    copy = paths.ensure_local(remote)
    assert {str(path.relative_to(copy)): path.read_text() for path in paths.files(copy)} == {
        name: "" if name == "empty" else name for name in names
    }
    assert paths.size(remote / "deep" / "er" / "file") == len("deep/er/file")
    paths.remove(remote)
    paths.remove(remote)
    assert not bucket.objects("test_paths/folder/")


def test_a_bucket_that_may_not_be_read_is_told_in_a_line(bucket: Bucket):
    paths.check_bucket(paths.as_path("gs://bucket/not/there/yet"))
    message = error_of(lambda: paths.check_bucket(paths.as_path("gs://forbidden/work")))
    assert "gs://forbidden/work: cannot be read" in message
    assert "credentials" in message
