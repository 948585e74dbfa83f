"""Collections in a folder, in the layouts that people have. Any file may be compressed (`.gz`).

    BEIR        corpus.jsonl                queries.jsonl         qrels/SPLIT.tsv
    TSV         docs.tsv                    queries.SPLIT.tsv     qrels.SPLIT.tsv
    MS MARCO    collection.tsv              queries.SPLIT.tsv     qrels.SPLIT.tsv (TREC's columns)
    NCI         NQ_doc_content.tsv          nq_SPLIT_doc_newid.tsv
    NCI         Trivia_doc_content.tsv      train.tsv, dev.tsv, test.tsv
    Tevatron    corpus.jsonl (or none)      SPLIT.jsonl, SPLIT.human.jsonl, SPLIT.llm.jsonl

A `.jsonl` line is a JSON object; a `.tsv` line is a row, whose texts hold no tab or newline. A text that csv
or pandas quoted because it has a quote is read out of its quotes (see `tsv.unquoted`). The first line of
docs.tsv, collection.tsv and queries.SPLIT.tsv may be a header (see `tsv.Table`): its order counts.
The splits come from the names of the files. The first three layouts are here.

To add a layout, write a class with the members of `folders.Layout` and register an object of it:

    register_layout(MyLayout())

The module that does so must be imported first: in Python by `import`, on the command line by a gin file
(`--gin_file`) with the line `import MODULE`. No other file changes. `nci.py` is an example in which each line
is a passage or a query; `tevatron.py` one in which a line holds both.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence, Set
from pathlib import Path

from retrieval_jax.data.collection import Passage
from retrieval_jax.data.sources import judged, nci, tevatron
from retrieval_jax.data.sources.folders import (
    Layout,
    Source,
    find_file,
    find_splits,
    folder_name,
    line_passages,
    source_error,
)
from retrieval_jax.data.sources.json_objects import json_object, string
from retrieval_jax.data.sources.judged import Split
from retrieval_jax.data.sources.lines import ParseError
from retrieval_jax.data.sources.tsv import Table, columns

_PASSAGE, _QUERY, _QREL = ("_id", "title", "text"), ("_id", "text"), judged.HEADER
_TREC = ("query", "0", "passage", "grade")


def register_layout(layout: Layout) -> None:
    """Adds a layout of collections. Where it matches a folder, it goes before those of this package.

    Args:
      layout: the layout.

    Raises:
      ValueError: another layout has its name.
    """
    if layout.name in {known.name for known in (*_OTHERS, *_LAYOUTS)}:
        raise ValueError(f"a layout {layout.name!r} is registered already")
    _OTHERS.append(layout)


def open_source(path: str | Path) -> Source:
    """Finds the files of the collection in a folder. Their contents are checked later, as they are read.

    Args:
      path: the folder.

    Raises:
      UserError: the folder has no layout that is registered, has two, or lacks a file of its layout.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise source_error(folder, "there is no such folder", "check the path")
    # Names that begin with a dot are of no layout, as macOS's ._train.jsonl beside train.jsonl.
    present = {file.name.removesuffix(".gz") for file in folder.iterdir() if not file.name.startswith(".")}
    matching = [layout for layout in _OTHERS if layout.matches(present)]
    matching = matching or [layout for layout in _LAYOUTS if layout.matches(present)]
    if len(matching) > 1:
        what = f"the files of two layouts are here, {matching[0].name} and {matching[1].name}"
        raise source_error(folder, what, "keep those of one")
    if not matching:
        needs = "; ".join(f"{layout.name} needs {layout.needs}" for layout in (*_LAYOUTS, *_OTHERS))
        raise source_error(folder, "no layout is here", f"have the files of one, plain or .gz ({needs})")
    return matching[0].open_folder(folder)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """A layout of passages, queries and qrels: the files' names and what their lines hold.

    Attributes:
      name: the layout's name.
      marker: the file of the passages.
      queries: the files of queries, with SPLIT in the name if each split has one.
      qrels: the files of relevance judgements, one a split.
      columns: of the passages' rows; None if the lines of passages and queries are JSON.
      parse_qrel: makes (query, passage, grade) of a line of qrels.
    """

    name: str
    marker: str
    queries: str
    qrels: str
    columns: tuple[str, ...] | None
    parse_qrel: Callable[[str], Sequence[str]]

    @property
    def needs(self) -> str:
        return f"{self.marker}, {self.queries}, {self.qrels}"

    def matches(self, files: Set[str]) -> bool:
        """See `Layout.matches`."""
        is_tevatrons = self.marker == tevatron.CORPUS and tevatron.Tevatron().matches(files)
        return self.marker in files and not is_tevatrons

    def open_folder(self, folder: Path) -> Source:
        """See `Layout.open_folder`."""
        file, splits = find_file(folder, self.marker), {}
        for split, (qrels, spelling) in find_splits(folder, self.qrels).items():
            queries = find_file(folder, self.queries.replace("SPLIT", spelling))
            parse, header = _beir_query, ""
            if self.columns:
                parse = Table.from_file(queries, _QUERY)
                header = parse.header
            splits[split] = Split(queries, qrels, parse, self.parse_qrel, header)
        if not splits:
            raise source_error(
                folder / self.qrels, "there are no qrels", "add the file of at least one split"
            )
        others = dict.fromkeys(path for split in splits.values() for path in (split.queries, split.qrels))
        parse, header = _beir_passage, ""
        if self.columns:
            table = Table.from_file(file, self.columns)
            parse, header = functools.partial(_row_passage, table), table.header
        return Source(
            folder_name(folder),
            (file, *others),
            functools.partial(line_passages, [file], parse, header=header),
            functools.partial(judged.read, splits),
        )


def _json_strings(fields: tuple[str, ...], text: str) -> list[str]:
    record = json_object(text, fields)
    return [string(record, field, fields) for field in fields]


def _beir_passage(text: str) -> list[Passage]:
    return [Passage(*_json_strings(_PASSAGE, text))]


def _row_passage(table: Table, text: str) -> list[Passage]:
    key, *title, body = table(text)
    return [Passage(key, *(title or [""]), body)]


def _tsv_qrel(text: str) -> tuple[str, ...]:
    return tuple(columns(text, _QREL))


def _trec_qrel(text: str) -> tuple[str, ...]:
    values = text.split()
    if len(values) != len(_TREC):
        what = f"{len(values)} columns instead of {len(_TREC)}"
        raise ParseError("wrong columns", what, f"write {' '.join(_TREC)} (TREC qrels)")
    query, _, passage, grade = values
    return query, passage, grade


_beir_query = functools.partial(_json_strings, _QUERY)
_LAYOUTS = (
    _Judged("BEIR", "corpus.jsonl", "queries.jsonl", "qrels/SPLIT.tsv", None, _tsv_qrel),
    _Judged("TSV", "docs.tsv", "queries.SPLIT.tsv", "qrels.SPLIT.tsv", _PASSAGE, _tsv_qrel),
    _Judged("MS MARCO", "collection.tsv", "queries.SPLIT.tsv", "qrels.SPLIT.tsv", _QUERY, _trec_qrel),
    nci.NQ,
    nci.TRIVIA,
    tevatron.Tevatron(),
)
_OTHERS: list[Layout] = []
"""The layouts that other packages registered."""
