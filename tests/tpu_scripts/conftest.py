"""A checkout with the scripts in it, where gcloud, xpk and pip are recorded."""

import shutil
import subprocess
from pathlib import Path

import pytest
from recorded import SCRIPTS, STUB, Cloud


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    checkout = tmp_path / "checkout"
    shutil.copytree(SCRIPTS, checkout / "tpu_scripts")
    pages = ("MANIFEST.in", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md")
    code = ("retrieval_jax/__init__.py", "gin_configs/runs/naive.gin", "setup.py", "pyproject.toml")
    for name in (*code, *pages):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    (checkout / ".gitignore").write_text("build/\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"],
    ):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (tmp_path / "bin").mkdir()
    for name in ("gcloud", "xpk", "kubectl", "gsutil", "python3"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    return Cloud(tmp_path)
