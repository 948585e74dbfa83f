"""The wheel holds all modules and gin files of the checkout, and the sdist the rest of the project too."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def files(folder: str) -> set[str]:
    """All files below a folder of the checkout, but compiled ones."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(ROOT)) for path in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setuptools puts into the wheel (lib/), and the list of what it puts into the sdist."""
    folder = tmp_path_factory.mktemp("built")
    commands = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *commands], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_all_modules_and_gin_files(built: Path):
    lib = built / "lib"
    held = {str(path.relative_to(lib)) for path in lib.rglob("*") if path.is_file()}
    pages = {name for name in files("retrieval_jax") if name.endswith(".md")}
    assert held == files("retrieval_jax") - pages | {f"retrieval_jax/{name}" for name in files("gin_configs")}


def test_the_sdist_holds_the_rest_of_the_project_too(built: Path):
    (sources,) = built.glob("*.egg-info/SOURCES.txt")
    held = set(sources.read_text().splitlines())
    folders = ("retrieval_jax", "gin_configs", "tests", "benchmarks", "docs", "tpu_scripts")
    roots = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
    assert set().union(roots, *map(files, folders)) <= held


def test_on_a_mac_all_is_required_but_scann(built: Path):
    (facts,) = built.glob("*.egg-info")  # old versions of setuptools write the requirements elsewhere in it
    required = [Requirement(line) for line in importlib.metadata.Distribution.at(facts).requires]
    required = [r for r in required if "extra" not in str(r.marker)]

    def on(platform: str) -> set[str]:
        return {r.name for r in required if r.marker is None or r.marker.evaluate({"sys_platform": platform})}

    assert on("linux") - on("darwin") == {"scann"}
    assert {"jax", "tensorflow", "array_record"} <= on("darwin")
