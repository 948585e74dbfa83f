"""TSV files: their columns, by place or by the names in a header, and the quotes of csv and pandas."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.data.sources.lines import ErrorLog, ParseError, read_lines, text_of

# Field -> the names that it has in the header of a table, in lower case.
NAMES = {
    "_id": (
        *("_id", "id", "pid", "qid", "did", "docid", "docno", "doc_id", "passage_id", "query_id"),
        *("document_id", "query-id", "corpus-id"),
    ),
    "title": ("title",),
    "text": ("text", "passage", "query", "question", "document", "body", "content", "contents"),
}


def columns(text: str, fields: Sequence[str]) -> list[str]:
    """Splits a row at its tabs. Quotes have no meaning, so no column contains a tab.

    Args:
      text: the row.
      fields: the names of the columns, for messages.

    Raises:
      ParseError: the row has another number of columns.
    """
    values = text.split("\t")
    if len(values) != len(fields):
        what = f"{len(values)} tab-separated columns instead of {len(fields)}"
        hint = f"write {', '.join(fields)}, with no tab or newline inside them"
        raise ParseError("wrong columns", what, hint)
    return values


def unquoted(cell: str) -> str:
    """Returns the text of a cell that csv or pandas quoted: `"a ""b"" c"` becomes `a "b" c`.

    They quote a cell of a TSV file because it contains a quote, which they double. A cell without doubled
    quotes stays as it is.
    """
    inner = cell[1:-1]
    if cell[:1] == cell[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _first(path: Path) -> str:
    """Returns line 1 of a file, or "" if it cannot be read: the file's reader reports why."""
    try:
        return text_of(next(read_lines(path, ErrorLog()), (1, b""))[1])
    except (UserError, UnicodeDecodeError):
        return ""


def header_of(path: Path, named: Mapping[int, str]) -> str:
    """Returns line 1 of a file with a fixed order of columns if it is a header; otherwise "".

    Args:
      path: a TSV file, plain or compressed.
      named: column -> its field, a key of NAMES. Line 1 is a header if it names all of these columns.
    """
    text = _first(path)
    cells = [cell.strip().lower() for cell in text.split("\t")]
    names_them = all(i < len(cells) and cells[i] in NAMES[field] for i, field in named.items())
    return text if names_them else ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A TSV file whose first line may name the columns. Calling it parses a row: its values by `fields`.

    Titles and texts that csv or pandas quoted are unquoted; see `unquoted`.

    Attributes:
      fields: keys of NAMES, one for each column.
      header: line 1 if it is a header, that is if it names each field exactly once (see NAMES); otherwise "".
      order: the column of each field.
    """

    fields: tuple[str, ...]
    header: str
    order: tuple[int, ...]

    @classmethod
    def from_file(cls, path: Path, fields: tuple[str, ...]) -> "Table":
        """Returns the table in a file. If the file cannot be read, it has no header."""
        text = _first(path)
        named = [name.strip().lower() for name in text.split("\t")]
        columns = [[i for i, name in enumerate(named) if name in NAMES[field]] for field in fields]
        if len(named) == len(fields) and all(len(matches) == 1 for matches in columns):
            return cls(fields, text, tuple(matches[0] for matches in columns))
        return cls(fields, "", tuple(range(len(fields))))

    def __call__(self, text: str) -> list[str]:
        """Returns the values of a row in the order of `fields`. Raises ParseError for a bad row."""
        values = columns(text, self.fields)
        pairs = zip(self.fields, self.order, strict=True)
        return [values[i] if field == "_id" else unquoted(values[i]) for field, i in pairs]


def say_header(path: Path, header: str) -> None:
    """Prints that line 1 of a file is left out, if it is a header."""
    if header:
        log(f"{path}:1: a header ({', '.join(header.split())}): left out")
