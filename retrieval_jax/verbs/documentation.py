"""What `--help` says of a verb, read from the source of its module, as importing that would take seconds."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from retrieval_jax.verbs.table import VERBS


def documentation(verb: str) -> tuple[str, str]:
    """Reads a verb's documentation without importing it.

    What a class inherits belongs to it: the attributes of its base classes, and what their docstrings say of
    those that its own does not name.

    Returns:
      (its first line; the whole text, with the gin parameters, their defaults and the macros that set them).
    """
    module, name = VERBS[verb]
    tree = _parsed(module)
    node = next(node for node in tree.body if _gin_name(node) == name)
    text = ast.get_docstring(node)
    if isinstance(node, ast.ClassDef):
        parameters: dict[str, ast.expr | None] = {}
        for cls in (node, *_base_classes(node, tree)):
            parameters |= {k: v for k, v in _attributes(cls) if k not in parameters}
            for parameter, entry in _described(cls):
                if not re.search(rf"^  {parameter}: ", text, re.MULTILINE):
                    text += f"\n{entry}"
    else:
        args = node.args.args
        defaults = [None] * (len(args) - len(node.args.defaults)) + node.args.defaults
        parameters = {arg.arg: default for arg, default in zip(args, defaults, strict=True)}
    macros = _macros()
    listed = "\n".join(
        f"  {key}{f' = {ast.unparse(default)}' if default else ''}"
        f"{f'   (--{macros[key]})' if key in macros else ''}"
        for key, default in ((f"{name}.{parameter}", default) for parameter, default in parameters.items())
    )
    return (
        text.splitlines()[0],
        f"{text}\n\nSet by --gin.NAME=VALUE, or by the macro named (defaults before any gin file):\n{listed}",
    )


def _parsed(module: str) -> ast.Module:
    """Parses a module of this package."""
    path = Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text())


def _base_classes(node: ast.ClassDef, tree: ast.Module) -> Iterator[ast.ClassDef]:
    """Yields the base classes of a class; the module (`tree`) imports them from others of this package."""
    for base in map(ast.unparse, node.bases):
        for line in tree.body:
            if isinstance(line, ast.ImportFrom) and base in [alias.name for alias in line.names]:
                there = _parsed(line.module)
                (found,) = (x for x in there.body if isinstance(x, ast.ClassDef) and x.name == base)
                yield found
                yield from _base_classes(found, there)


def _attributes(node: ast.ClassDef) -> list[tuple[str, ast.expr | None]]:
    """Lists the attributes that a dataclass's own body gives it, with their defaults."""
    annotated = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    return [(x.target.id, x.value) for x in annotated if not ast.unparse(x.annotation).startswith("ClassVar")]


def _described(node: ast.ClassDef) -> list[tuple[str, str]]:
    """Lists (attribute, its lines) of the last section of a class's docstring, which is "Args:"."""
    arguments = ast.get_docstring(node).partition("\nArgs:\n")[2]
    return [
        (match[1], match[0]) for match in re.finditer(r"^  (\w+): .*(?:\n    .*)*", arguments, re.MULTILINE)
    ]


def _macros() -> dict[str, str]:
    """Reads base.gin without gin: a verb's parameter -> the macro that gives its value."""
    package = Path(__file__).parents[1]  # beside gin_configs/ in a checkout, above it in a wheel
    files = (folder / "gin_configs" / "base.gin" for folder in (package, package.parent))
    text = next(file for file in files if file.is_file()).read_text()
    return dict(re.findall(r"^(\w+\.\w+) = %([A-Z_]+)$", text, re.MULTILINE))


def _gin_name(node: ast.stmt) -> str | None:
    """The name by which gin knows a function or class of a module; None if it does not."""
    for decorator in getattr(node, "decorator_list", ()):
        if ast.unparse(decorator) == "gin.configurable":
            return node.name
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "gin.configurable":
            return decorator.args[0].value if decorator.args else node.name
    return None
