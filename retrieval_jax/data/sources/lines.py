"""Text files by line, however large they are: exact ranges of lines, and reports of bad lines.

A parser raises `ParseError`; its reader knows the file and the line and makes it a `LineError`; `ErrorLog`
collects them, and ends the import or leaves the lines out. Nothing is repaired silently: a model can be
trained on a collection that lost passages, and its metrics are wrong.
"""

import collections
import dataclasses
import gzip
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log

T = TypeVar("T")
SHOWN = 3  # lines of a kind that a summary names
MARK = "\ufeff"  # the byte order mark


class ParseError(Exception):
    """A line that cannot be used.

    Args:
      kind: the kind of error, by which errors are counted.
      what: what is wrong.
      hint: the remedy.
      line: where the error is in a text of several lines, from 1.
    """

    def __init__(self, kind: str, what: str, hint: str, line: int = 1):
        super().__init__(kind, what, hint, line)
        self.kind, self.what, self.hint, self.line = kind, what, hint, line

    def at(self, path: Path, line: int) -> "LineError":
        """Returns the error with its file and line, of which `line` is that where the text begins."""
        return LineError(path, line + self.line - 1, self.kind, self.what, self.hint)


@dataclasses.dataclass(frozen=True)
class LineError:
    """A bad line. `str()` of it is one line: `FILE:LINE: what is wrong: the remedy`.

    Attributes:
      path: the file.
      line: the line's number, from 1; 0 if it is not known.
      kind: the kind of error, by which errors are counted.
      what: what is wrong.
      hint: the remedy.
    """

    path: Path
    line: int
    kind: str
    what: str
    hint: str

    def __str__(self) -> str:
        return format_error(self.path, self.line, self.what, self.hint)


class ErrorLog:
    """Collects the bad lines of an import.

    Args:
      skip: whether bad lines are left out; otherwise `raise_first` raises the first one.

    Attributes:
      counts: kind -> number of errors.
      first: kind -> the first few errors.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.counts: collections.Counter[str] = collections.Counter()
        self.first: dict[str, list[LineError]] = {}  # kind -> the first few

    @staticmethod
    def skips(on_error: str) -> bool:
        """Returns whether a value of ON_ERROR leaves bad lines out: "skip" does, and "fail" does not.

        Raises:
          UserError: it is neither of them.
        """
        if on_error not in ("fail", "skip"):
            raise UserError(f"ON_ERROR: no way {on_error!r} to treat bad lines: choose 'fail' or 'skip'")
        return on_error == "skip"

    def add(self, error: LineError) -> None:
        """Adds an error."""
        self.counts[error.kind] += 1
        first = self.first.setdefault(error.kind, [])
        if len(first) < SHOWN:
            first.append(error)

    def merge(self, other: "ErrorLog") -> None:
        """Adds the errors of another log after those of this one."""
        self.counts.update(other.counts)
        for kind, some in other.first.items():
            self.first[kind] = (self.first.get(kind, []) + some)[:SHOWN]

    def raise_first(self) -> None:
        """Raises UserError with the first error and the number of the others, unless errors are skipped."""
        if self.counts and not self.skip:
            first = min((some[0] for some in self.first.values()), key=lambda error: (error.path, error.line))
            more = self.counts - collections.Counter([first.kind])
            listed = ", ".join(f"{count:,} × {kind}" for kind, count in more.items())
            also = f"; there are more: {listed}" if more else ""
            raise UserError(f"{first} (to leave bad lines out: --ON_ERROR=skip{also})")

    def report(self) -> None:
        """Prints the number of lines that were left out and the first few of them, by kind."""
        for kind, count in self.counts.items():
            places = ", ".join(_place(error.path, error.line) for error in self.first[kind])
            log(f"left out {count:,} × {kind}: {places}{', …' if count > SHOWN else ''}")


def _place(path: Path, line: int | None) -> str:
    return f"{path}:{line}" if line else str(path)


def format_error(path: Path, line: int | None, what: str, hint: str) -> str:
    """Formats an error about a line of a file, or about the file as a whole, as one line.

    Args:
      path: the file.
      line: the line's number, from 1; None for the file as a whole.
      what: what is wrong.
      hint: the remedy.
    """
    return " ".join(f"{_place(path, line)}: {what}: {hint}".splitlines())


@dataclasses.dataclass(frozen=True)
class LineRange:
    """A range of lines of a plain text file. Iterating yields (line number, bytes).

    Attributes:
      path: the file that the user knows, for messages.
      plain: the file that is read: `path`, or an unpacked copy of it.
      offset: the byte at which the range begins.
      first: the number of its first line, from 1.
      count: the number of its lines.
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


