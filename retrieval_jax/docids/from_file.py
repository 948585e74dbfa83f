"""Docids that somebody else made, from a file: codes, or texts such as titles, URLs and keywords.

    NAME.json     {"PASSAGE": DOCID, …}, as RIPOR's docid_to_smtid.json
    NAME.jsonl    an object a line: {"PASSAGE": DOCID}, or {"id": "PASSAGE", "docid": DOCID}
    other names   a line a docid: PASSAGE, tab, DOCID

A DOCID is a list of whole numbers, or a text; in a TSV file codes have spaces or commas between them. A
passage with several docids (MINDER, Li et al. 2023) has a list of them, or several lines. An id is a
text or a whole number, and no object has a key twice. Files may end in .gz.
"""

import array
import collections
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import gin
import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Positive
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.sources import lines, tsv
from retrieval_jax.data.sources.json_objects import json_id, json_object
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.decoding.order import order
from retrieval_jax.docids.identifiers import report_long_docid, text_tokens
from retrieval_jax.docids.kinds import DocidKind, DocidRequest, DocidResult, register_docid_kind
from retrieval_jax.docids.residual import output_size
from retrieval_jax.docids.table import DocidShape, blocks

START = -1  # the first code of each docid in RIPOR's files, which stands for the start token
SHARED_DOCIDS = ("list", "refuse")
_FIELDS = ('"PASSAGE": DOCID',)


@gin.configurable("docid_file")
@dataclasses.dataclass(frozen=True)
class Settings:
    """Which file, and how it is read.

    Attributes:
      path: the file.
      text: whether its docids are texts, which become pieces of the text vocabulary and then the end; else
        they are codes, and code v at position i is the token 2 + i·V + v.
      codes: V, the number of codes at each position; None: the largest code + 1.
      shared_docids: "list": passages may share a docid, and a search that finds it lists them all; "refuse".
    """

    path: str | None = None
    text: bool = False
    codes: Positive | None = None
    shared_docids: str = "list"

    def __post_init__(self):
        if self.shared_docids not in SHARED_DOCIDS:
            wrong = f"{self.shared_docids!r} is neither 'list' nor 'refuse'"
            raise UserError(f"docid_file.shared_docids: {wrong}: choose one of them")


