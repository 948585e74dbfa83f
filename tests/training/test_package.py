"""How the package reads: functions are short, and calls name their arguments."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "retrieval_jax" / "training").glob("*.py"))
VARIADIC = ("optax.chain",)  # takes any number of transformations


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_functions_are_short_and_calls_name_their_arguments(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 80, f"{path.name}:{node.lineno}: {node.name} has {lines} lines"
        if isinstance(node, ast.Call) and ast.unparse(node.func) not in VARIADIC:
            assert len(node.args) <= 4, (
                f"{path.name}:{node.lineno}: {ast.unparse(node.func)} is called with {len(node.args)} "
                "positional arguments: name some"
            )
