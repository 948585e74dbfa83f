"""Whether files are what was saved, on a disk, in a bucket and on the way from the one to the other."""

from pathlib import Path

import pytest
from gcs import Bucket

from retrieval_jax.checkpoints import checksums
from retrieval_jax.core import paths

FILES = {"params/d/0": b"weights", "params/_METADATA": b"{}", "position/metadata": b""}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "saved" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "saved" / name).write_bytes(content)
    return tmp_path / "saved"


def test_a_flipped_bit_on_a_disk(saved: Path):
    assert checksums.find_damage(saved) is None  # without checksums nothing is known
    checksums.write(saved)
    assert checksums.find_damage(saved) is None
    (saved / "params/d/0").write_bytes(b"weightt")
    assert checksums.find_damage(saved) == "params/d/0 is not what was written"


@pytest.mark.parametrize("written", ["disk", "bucket"])
def test_copied_to_a_bucket_and_back(bucket: Bucket, saved: Path, written: str):
    remote = paths.as_path(f"gs://bucket/checksums/{written}")
    if written == "disk":
        checksums.write(saved)
    names = [str(path.relative_to(saved)) for path in paths.files(saved)]
    paths.copy_files(saved, remote, names, "send")
    if written == "bucket":
        checksums.write(remote)
    assert (remote / checksums.NAME).is_file()
    assert checksums.find_damage(remote) is None
    assert checksums.find_damage(paths.ensure_local(remote)) is None
    (remote / "params/d/0").write_bytes(b"weigh")
    assert checksums.find_damage(remote) == "params/d/0 has 5 bytes, not 7"
    (remote / "params/d/0").unlink()
    assert "params/d/0" in checksums.find_damage(remote)