class Docids:
    """The docids of a file, in its order.

    Args:
      settings: which file, and how it is read.

    Attributes:
      path: the file.
      ids: the passage of each docid.
      line_D: the line of each docid, from 1; 0 in a .json file.
      texts: the docids, where they are texts.
      codes: int32, the codes of all docids, one docid after the other.
      length_D: the number of codes of each docid.

    Raises:
      UserError: the file cannot be read, or something in it is no docid; the message has the line.
    """

    def __init__(self, settings: Settings):
        if settings.path is None:
            raise UserError(
                "docid_file.path: not set: name a file of docids, --gin.docid_file.path=\"'FILE'\""
            )
        self.path, self.settings = paths.as_path(settings.path), settings
        self.ids, self.texts = [], []
        self._lines, self._lengths, self._codes = array.array("q"), array.array("i"), array.array("i")
        is_docid = _is_text if settings.text else _is_codes
        for line, passage, value in _pairs(paths.ensure_local(self.path), settings.text):
            several = isinstance(value, list) and value and not is_docid(value)
            for docid in value if several else [value]:
                self._add(line, passage, docid, is_docid(docid))
        self.line_D, self.length_D = np.array(self._lines), np.array(self._lengths)
        self.codes = np.array(self._codes)
        if not self.ids:
            raise UserError(f"{self.path}: no docids in it: give one to each passage of the collection")

    def _add(self, line: int, passage: str, docid: object, is_docid: bool) -> None:
        if is_docid and not self.settings.text and docid[0] == START:
            docid = docid[1:]
        if not is_docid or not docid:
            raise self._error(line, passage, f"{json.dumps(docid)[:60]} is no docid", self._hint)
        self.ids.append(passage)
        self._lines.append(line)
        if self.settings.text:
            self.texts.append(docid)
            return
        most = self.settings.codes or np.iinfo(np.int32).max
        if not 0 <= min(docid) <= max(docid) < most:
            what = f"{str(docid)[:60]} has a code outside 0 to {most - 1}"
            raise self._error(line, passage, what, "number codes from 0; docid_file.codes is their number")
        self._lengths.append(len(docid))
        self._codes.extend(docid)

    @property
    def _hint(self) -> str:
        if self.settings.text:
            return "write a text, or a list of texts; codes are read with docid_file.text=False"
        return "write a list of whole numbers; texts are read with --gin.docid_file.text=True"

    def _error(self, line: int, passage: str, what: str, hint: str) -> UserError:
        return UserError(lines.format_error(self.path, line, f"passage {passage!r}: {what}", hint))

    @property
    def size(self) -> int:
        """V, the number of codes at each position."""
        return self.settings.codes or int(self.codes.max(initial=0)) + 1

    @property
    def length(self) -> int:
        """The number of codes of the longest docid."""
        return int(self.length_D.max())

    @property
    def has_end(self) -> bool:
        """Whether docids differ in length, so that an end comes after their codes."""
        return int(self.length_D.min()) < self.length

    def tokens(self) -> np.ndarray:
        """Writes the codes as tokens: D×L, padded with 0; with an end where docids differ in length."""
        length, size = self.length, self.size
        largest = 1 + length * size
        if largest > np.iinfo(np.int32).max:
            raise UserError(
                f"{self.path}: {length} codes below {size} take too many tokens: number them from 0"
            )
        tokens_DxL = np.zeros((len(self.ids), length + self.has_end), np.min_scalar_type(largest))
        starts_D = np.cumsum(self.length_D) - self.length_D
        for some in blocks(len(tokens_DxL)):
            for position in range(length):
                there = np.flatnonzero(self.length_D[some] > position)
                codes = self.codes[starts_D[some][there] + position].astype(np.int64)
                tokens_DxL[some.start + there, position] = 2 + position * size + codes
        if self.has_end:
            tokens_DxL[np.arange(len(tokens_DxL)), self.length_D] = EOS
        return tokens_DxL

    def rows(self, collection: Collection) -> np.ndarray:
        """Finds the passages of the docids (int64 D).

        Raises:
          UserError: a passage is not in the collection, or one of the collection has no docid.
        """
        rows_D = arrow_ids.find_rows(collection.ids, self.ids)
        unknown = np.flatnonzero(rows_D < 0)
        if len(unknown):
            at = int(unknown[0])
            what = f"the collection has no such passage ({len(unknown):,} docids are of such)"
            raise self._error(int(self.line_D[at]), self.ids[at], what, "give docids of this collection")
        lacks = np.flatnonzero(np.bincount(rows_D, minlength=collection.passage_count) == 0)
        if len(lacks):
            first = collection.ids[int(lacks[0])].as_py()
            raise UserError(
                f"{self.path}: no docid for {len(lacks):,} passages, as {first!r}: give one to each passage"
            )
        return rows_D


