"""Text files by line, however large: exact ranges of lines, and what is wrong with a line.

A parser raises `ParseError`; its reader knows the file and the line, and makes it a `LineError`; `ErrorLog`
gathers them and stops the import, or leaves the lines out. Nothing is repaired in silence: a collection that
lost passages still trains, with metrics that are wrong.
"""

import collections
import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log

T = TypeVar("T")
SHOWN = 3  # lines of a kind that a summary names
MARK = "\ufeff"  # the byte order mark
# Field -> the names that it has in the header of a table, in lower case.
NAMES = {
    "_id": (
        *("_id", "id", "pid", "qid", "did", "docid", "docno", "doc_id", "passage_id", "query_id"),
        *("document_id", "query-id", "corpus-id"),
    ),
    "title": ("title",),
    "text": ("text", "passage", "query", "question", "document", "body", "content", "contents"),
}


class ParseError(Exception):
    """A line that cannot be used: a kind (for counts), what is wrong, and the hint."""

    def __init__(self, kind: str, what: str, hint: str):
        super().__init__(kind, what, hint)
        self.kind, self.what, self.hint = kind, what, hint

    def at(self, path: Path, line: int) -> "LineError":
        """It, in its place."""
        return LineError(path, line, self.kind, self.what, self.hint)


@dataclasses.dataclass(frozen=True)
class LineError:
    """A bad line and where it is. `str()` is one line: `FILE:LINE: what: hint`."""

    path: Path
    line: int
    kind: str
    what: str
    hint: str

    def __str__(self) -> str:
        return format_error(self.path, self.line, self.what, self.hint)


class ErrorLog:
    """The bad lines of an import. `skip`: they are left out; otherwise `raise_first` raises the first."""

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.counts: collections.Counter[str] = collections.Counter()
        self.first: dict[str, list[LineError]] = {}  # kind -> the first few

    def add(self, error: LineError) -> None:
        """Notes one."""
        self.counts[error.kind] += 1
        first = self.first.setdefault(error.kind, [])
        if len(first) < SHOWN:
            first.append(error)

    def merge(self, other: "ErrorLog") -> None:
        """Notes what `other` noted, after one's own."""
        self.counts.update(other.counts)
        for kind, some in other.first.items():
            self.first[kind] = (self.first.get(kind, []) + some)[:SHOWN]

    def raise_first(self) -> None:
        """Raises UserError with the first bad line that was noted, and how many more there are."""
        if self.counts and not self.skip:
            first = min((some[0] for some in self.first.values()), key=lambda error: (error.path, error.line))
            more = self.counts - collections.Counter([first.kind])
            listed = ", ".join(f"{count:,} × {kind}" for kind, count in more.items())
            also = f"; there are more: {listed}" if more else ""
            raise UserError(f"{first} (to leave bad lines out: --ON_ERROR=skip{also})")

    def report(self) -> None:
        """Says what was left out: for each kind how many lines, and the first few."""
        for kind, count in self.counts.items():
            places = ", ".join(f"{error.path}:{error.line}" for error in self.first[kind])
            log(f"left out {count:,} × {kind}: {places}{', …' if count > SHOWN else ''}")


def format_error(path: Path, line: int | None, what: str, hint: str) -> str:
    """One line about a line of a file, or about the file as a whole."""
    return " ".join(f"{path}{f':{line}' if line else ''}: {what}: {hint}".splitlines())


@dataclasses.dataclass(frozen=True)
class Lines:
    """`count` lines of a plain text file, from a byte offset on; iterating gives (line number, bytes).

    `path` is the file that people know, also where what is read (`plain`) is an unpacked copy.
    """

    path: Path
    plain: Path
    offset: int
    first: int
    count: int

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with self.plain.open("rb") as file:
            file.seek(self.offset)
            yield from enumerate(itertools.islice(file, self.count), self.first)


def ranges(path: Path, scratch: Path, errors: ErrorLog, size: int) -> list[Lines]:
    """The lines of a file in ranges of about `size` bytes. A `.gz` is unpacked into `scratch` first."""
    plain = _unpack(path, scratch / path.stem, errors) if path.suffix == ".gz" else path
    found: list[Lines] = []
    offset, first = 0, 1
    try:
        with plain.open("rb") as file:
            while block := file.read(size):
                block += file.readline()
                count = block.count(b"\n") + (not block.endswith(b"\n"))
                found.append(Lines(path, plain, offset, first, count))
                offset, first = offset + len(block), first + count
    except OSError as error:
        raise UserError(format_error(path, 1, f"the file is unreadable ({error})", "restore it")) from None
    return found


def _unpack(path: Path, plain: Path, errors: ErrorLog) -> Path:
    """Decompresses the whole lines of a .gz."""
    scratch = plain.parent
    scratch.mkdir(parents=True, exist_ok=True)
    with plain.open("wb") as file:
        file.writelines(raw for _, raw in stream(path, errors))
    return plain