def split_lines(path: Path, scratch: Path, errors: ErrorLog, size: int) -> list[LineRange]:
    """Divides the lines of a file into ranges.

    Args:
      path: the file, plain or compressed.
      scratch: the folder for an unpacked copy of a compressed file.
      errors: receives an error if the compressed file is damaged.
      size: about how many bytes a range has.

    Raises:
      UserError: the file cannot be read.
    """
    plain = _unpack(path, scratch / path.stem, errors) if path.suffix == ".gz" else path
    found: list[LineRange] = []
    offset, first = 0, 1
    try:
        with plain.open("rb") as file:
            while block := file.read(size):
                block += file.readline()
                count = block.count(b"\n") + (not block.endswith(b"\n"))
                found.append(LineRange(path, plain, offset, first, count))
                offset, first = offset + len(block), first + count
    except OSError as error:
        raise UserError(format_error(path, 1, f"the file is unreadable ({error})", "restore it")) from None
    return found


def _unpack(path: Path, plain: Path, errors: ErrorLog) -> Path:
    """Decompresses the undamaged lines of a .gz file, and returns the new file."""
    scratch = plain.parent
    scratch.mkdir(parents=True, exist_ok=True)
    with plain.open("wb") as file:
        file.writelines(raw for _, raw in read_lines(path, errors))
    return plain


def read_lines(path: Path, errors: ErrorLog) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, bytes) of a plain or compressed file, to its end or to where it is damaged.

    Args:
      path: the file.
      errors: receives an error where a compressed file is damaged.

    Raises:
      UserError: the file cannot be read.
    """
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


def first_line(path: Path, most: int) -> bytes:
    """Returns the first line that is not blank, or its beginning; b"" if there is none.

    Args:
      path: the file, plain or compressed.
      most: bytes of the line that are read: a file may be a single line of gigabytes.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while (raw := file.readline(most)) and not raw.removeprefix(MARK.encode()).strip():
                pass
            return raw
    except (EOFError, zlib.error, OSError) as error:
        what = f"the file is unreadable here ({error})"
        raise UserError(format_error(path, 1, what, "restore it")) from error


def decode_lines(
    lines: Iterable[tuple[int, bytes]], path: Path, errors: ErrorLog, header: str = ""
) -> Iterator[tuple[int, str]]:
    r"""Decodes lines: yields (line number, text without the line end), without empty lines and the header.

    Only `\n` and `\r\n` end a line; `str.splitlines` would also cut at U+2028 and similar characters, which
    texts contain. Any line may begin with a byte order mark, since files that were joined by `cat` have
    several.

    Args:
      lines: (line number, bytes) of each line.
      path: the file, for messages.
      errors: receives the lines that are not UTF-8.
      header: the text of line 1 if it is a header; otherwise "".
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
    """Returns a line's text without its end and a byte order mark. Raises UnicodeDecodeError."""
    return raw.decode().removeprefix(MARK).removesuffix("\n").removesuffix("\r")


def parse_lines(
    path: Path, parse: Callable[[str], T], errors: ErrorLog, header: str = ""
) -> Iterator[tuple[int, T]]:
    """Parses a file: yields (line number, result of `parse`) of each good line.

    Args:
      path: the file, plain or compressed.
      parse: a function of a line's text, which raises ParseError for a bad line.
      errors: receives the bad lines.
      header: the text of line 1 if it is a header; otherwise "".
    """
    for line, text in decode_lines(read_lines(path, errors), path, errors, header):
        try:
            value = parse(text)
        except ParseError as bad:
            errors.add(bad.at(path, line))
        else:
            yield line, value


def parse_whole(path: Path, parse: Callable[[str], T], errors: ErrorLog) -> Iterator[tuple[int, T]]:
    """Parses a file that is one text: yields (0, result of `parse`), or nothing if it is bad.

    Args:
      path: the file, plain or compressed.
      parse: a function of the file's text, which raises ParseError for a bad one.
      errors: receives what is bad.
    """
    damage = ErrorLog()
    content = b"".join(raw for _, raw in read_lines(path, damage))
    errors.merge(damage)
    if damage.counts:
        return
    try:
        value = parse(text_of(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"the line is not UTF-8 ({error.reason})"
        errors.add(LineError(path, line, "not UTF-8", what, "save it as UTF-8"))
    except ParseError as bad:
        errors.add(bad.at(path, 1))
    else:
        yield 0, value