def _is_codes(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(code) is int for code in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _pairs(path: Path, text: bool) -> Iterator[tuple[int, str, object]]:
    """Yields (line, passage id, docid or list of docids) of a file; line 0 where it is one object."""
    suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix
    read = lines.parse_whole if suffix == ".json" else lines.parse_lines
    parse = {".json": _object, ".jsonl": _line}.get(suffix, _text_row if text else _code_row)
    errors = lines.ErrorLog()
    for line, docids in read(path, parse, errors):
        if errors.counts:
            break
        yield from ((line, passage, docid) for passage, docid in docids.items())
    for some in errors.first.values():
        raise UserError(str(some[0]))


def _object(text: str) -> dict[str, object]:
    """Parses a .json file."""
    return json_object(text, _FIELDS, of="file")


def _line(text: str) -> dict[str, object]:
    """Parses a line of a .jsonl file."""
    record = json_object(text, _FIELDS)
    return {json_id(record["id"]): record["docid"]} if record.keys() == {"id", "docid"} else record


def _text_row(text: str) -> dict[str, object]:
    """Parses a row of a TSV file of texts."""
    passage, docid = tsv.columns(text, ("passage", "docid"))
    return {passage: docid}


def _code_row(text: str) -> dict[str, object]:
    """Parses a row of a TSV file of codes; another text stays as it is, and is then no docid."""
    passage, cell = tsv.columns(text, ("passage", "docid"))
    parts = re.split(r"[,\s]+", cell.strip())
    is_codes = all(re.fullmatch(r"-?[0-9]{1,10}", part) for part in parts)
    return {passage: list(map(int, parts)) if is_codes else cell}


@register_docid_kind
class FromFile(DocidKind):
    """The docids of a file: see the module, and `Settings`."""

    name = "file"
    settings = Settings
    uses_seed = False

    def writes_text(self, settings: Settings) -> bool:
        """See DocidKind."""
        return settings.text

    def recipe(self, settings: Settings) -> dict:
        """See DocidKind: the file's content counts, not where it lies."""
        if settings.path is None or not paths.as_path(settings.path).is_file():
            raise UserError(
                f"docid_file.path: {settings.path or 'not set'}: name a file of docids, "
                "--gin.docid_file.path=\"'FILE'\""
            )
        path = paths.as_path(settings.path)
        content = {"path": path.suffixes, "checksum": storage.checksum(path)}
        return {"settings": dataclasses.asdict(settings) | content}

    def build(self, request: DocidRequest) -> DocidResult:
        """See DocidKind."""
        docids, collection = Docids(request.settings), request.collection
        rows_D = docids.rows(collection)
        if request.settings.text:
            vocabulary = Vocabulary(collection.vocabulary_path)
            tokens_DxL, size = text_tokens(arrow_ids.array(docids.texts), vocabulary), None
            report_long_docid(self.name, tokens_DxL, collection.ids.take(pa.array(rows_D)))
        else:
            tokens_DxL = docids.tokens()
            size = output_size(docids.length, docids.size)
        rows_D, tokens_DxL = _without_repeats(rows_D, tokens_DxL, collection.passage_count)
        if request.settings.shared_docids == "refuse":
            self._check_shared(rows_D, tokens_DxL, docids.path, collection)
        by_row = np.argsort(rows_D, kind="stable")
        is_first = np.diff(rows_D[by_row], prepend=-1) > 0
        more = by_row[~is_first]
        return DocidResult(
            tokens_DxL[np.concatenate([by_row[is_first], more])],
            size,
            extra_docid_passage_M=rows_D[more].astype(np.int32) if len(more) else None,
        )

    @staticmethod
    def _check_shared(rows_D: np.ndarray, tokens_DxL: np.ndarray, path: Path, collection: Collection) -> None:
        by_docid, shared_D = order(tokens_DxL)
        equal = np.flatnonzero(shared_D == tokens_DxL.shape[1])
        if len(equal):
            a, b = (collection.ids[int(rows_D[by_docid[at]])].as_py() for at in (equal[0] - 1, equal[0]))
            raise UserError(
                f"{path}: {len(equal):,} docids are those of other passages, as {b!r} has that of {a!r}: "
                "make them distinct, or accept it by --gin.docid_file.shared_docids=\"'list'\""
            )

    def shape(self, passages: int, vocab_size: int) -> DocidShape:
        """See DocidKind. The file is read; a text is taken to have a piece a character."""
        docids = Docids(self.settings())
        counts = collections.Counter(docids.ids)
        several = {"extra_docids": counts.total() - len(counts), "docids_per_passage": max(counts.values())}
        if docids.settings.text:
            longest = 1 + max(map(len, docids.texts))
            return DocidShape(longest, vocab_size, vocab_size, has_docid_vocab=False, **several)
        length, size, end = docids.length, docids.size, docids.has_end
        return DocidShape(length + end, output_size(length, size), size + end, **several)


def _without_repeats(
    rows_D: np.ndarray, tokens_DxL: np.ndarray, passages: int
) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out the docids that a passage has already."""
    if len(rows_D) == passages:
        return rows_D, tokens_DxL
    by_docid, shared_D = order(np.column_stack([rows_D.astype(np.int32), tokens_DxL]))
    repeats = by_docid[shared_D > tokens_DxL.shape[1]]
    if len(repeats):
        log(f"docids/file: {len(repeats):,} docids that their passages have already are left out")
    kept = np.ones(len(rows_D), bool)
    kept[repeats] = False
    return rows_D[kept], tokens_DxL[kept]
