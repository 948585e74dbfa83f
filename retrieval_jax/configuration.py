"""Gin files and bindings: found in a checkout and in an installed package; errors in one line."""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin

from retrieval_jax.errors import UserError

# Only plain files: gin's other reader takes `include 'models/tiny.gin'` for a Python package of that name,
# and fails where the working folder happens to have a folder models/.
gin.config._FILE_READERS[1:] = []

BASE = "base.gin"  # read first: it defines every macro and wires the verbs to them
_given: tuple[list[str], list[str]] = ([], [])


def gin_folder() -> Path:
    """`gin_configs`: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).parent
    inside = package / "gin_configs"
    return inside if inside.is_dir() else package.parent / "gin_configs"


def macros() -> list[str]:
    """The names that `--gin.NAME=` may set: those that base.gin defines."""
    return re.findall(r"^([A-Z_]+) =", (gin_folder() / BASE).read_text(), re.MULTILINE)


def configure(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Reads base.gin, then the files, then the bindings (`NAME=VALUE`), each overriding what was before.

    Raises UserError for a missing file, a name that does not exist, or a value that gin cannot read.
    """
    global _given
    _given = (list(files), list(bindings))
    gin.clear_config()
    for folder in (gin_folder().parent, gin_folder()):
        gin.add_config_file_search_path(str(folder))
    for file in (BASE, *files):
        with _one_line(f"--gin_file={file}"):
            gin.parse_config_file(file)
    known = macros()
    for binding in bindings:
        name = binding.split("=")[0].strip()
        if re.fullmatch(r"\w+", name) and name not in known and not _defined(name):
            close = difflib.get_close_matches(name, known, 1)
            mend = f"did you mean {close[0]}?" if close else f"the names are {', '.join(known)}"
            raise UserError(f"--gin.{name}: no such name: {mend}")
        with _one_line(f"--gin.{binding}"):
            gin.parse_config(binding)
    _one_number_of_steps()


def _one_number_of_steps() -> None:
    """Makes `train.steps`, where it is set alone, the steps of all that goes by them, as a schedule does."""
    steps = gin.query_parameter("train.steps")
    if isinstance(steps, int):
        gin.parse_config(f"STEPS = {steps}")


def given() -> tuple[list[str], list[str]]:
    """The files and bindings that `configure` was given last."""
    return _given


def _defined(macro: str) -> bool:
    try:
        gin.query_parameter(f"%{macro}")
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def run_file(file: str, *settings: str) -> Iterator[None]:
    """Inside, a run file and settings hold, below the person's bindings; afterwards what held before."""
    files, bindings = given()
    configure([file, *files], [*settings, *bindings])
    try:
        yield
    finally:
        configure(files, bindings)


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    logging.disable(logging.ERROR)  # gin logs each folder where a file was not found
    try:
        yield
    except OSError as error:
        there = sorted(str(p.relative_to(gin_folder())) for p in (gin_folder() / "runs").glob("*.gin"))
        raise UserError(
            f"{where}: no such file ({str(error).splitlines()[0]}): there are {', '.join(there)}"
        ) from None
    except (ValueError, SyntaxError, TypeError, NameError) as error:
        lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines()]
        place = re.search(r'In file "([^"]+)", line (\d+)', str(error))
        where = f"{place[1]}:{place[2]}" if place else where
        mend = "`retrieval-jax VERB --help` lists the names"
        if isinstance(error, SyntaxError) or "pars" in lines[0]:
            mend = "a text needs quotes of its own, as in --gin.COLLECTION=\"'path'\""
        raise UserError(f"{where}: {lines[0].rstrip('.')}: {mend}") from None
    finally:
        logging.disable(logging.NOTSET)
