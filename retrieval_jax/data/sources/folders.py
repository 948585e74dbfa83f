"""What the layouts of collections share: finding their files, and the source that they become."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Protocol

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources.judged import FindRows
from retrieval_jax.data.sources.lines import ErrorLog, format_error, ranges, say_header
from retrieval_jax.data.sources.passages import Part, Passages, check

_SAME_SPLIT = {"validation": "dev", "valid": "dev", "val": "dev"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A collection that has been found but not yet read.

    Attributes:
      name: a dataset name ([a-z][a-z0-9_]*).
      files: all files that are read.
      passages: (scratch folder, errors, bytes of text in a shard) -> the checked passages.
      queries: (lookup of passage ids, errors) -> split -> its judged queries.
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
    """A text in snake_case, e.g. `MS MARCO-v2` -> `ms_marco_v2`, `2wiki` -> `data_2wiki`."""
    name = re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")
    return name if re.match("[a-z]", name) else f"data_{name}".rstrip("_")


def folder_name(folder: Path) -> str:
    """The name of a dataset in a folder: the folder's own."""
    return dataset_name(os.path.basename(os.path.abspath(folder)))


def source_error(path: Path, what: str, hint: str) -> UserError:
    """The error for a file or a folder as a whole."""
    return UserError(format_error(path, None, what, hint))


def find_file(folder: Path, name: str) -> Path:
    """The file of that name, plain or compressed. If both are there, which one is meant is anyone's guess."""
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.exists()]
    if len(found) != 1:
        what = "the file is here both plain and as .gz" if found else "the file is missing, as is its .gz"
        raise source_error(folder / name, what, "keep exactly one of the two")
    return found[0]


def find_splits(folder: Path, pattern: str) -> dict[str, tuple[Path, str]]:
    """Split -> its file and how that spells SPLIT, of the files named by a pattern such as `qrels.SPLIT.tsv`.

    A split is named in letters, digits and `_`, dots become `_`; `validation`, `valid` and `val` are `dev`,
    and so is MS MARCO's `dev.small` where there is no other dev.
    """
    before, after = Path(pattern).name.split("SPLIT")
    splits: dict[str, tuple[Path, str]] = {}
    for file in sorted((folder / pattern).parent.glob(f"{before}*{after}*")):
        if (name := file.name.removesuffix(".gz")).endswith(after) and len(name) > len(before + after):
            spelling = name[len(before) : len(name) - len(after)]
            if (split := split_name(file, spelling)) in splits:
                raise source_error(file, f"{splits[split][0].name} is split {split!r} too", "keep just one")
            splits[split] = file, spelling
    if "dev" not in splits and "dev_small" in splits:
        splits["dev"] = splits.pop("dev_small")
    return splits


def split_name(file: Path, spelling: str) -> str:
    """The name of the split that a file's name spells so."""
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
    """The checked passages of files whose lines are parsed alike (see `passages.check` for `repeats`)."""
    files = list(files)
    for file in files:
        say_header(file, header)
    parts = [
        Part(some, parse, header) for file in files for some in ranges(file, scratch, errors, shard_bytes)
    ]
    passages = check(parts, errors, repeats)
    if not len(passages.ids):
        raise source_error(files[0], "there are no passages (empty collection)", "write one passage a line")
    return passages
