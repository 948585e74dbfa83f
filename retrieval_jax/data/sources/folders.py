"""The parts that all layouts of collections share: finding files, and reading passages line by line."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Protocol

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources.judged import FindRows
from retrieval_jax.data.sources.lines import ErrorLog, format_error, split_lines
from retrieval_jax.data.sources.passages import Part, Passages, check
from retrieval_jax.data.sources.tsv import say_header

_SAME_SPLIT = {"validation": "dev", "valid": "dev", "val": "dev"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A collection whose files have been found but not yet read.

    Attributes:
      name: the name of its dataset, of the form [a-z][a-z0-9_]*.
      files: all files that are read. The import is repeated when their sizes or times change.
      passages: a function that reads and checks all passages. Its arguments are a scratch folder, the
        `ErrorLog` that receives bad lines, and the number of bytes of text in a shard.
      queries: a function that reads the judged queries of each split. Its arguments are a function that finds
        the rows of passage ids, and the `ErrorLog`.
    """

    name: str
    files: tuple[Path, ...]
    passages: Callable[[Path, ErrorLog, int], Passages]
    queries: Callable[[FindRows, ErrorLog], dict[str, list[Query]]]


class Layout(Protocol):
    """A layout of collections in folders: how its files are named and read.

    Attributes:
      name: its name, for error messages.
      needs: the names of its files, for error messages.
    """

    name: str
    needs: str

    def matches(self, files: Set[str]) -> bool:
        """Returns whether a folder with files of these names (without `.gz`) has this layout."""
        ...

    def open_folder(self, folder: Path) -> Source:
        """Returns the collection in a folder that matches.

        Raises:
          UserError: a file is missing.
        """
        ...


def dataset_name(text: str) -> str:
    """Converts a text to snake_case, e.g. `MS MARCO-v2` to `ms_marco_v2` and `2wiki` to `data_2wiki`."""
    name = re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")
    return name if re.match("[a-z]", name) else f"data_{name}".rstrip("_")


def folder_name(folder: Path) -> str:
    """Returns the dataset name of a folder, which is made of the folder's own name."""
    return dataset_name(os.path.basename(os.path.abspath(folder)))


def source_error(path: Path, what: str, hint: str) -> UserError:
    """Returns the error about a file or a folder as a whole."""
    return UserError(format_error(path, None, what, hint))


def find_file(folder: Path, name: str) -> Path:
    """Finds a file, plain or compressed. Raises UserError unless exactly one of the two exists."""
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.exists()]
    if len(found) != 1:
        what = "the file is here both plain and as .gz" if found else "the file is missing, as is its .gz"
        raise source_error(folder / name, what, "keep exactly one of the two")
    return found[0]


def find_splits(folder: Path, pattern: str) -> dict[str, tuple[Path, str]]:
    """Finds the files of all splits by a pattern such as `qrels.SPLIT.tsv`.

    Names of splits have letters, digits and `_`; dots become `_`. `validation`, `valid` and `val` are read as
    `dev`, and so is MS MARCO's `dev.small` where there is no other dev split.

    Args:
      folder: the folder of the collection.
      pattern: a path in that folder, with SPLIT in place of the split's name.

    Returns:
      Split -> (its file, how the file's name spells the split).

    Raises:
      UserError: two files are of the same split, or a split's name has other characters.
    """
    before, after = Path(pattern).name.split("SPLIT")
    splits: dict[str, tuple[Path, str]] = {}
    visible = before or "[!.]"  # as macOS's ._test.tsv beside test.tsv
    for file in sorted((folder / pattern).parent.glob(f"{visible}*{after}*")):
        if (name := file.name.removesuffix(".gz")).endswith(after) and len(name) > len(before + after):
            spelling = name[len(before) : len(name) - len(after)]
            if (split := split_name(file, spelling)) in splits:
                raise source_error(file, f"{splits[split][0].name} is split {split!r} too", "keep just one")
            splits[split] = file, spelling
    if "dev" not in splits and "dev_small" in splits:
        splits["dev"] = splits.pop("dev_small")
    return splits


def split_name(file: Path, spelling: str) -> str:
    """Returns the name of the split that a file's name spells so. Raises UserError for a bad name."""
    split = _SAME_SPLIT.get(spelling, spelling.replace(".", "_"))
    if not re.fullmatch("[A-Za-z0-9_]+", split):
        raise source_error(file, f"{split!r} is no name for a split", "use letters, digits and _ only")
    return split


def line_passages(
    files: Iterable[Path],
    parse: Callable[[str], list[Passage]],
    scratch: Path,
    errors: ErrorLog,
    shard_bytes: int,
    repeats: bool = False,
    header: str = "",
) -> Passages:
    """Reads and checks the passages of files that are parsed line by line.

    Args:
      files: the files, plain or compressed.
      parse: a function from a line's text to its passages; it raises ParseError for a bad line.
      scratch: a folder for unpacked copies of compressed files.
      errors: receives the bad lines.
      shard_bytes: about how many bytes of text are read by one worker.
      repeats: whether a passage may stand in several lines; see `passages.check`.
      header: the first line of the files, where it is a header and no passage; otherwise "".

    Returns:
      The passages, of which there is at least one.

    Raises:
      UserError: a line is bad and `errors` does not skip, or there are no passages.
    """
    files = list(files)
    for file in files:
        say_header(file, header)
    parts = [
        Part(some, parse, header)
        for file in files
        for some in split_lines(file, scratch, errors, shard_bytes)
    ]
    passages = check(parts, errors, repeats)
    if not len(passages.ids):
        raise source_error(files[0], "there are no passages (empty collection)", "write one passage a line")
    return passages
