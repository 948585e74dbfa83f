"""Docids that need no vectors: a token per passage, or the passage's id, written in pieces or digits."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar, log
from retrieval_jax.data.vocabulary import EOS, Vocabulary, round_up
from retrieval_jax.docids.kinds import DocidKind, DocidRequest, DocidResult, register_docid_kind
from retrieval_jax.docids.search_strategies import SoftmaxSearch
from retrieval_jax.docids.table import DocidShape

LONG_DOCID = 64  # a docid of more tokens than this is reported where most are much shorter


@register_docid_kind
class Atomic(DocidKind):
    """One token per passage: its row + 1, since 0 is padding (DSI, Tay et al. 2022, section 3.2).

    New passages get the next tokens. The tokens of passages that were removed are not used again.
    """

    name = "atomic"
    uses_seed = False
    search = SoftmaxSearch

    def build(self, request: DocidRequest) -> DocidResult:
        """See DocidKind."""
        numbers, assigned = _next_numbers(request)
        return DocidResult((numbers + 1).astype(np.int32)[:, None], facts={"assigned": assigned})

    extend = build

    def shape(self, passages: int, vocab_size: int) -> DocidShape:
        """See DocidKind."""
        return DocidShape(length=1, output_size=round_up(passages + 1, 128), tokens_per_position=passages)


@register_docid_kind
class Naive(DocidKind):
    """The passage's id in pieces of the text vocabulary, then the end (DSI: "naively structured" docids).

    Passages whose ids the vocabulary cannot tell apart (ids that differ in case, for example) share a docid.
    """

    name = "naive"
    uses_seed = False

    def writes_text(self, settings: object) -> bool:
        """See DocidKind."""
        return True

    def build(self, request: DocidRequest) -> DocidResult:
        """See DocidKind.

        Raises UserError where passages would share a docid because the vocabulary lacks a character.
        """
        ids, vocabulary = request.collection.ids, Vocabulary(request.collection.vocabulary_path)
        tokens_NxL = text_tokens(ids, vocabulary)
        _check_unknown_characters(tokens_NxL, ids, vocabulary.model.unk_id())
        report_long_docid(self.name, tokens_NxL, ids)
        return DocidResult(tokens_NxL)

    def extend(self, request: DocidRequest) -> DocidResult:
        """See DocidKind: a new table of naive docids is the same as an extended one."""
        raise UserError("EXTENDS: naive docids are the ids, which do not move: leave it out")

    def shape(self, passages: int, vocab_size: int) -> DocidShape:
        """See DocidKind.

        The vocabulary writes a number in at most one piece a digit (T5's takes 5 pieces for 7 digits), of at
        most three digits each.
        """
        length, pieces = len(str(passages - 1)) + 1, 10 + 100 + 1000
        return DocidShape(length, vocab_size, tokens_per_position=1 + pieces, has_docid_vocab=False)


def text_tokens(texts: pa.Array, vocabulary: Vocabulary) -> np.ndarray:
    """Writes texts as docids in pieces of the text vocabulary, then the end: int32 N×L, padded with 0."""

    def parts() -> Iterator[np.ndarray]:
        for batch in _batches(texts):
            docids = vocabulary.model.encode(batch, add_eos=True)
            longest = max(map(len, docids))
            yield np.array([d + [0] * (longest - len(d)) for d in docids], np.int32)

    return _stack(parts())


def _check_unknown_characters(tokens_NxL: np.ndarray, ids: pa.Array, unknown: int) -> None:
    """Raises UserError where docids are equal because the vocabulary lacks characters of the ids."""
    rows = np.flatnonzero((tokens_NxL == unknown).any(axis=1))
    distinct, counts = np.unique(tokens_NxL[rows], axis=0, return_counts=True)
    if len(distinct) == len(rows):
        return
    shared = (tokens_NxL[rows] == distinct[counts.argmax()]).all(axis=1)
    a, b = ids.take(pa.array(rows[shared][:2])).to_pylist()
    sharing = int(counts[counts > 1].sum())
    raise UserError(
        f"DOCIDS: the vocabulary cannot write {len(rows):,} of the ids, and {sharing:,} passages would share "
        f"a docid for that (as {a!r} and {b!r}): take naive_digits or atomic docids, or "
        "import with a vocabulary that is learned on the collection (VOCABULARY=None)"
    )


def report_long_docid(kind: str, tokens_NxL: np.ndarray, ids: pa.Array) -> None:
    """Reports a docid that is much longer than most: every row of the table, and every target, is as wide.

    Args:
      kind: the docid kind.
      tokens_NxL: the docids, padded with 0.
      ids: the passage of each docid.
    """
    lengths = np.count_nonzero(tokens_NxL, axis=1)
    longest, usual = int(lengths.max(initial=0)), int(np.median(lengths)) if len(lengths) else 0
    if longest > max(LONG_DOCID, 4 * usual):
        row = int(lengths.argmax())
        log(
            f"docids/{kind}: the docid of passage {ids[row].as_py()[:40]!r} has {longest} tokens, and "
            f"{usual} are usual: all targets are padded to that, so training is slower; a shorter one would "
            "mend it"
        )


@register_docid_kind
class NaiveDigits(DocidKind):
    """The id, if all ids are decimal numbers, else the row number: a token 2 + digit each, then the end."""

    name = "naive_digits"
    uses_seed = False

    def build(self, request: DocidRequest) -> DocidResult:
        """See DocidKind.

        Raises UserError where a table whose docids are the ids is extended by ids that are no numbers.
        """
        decimal = pc.all(pc.match_substring_regex(request.collection.ids, "^[0-9]+$")).as_py()
        use_ids = request.previous.manifest["ids"] if request.previous else decimal
        if use_ids and not decimal:
            raise UserError("EXTENDS: its docids are the ids, and now not all ids are numbers: leave it out")
        if use_ids:
            texts, facts = request.collection.ids.take(pa.array(request.rows)), {"ids": True}
        else:
            numbers, assigned = _next_numbers(request)
            texts, facts = arrow_ids.array(pa.array(numbers)), {"ids": False, "assigned": assigned}

        def parts() -> Iterator[np.ndarray]:
            for batch in _batches(texts):
                ascii_N = np.array(batch, "S")
                tokens_NxL = np.zeros((len(batch), ascii_N.itemsize + 1), np.uint8)
                tokens_NxL[:, :-1] = ascii_N[:, None].view(np.uint8)
                tokens_NxL[tokens_NxL > 0] -= ord("0") - 2
                tokens_NxL[np.arange(len(batch)), np.char.str_len(ascii_N)] = EOS
                yield tokens_NxL

        return DocidResult(_stack(parts()), facts=facts)

    extend = build

    def shape(self, passages: int, vocab_size: int) -> DocidShape:
        """See DocidKind."""
        return DocidShape(len(str(passages - 1)) + 1, output_size=128, tokens_per_position=1 + 10)


def _next_numbers(request: DocidRequest) -> tuple[np.ndarray, int]:
    """Numbers the passages that need a docid, going on after all numbers that were ever assigned.

    Returns:
      (numbers int64, one for each of `request.rows`; the count of numbers that are assigned now).
    """
    assigned = request.previous.manifest["assigned"] if request.previous else 0
    return np.arange(assigned, assigned + len(request.rows)), assigned + len(request.rows)


def _batches(texts: pa.Array) -> Iterator[list[str]]:
    """Yields the texts in batches, with a progress bar."""
    with bar("naive docids", len(texts)) as advance:
        for batch in arrow_ids.batches(texts):
            yield batch
            advance(len(batch))


def _stack(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Joins docids of different lengths, padded with 0 to the longest."""
    parts = [*parts] or [np.zeros((0, 1), np.uint8)]
    shape = sum(map(len, parts)), max(part.shape[1] for part in parts)
    stacked, first = np.zeros(shape, parts[0].dtype), 0
    for part in parts:
        stacked[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return stacked