def stream(path: Path, errors: ErrorLog) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, bytes) of a plain or a .gz file, to the end or to where it is damaged."""
    line = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                yield line, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the file is unreadable here ({error})"
        errors.add(LineError(path, line + 1, "damaged file", what, "restore it"))
    except OSError as error:
        what = f"the file is unreadable here ({error})"
        raise UserError(format_error(path, line + 1, what, "restore it")) from error


def texts(
    lines: Iterable[tuple[int, bytes]], path: Path, errors: ErrorLog, header: str = ""
) -> Iterator[tuple[int, str]]:
    r"""Yields (line number, text without its line end), without the empty lines and the header on line 1.

    Only `\n` and `\r\n` end a line. `str.splitlines` would also cut at U+2028 and the like, which texts hold.
    A byte order mark may start any line: files that were joined by `cat` have several.
    """
    for line, raw in lines:
        try:
            text = text_of(raw)
        except UnicodeDecodeError as error:
            what = f"the line is not UTF-8 ({error.reason})"
            errors.add(LineError(path, line, "not UTF-8", what, "save it as UTF-8"))
            continue
        if text and text == header:
            if line > 1:
                errors.add(LineError(path, line, "second header", "the header again", "remove this line"))
        elif text:
            yield line, text


def text_of(raw: bytes) -> str:
    """A line's text, without its end and a byte order mark. Raises UnicodeDecodeError."""
    return raw.decode().removeprefix(MARK).removesuffix("\n").removesuffix("\r")


def parsed(
    path: Path, parse: Callable[[str], T], errors: ErrorLog, header: str = ""
) -> Iterator[tuple[int, T]]:
    """Yields (line number, what `parse` makes of the text) of a file; notes the lines that it refuses."""
    for line, text in texts(stream(path, errors), path, errors, header):
        try:
            value = parse(text)
        except ParseError as bad:
            errors.add(bad.at(path, line))
        else:
            yield line, value


def columns(text: str, fields: Sequence[str]) -> list[str]:
    """The columns of a row without quoting, so they hold no tab. Raises ParseError for another number."""
    values = text.split("\t")
    if len(values) != len(fields):
        what = f"{len(values)} tab-separated columns instead of {len(fields)}"
        hint = f"write {', '.join(fields)}, with no tab or newline inside them"
        raise ParseError("wrong columns", what, hint)
    return values


def unquoted(cell: str) -> str:
    """The text of a cell that csv or pandas put in quotes, doubling those within: `"a ""b"" c"` is `a "b" c`.

    They quote a cell of a TSV file because it has a quote, so one without doubled quotes stays as it is.
    """
    inner = cell[1:-1]
    if cell[:1] == cell[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _first(path: Path) -> str:
    """Line 1 of a file; "" where it cannot be read: the file's reader says what is wrong."""
    try:
        return text_of(next(stream(path, ErrorLog()), (1, b""))[1])
    except (UserError, UnicodeDecodeError):
        return ""


def header_of(path: Path, named: Mapping[int, str]) -> str:
    """Line 1 of a file whose order of columns is fixed, where it names the columns `named`; else "".

    Args:
      path: a TSV file, plain or compressed.
      named: column -> its field, a key of NAMES.
    """
    text = _first(path)
    cells = [cell.strip().lower() for cell in text.split("\t")]
    names_them = all(i < len(cells) and cells[i] in NAMES[field] for i, field in named.items())
    return text if names_them else ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A TSV file whose first line may name the columns; called, it gives a row's values in `fields`' order.

    Titles and texts are read out of the quotes of csv and pandas: see `unquoted`.

    Attributes:
      fields: keys of NAMES, as many as there are columns.
      header: line 1 where it is a header, that is where it names each field once (see NAMES); else "".
      order: the column of each field.
    """

    fields: tuple[str, ...]
    header: str
    order: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, fields: tuple[str, ...]) -> "Table":
        """The table in a file. One that cannot be read has no header."""
        text = _first(path)
        named = [name.strip().lower() for name in text.split("\t")]
        columns = [[i for i, name in enumerate(named) if name in NAMES[field]] for field in fields]
        if len(named) == len(fields) and all(len(some) == 1 for some in columns):
            return cls(fields, text, tuple(some[0] for some in columns))
        return cls(fields, "", tuple(range(len(fields))))

    def __call__(self, text: str) -> list[str]:
        values = columns(text, self.fields)
        pairs = zip(self.fields, self.order, strict=True)
        return [values[i] if field == "_id" else unquoted(values[i]) for field, i in pairs]


def say_header(path: Path, header: str) -> None:
    """Says that line 1 of a file is left out, where it is a header."""
    if header:
        log(f"{path}:1: a header ({', '.join(header.split())}): left out")


def json_object(text: str, fields: Sequence[str]) -> dict:
    """The JSON object of a line. Raises ParseError; `fields` are named in its hint."""
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("it is not an object, {...}")
        if "\\" in text:
            json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 column", "column")  # it is always line 1 of this line
        raise bad_json(reason, fields) from error
    return record


def bad_json(reason: str, fields: Sequence[str]) -> ParseError:
    """The exception for a JSON line without what it needs."""
    hint = f"write one JSON object a line, with {', '.join(fields)}"
    return ParseError("bad JSON", f"the JSON is wrong ({reason})", hint)


def string(record: dict, field: str, fields: Sequence[str]) -> str:
    """The text under a key; a title may be left out, or null (as pandas writes it). Raises ParseError."""
    value = record.get(field)
    if value is None and field == "title":
        return ""
    if not isinstance(value, str):
        raise bad_json(f"{field!r} is {'not a string' if field in record else 'missing'}", fields)
    return value
