"""The tests mirror the package: a module PACKAGE/MODULE.py is tested by tests/PACKAGE/test_MODULE.py.

Pytest tells test files apart by their names alone: where two packages have a module of one name, one of
the two is tested by tests/PACKAGE/test_PACKAGE_MODULE.py.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def names(module: Path) -> tuple[str, str]:
    """Returns the names that the module's test file may have."""
    return f"test_{module.name}.py", f"test_{module.parent.name}_{module.name}.py"


def test_every_module_has_a_test_file_of_its_name():
    package = ROOT / "retrieval_jax"
    modules = {
        path.relative_to(package).with_suffix("")
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    missing = {
        str(module)
        for module in modules
        if not any((ROOT / "tests" / module.parent / name).is_file() for name in names(module))
    }
    assert not missing, f"no test file of their name: {sorted(missing)}"


def test_no_two_test_files_have_one_name():
    files = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in files if files.count(name) > 1}
