"""Writing and reading small sources, for the tests of their layouts."""

import functools
import gzip
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources.folders import Source
from retrieval_jax.data.sources.layouts import open_source
from retrieval_jax.data.sources.lines import ErrorLog


def write(folder: Path, files: dict[str, str | bytes | None]) -> Path:
    """Writes files. Text for a name in .gz is compressed; bytes are written as they are; None is no file."""
    for name, content in files.items():
        if content is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                content = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
            path.write_bytes(content)
    return folder


def read(
    source: Path | Source, errors: ErrorLog | None = None, shard_bytes: int = 1 << 20
) -> tuple[list[Passage], dict[str, list[Query]]]:
    """All passages and queries of a source."""
    errors = errors or ErrorLog()
    source = open_source(source) if isinstance(source, Path) else source
    with tempfile.TemporaryDirectory() as scratch:
        found = source.passages(Path(scratch), errors, shard_bytes)
        passages = [passage for shard in found.shards() for passage in shard()]
        assert found.ids.to_pylist() == [passage.id for passage in passages]
        return passages, source.queries(functools.partial(arrow_ids.find_rows, found.ids), errors)


def error_of(function: Callable[[], object]) -> str:
    """The message of the UserError that a call raises: one line, printable."""
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


def places(errors: ErrorLog, folder: Path) -> dict[str, list[str]]:
    """Kind -> FILE:LINE of the first bad lines that were left out."""
    return {
        kind: [f"{fault.path.relative_to(folder)}:{fault.line}" for fault in some]
        for kind, some in errors.first.items()
    }


def python_of(page: str) -> list[str]:
    """The blocks of Python in a page of the repository."""
    text = (Path(__file__).parents[1] / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
