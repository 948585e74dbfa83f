"""Released docT5query predictions, read as a stream: queries that somebody else's model generated.

They come in two forms, and any file may be compressed (`.gz`):

    NAME.txt            one line for each passage, in the collection's order; one file for each sample. A
                        sample may be cut into numbered pieces, as in
                        predicted_queries_topk_sample007.txt003-1004000 (sample 7, piece 3); a line may hold
                        several queries, separated by tabs
    NAME.jsonl          {"id": passage id, "predicted_queries": [...]}, in any order

Errors are UserErrors of the form `FILE:LINE: what is wrong: the remedy`.
"""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.generation import Advance
from retrieval_jax.data.sources.lines import format_error, text_of
from retrieval_jax.data.synthetic import QueryShards

_TEXT = re.compile(r"(?P<sample>.+)\.txt(?P<piece>\d*)(-\d+)?(\.gz)?")
_JSON = re.compile(r".+\.jsonl?(\.gz)?")
_LINES = 1 << 16  # of JSON, held at once


class TextPredictions:
    """Text files with one line for each passage, as a `generation.QuerySource`.

    Args:
      files: all files, in any order.

    Attributes:
      samples: the name of each sample -> its pieces, in order.
    """

    def __init__(self, files: Sequence[Path]):
        samples: dict[str, list[tuple[int, Path]]] = {}
        for file in sorted(files):
            match = _TEXT.fullmatch(file.name)
            samples.setdefault(match["sample"], []).append((int(match["piece"] or 0), file))
        self.samples = {name: [file for _, file in sorted(pieces)] for name, pieces in samples.items()}
        self.files = [file for pieces in self.samples.values() for file in pieces]

    def prepare(self, collection: Collection, shards: QueryShards) -> None:
        """Does nothing: the files are in the collection's order."""

    def queries(
        self, collection: Collection, shards: QueryShards, numbers: Sequence[int], advance: Advance
    ) -> Iterator[list[list[str]]]:
        """Yields for each of these shards the queries of each of its passages.

        All samples are read side by side, so that no more than a shard is in memory.

        Args:
          collection: the passages.
          shards: how the passages are divided.
          numbers: the shards to read, ascending.
          advance: called with the number of passages that are done.

        Raises:
          UserError: a line is not UTF-8, or a sample has more or fewer lines than there are passages.
        """
        hint = f"give one line for each of the {shards.total} passages, in their order"
        streams = [itertools.chain.from_iterable(map(_lines, pieces)) for pieces in self.samples.values()]
        at = 0
        for number in numbers:
            rows = shards.rows(number)
            made: list[list[str]] = [[] for _ in rows]
            for stream, pieces in zip(streams, self.samples.values(), strict=True):
                wanted = [text for _, _, text in itertools.islice(stream, rows.start - at, rows.stop - at)]
                if len(wanted) < len(rows):
                    last = sum(1 for _ in _lines(pieces[-1]))
                    raise _error(pieces[-1], last, "the lines end here, before the passages do", hint)
                for some, text in zip(made, wanted, strict=True):
                    some += text.split("\t")
            at = rows.stop
            advance(len(rows))
            yield made
        for stream in streams:
            if extra := next(itertools.islice(stream, shards.total - at, None), None):
                raise _error(extra[0], extra[1], "there are more lines than passages", hint)


class JsonPredictions:
    """Files with one JSON object for each passage, in any order, as a `generation.QuerySource`.

    They are sorted on disk before they are used.

    Args:
      files: all files.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = sorted(files)

    def prepare(self, collection: Collection, shards: QueryShards) -> None:
        """Copies each line to a file of its shard, once.

        Args:
          collection: the passages.
          shards: how the passages are divided.

        Raises:
          UserError: a line is damaged, or names a passage that the collection does not have.
        """
        storage.build_once(shards.folder / "sorted", {}, lambda tmp: self._sort(tmp, collection, shards))

    def _sort(self, folder: Path, collection: Collection, shards: QueryShards) -> dict:
        lines = itertools.chain.from_iterable(map(_predictions, self.files))
        with bar("sorting predictions", shards.total) as advance:
            while some := list(itertools.islice(lines, _LINES)):
                rows = collection.find_rows([key for _, _, key, _ in some])
                if len(unknown := np.flatnonzero(rows < 0)):
                    path, line, key, _ = some[unknown[0]]
                    what = f"{collection.folder} has no passage {key[:80]!r}"
                    raise _error(path, line, what, "import the collection that was predicted for")
                order = np.argsort(rows, kind="stable").tolist()
                for number, group in itertools.groupby(order, lambda i: int(rows[i]) // shards.size):  # noqa: B023
                    with (folder / f"{number}.jsonl").open("a") as file:
                        file.writelines(json.dumps([int(rows[i]), some[i][3]]) + "\n" for i in group)
                advance(len(some))
        return {}

    def queries(
        self, collection: Collection, shards: QueryShards, numbers: Sequence[int], advance: Advance
    ) -> Iterator[list[list[str]]]:
        """See `QuerySource.queries`; a passage for which none were predicted has none."""
        for number in numbers:
            rows = shards.rows(number)
            made: list[list[str]] = [[] for _ in rows]
            file = shards.folder / "sorted" / f"{number}.jsonl"
            if file.exists():
                with file.open() as lines:
                    for row, queries in map(json.loads, lines):
                        made[row - rows.start] += queries
            advance(len(rows))
            yield made


def open_predictions(path: str | Path) -> TextPredictions | JsonPredictions:
    """Finds the files of predictions in a folder. Their contents are checked later, as they are read.

    Args:
      path: a local folder.

    Raises:
      UserError: there is no such folder, or not exactly one of the two forms is in it.
    """
    paths.require_local(path, "predictions")
    folder = Path(path)
    if not folder.is_dir():
        raise _error(folder, None, "there is no such folder", "check the path")
    texts = [file for file in folder.iterdir() if _TEXT.fullmatch(file.name)]
    objects = [file for file in folder.iterdir() if _JSON.fullmatch(file.name)]
    if bool(texts) == bool(objects):
        what = "there are .txt and .jsonl files" if texts else "there is no .txt or .jsonl file"
        raise _error(folder, None, what, "have predictions of one form here, plain or .gz")
    return TextPredictions(texts) if texts else JsonPredictions(objects)


def _predictions(path: Path) -> Iterator[tuple[Path, int, str, list[str]]]:
    """Yields (file, line number, passage id, queries) of each JSON object."""
    for _, line, text in _lines(path):
        try:
            record = json.loads(text)
            key, queries = str(record["id"]), record["predicted_queries"]
            if not isinstance(queries, list) or not all(isinstance(q, str) for q in queries):
                raise ValueError("predicted_queries is not a list of strings")
            "".join([key, *queries]).encode()  # half of a surrogate pair is no text
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            hint = 'write {"id": …, "predicted_queries": […]}'
            raise _error(path, line, f"the JSON is wrong ({reason})", hint) from None
        yield path, line, key, queries


def _lines(path: Path) -> Iterator[tuple[Path, int, str]]:
    """Yields (file, line number, text) of each line. Empty lines count: a line's number says whose it is."""
    line = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                yield path, line, text_of(raw)
    except UnicodeDecodeError as error:
        raise _error(path, line, f"the line is not UTF-8 ({error.reason})", "save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _error(path, line + 1, f"the file is unreadable here ({error})", "restore it") from None


def _error(path: Path, line: int | None, what: str, hint: str) -> UserError:
    return UserError(format_error(path, line, what, hint))
