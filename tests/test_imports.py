"""Imports point one way: a package imports only packages above it in this list, and no files form a cycle."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    *("core", "data", "mesh", "decoding", "models", "checkpoints", "embeddings", "docids", "examples"),
    *("search", "evaluation", "training", "interop", "serving", "verbs", "main"),
)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "retrieval_jax").rglob("*.py"))
}


def imports(module: str) -> set[str]:
    """The files of the package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in FILES and name.count(".")} - {module}


def package(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in FILES if name.count(".")])
def test_a_file_imports_only_packages_above_its_own(module: str):
    place = ORDER.index(package(module))
    below = {name for name in imports(module) if ORDER.index(package(name)) > place}
    assert not below, f"{module} may not import {', '.join(sorted(below))}"


def test_no_files_import_each_other():
    graph = {module: imports(module) for module in FILES if module.count(".")}
    # A file that is imported from a package's folder imports the package's docstring, too: that is no cycle.
    packages = {f"retrieval_jax.{name}" for name in ORDER}
    graph = {module: found - packages for module, found in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the files of the cycle


def test_every_package_says_what_is_in_it():
    for name in ORDER[:-1]:
        assert ast.get_docstring(ast.parse(FILES[f"retrieval_jax.{name}"].read_text()))


def test_verbs_alone_ask_gin_for_the_mesh_and_its_rules():
    """Below them, both are arguments."""
    for module, path in FILES.items():
        if (
            module.count(".")
            and package(module) not in ("verbs", "main")
            and module != "retrieval_jax.mesh.partitioning"
        ):
            asked = [
                node.lineno
                for node in ast.walk(ast.parse(path.read_text()))
                if (isinstance(node, ast.Attribute) and node.attr in MAKERS)
                or (isinstance(node, ast.alias) and node.name in MAKERS)
            ]
            assert not asked, f"{module}:{asked[0]}"


MAKERS = ("make_mesh", "axis_rules", "make_partitioner")
# What gin was told is read by the configuration itself, and by T5X's own command.
READ_GIN = ("core.configuration", "interop.t5x")


def test_libraries_use_gin_for_decorating_alone():
    for module, path in FILES.items():
        name = module.removeprefix("retrieval_jax.")
        if name.startswith("verbs.") or name in READ_GIN:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "gin"
            ):
                assert node.attr in ("configurable", "REQUIRED"), f"{module}:{node.lineno}: gin.{node.attr}"
