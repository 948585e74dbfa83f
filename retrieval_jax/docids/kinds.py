"""The verb `docids`: gives every passage of a collection its token sequence."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax.sharding import Mesh

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar, log
from retrieval_jax.core.values import Names
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary, round_up
from retrieval_jax.docids import residual, semantic
from retrieval_jax.docids.table import DocidTable

LONG = 64  # tokens from which on a single long docid is told of


@dataclasses.dataclass(frozen=True)
class Earlier:
    """A table of an earlier state of the collection, whose docids stay."""

    folder: Path
    manifest: dict
    table: DocidTable

    @classmethod
    def open(cls, folder: str, kind: str) -> "Earlier":
        """Raises UserError where it is not a table of that kind."""
        table = DocidTable.open(folder)
        if table.kind != kind:
            raise UserError(f"EXTENDS: {folder}: holds {table.kind} docids: name a table of {kind} docids")
        return cls(paths.as_path(folder), storage.read_manifest(folder, "docids"), table)


@dataclasses.dataclass(frozen=True)
class Job:
    """What docids are made of. `vectors` (N×E) and `settings` are there for the clustered kinds.

    Clusters are computed on the `mesh` (None: on all devices).
    """

    collection: Collection
    earlier: Earlier | None = None
    vectors: np.ndarray | None = None
    settings: semantic.Settings | residual.Settings | None = None
    seed: int = 0
    mesh: Mesh | None = None

    @functools.cached_property
    def earlier_rows(self) -> np.ndarray:
        """int64: the row of each passage in the earlier table, -1 where it is not there."""
        if self.earlier is None:
            return np.full(self.collection.passage_count, -1)
        return arrow_ids.find_rows(self.earlier.table.passage_ids, self.collection.ids)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The passages that need a docid."""
        return np.flatnonzero(self.earlier_rows < 0)

    def table(self, kind: str, made: "Made") -> DocidTable:
        """Docids of all passages: the earlier ones as they were, the made ones of the others."""
        tokens_NxL, ancestors = made.tokens_NxL, ()
        if self.earlier:
            old, new = self.earlier.table, made.tokens_NxL
            ancestors = (old.fingerprint(), *old.ancestors)
            dtype = max(old.tokens_NxL.dtype, new.dtype, key=lambda dtype: dtype.itemsize)
            tokens_NxL = np.zeros((self.collection.passage_count, max(old.length, new.shape[1])), dtype)
            kept = self.earlier_rows >= 0
            tokens_NxL[kept, : old.length] = old.tokens_NxL[self.earlier_rows[kept]]
            tokens_NxL[~kept, : new.shape[1]] = new
        size = made.output_size(tokens_NxL.shape[1])
        collection = self.collection
        return DocidTable(
            kind, tokens_NxL, collection.ids, size, collection.fingerprint, ancestors, made.vocabulary
        )


@dataclasses.dataclass(frozen=True)
class Made:
    """Docids of `Job.rows`; the softmax's width for docids of a length; what the manifest shall say."""

    tokens_NxL: np.ndarray
    output_size: Callable[[int], int]
    facts: dict
    write: Callable[[Path], object] = lambda folder: None  # what was fitted, beside the table
    vocabulary: str | None = None  # of a text vocabulary whose pieces they are, its checksum


def atomic(job: Job) -> Made:
    """One token a passage: row + 1, since 0 is padding. The softmax is padded to a multiple of 128.

    New passages take the next tokens; those of passages that went are not given again.
    """
    numbers, assigned = _numbers(job)
    tokens_Nx1 = (numbers + 1).astype(np.int32)[:, None]
    return Made(tokens_Nx1, lambda _: round_up(assigned + 1, 128), {"assigned": assigned})


def naive(job: Job) -> Made:
    """The passage's id string through the text vocabulary, then end of sequence.

    Ids that the vocabulary writes alike (by case folding, say) share a docid; so may two passages. Raises
    UserError where they would because the vocabulary lacks a character of theirs.
    """
    if job.earlier:
        raise UserError("EXTENDS: naive docids are the ids, which do not move: leave it out")
    vocabulary = Vocabulary(job.collection.vocabulary_path)

    def parts() -> Iterable[np.ndarray]:
        for some in _batches(job.collection.ids):
            docids = vocabulary.model.encode(some, add_eos=True)
            longest = max(map(len, docids))
            yield np.array([d + [0] * (longest - len(d)) for d in docids], np.int32)

    tokens_NxL = _stack(parts())
    _refuse_unwritable_ids(tokens_NxL, job.collection.ids, vocabulary.model.unk_id())
    _warn_of_long_docid(tokens_NxL, job.collection.ids)
    return Made(tokens_NxL, lambda _: vocabulary.size, {}, vocabulary=vocabulary.checksum)


def _refuse_unwritable_ids(tokens_NxL: np.ndarray, ids: pa.Array, unknown: int) -> None:
    """Raises UserError where docids are alike for a character that the vocabulary does not know."""
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


def _warn_of_long_docid(tokens_NxL: np.ndarray, ids: pa.Array) -> None:
    """Says so where one id is much longer than most: every row of the table, and every target, is as wide."""
    lengths = np.count_nonzero(tokens_NxL, axis=1)
    longest, usual = int(lengths.max(initial=0)), int(np.median(lengths)) if len(lengths) else 0
    if longest > max(LONG, 4 * usual):
        row = int(lengths.argmax())
        log(
            f"docids/naive: the docid of passage {ids[row].as_py()[:40]!r} has {longest} tokens, and {usual} "
            "are usual: all targets are padded to that, so training is slower; a shorter id would mend it"
        )


def naive_digits(job: Job) -> Made:
    """The id if every id is a decimal number, else the row's number: 2 + digit a token, then the end."""
    decimal = pc.all(pc.match_substring_regex(job.collection.ids, "^[0-9]+$")).as_py()
    ids = job.earlier.manifest["ids"] if job.earlier else decimal
    if ids and not decimal:
        raise UserError("EXTENDS: its docids are the ids, and now not all ids are numbers: leave it out")
    if ids:
        texts, facts = job.collection.ids.take(pa.array(job.rows)), {"ids": True}
    else:
        numbers, assigned = _numbers(job)
        texts, facts = arrow_ids.array(pa.array(numbers)), {"ids": False, "assigned": assigned}

    def parts() -> Iterable[np.ndarray]:
        for some in _batches(texts):
            ascii_N = np.array(some, "S")
            tokens_NxL = np.zeros((len(some), ascii_N.itemsize + 1), np.uint8)
            tokens_NxL[:, :-1] = ascii_N[:, None].view(np.uint8)
            tokens_NxL[tokens_NxL > 0] -= ord("0") - 2
            tokens_NxL[np.arange(len(some)), np.char.str_len(ascii_N)] = EOS
            yield tokens_NxL

    return Made(_stack(parts()), lambda _: round_up(2 + 10, 128), facts)


def _numbers(job: Job) -> tuple[np.ndarray, int]:
    """(numbers of the passages that need one, how many numbers were then ever given)."""
    assigned = job.earlier.manifest["assigned"] if job.earlier else 0
    return np.arange(assigned, assigned + len(job.rows)), assigned + len(job.rows)


def _batches(ids: pa.Array) -> Iterable[list[str]]:
    with bar("naive docids", len(ids)) as advance:
        for some in arrow_ids.batches(ids):
            yield some
            advance(len(some))


def _stack(parts: Iterable[np.ndarray]) -> np.ndarray:
    """One below the other, padded with 0 to the longest docid."""
    parts = [*parts] or [np.zeros((0, 1), np.uint8)]
    shape = sum(map(len, parts)), max(part.shape[1] for part in parts)
    stacked, first = np.zeros(shape, parts[0].dtype), 0
    for part in parts:
        stacked[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return stacked


def _semantic(job: Job, two_d: bool) -> Made:
    """See semantic.py. New passages descend the fitted tree, and take the next numbers of their leaves."""
    if job.earlier:
        settings = semantic.Settings(**job.earlier.manifest["settings"])
        tree = semantic.Tree.open(job.earlier.folder)
        _check_dimensions(job, tree.centroids_MxE)
        leaves = tree.descend(job.vectors, job.rows)
    else:
        settings = job.settings
        tree, leaves = semantic.grow(job.vectors, settings, job.seed, job.mesh)
    tokens_NxL = semantic.tokens(
        tree, leaves, tree.take_leaf_indices(leaves), settings.clusters_per_node, two_d
    )
    size = functools.partial(semantic.output_size, base=settings.clusters_per_node, two_d=two_d)
    facts = {"settings": dataclasses.asdict(settings), "clusters": len(tree.next_index_M)}
    return Made(tokens_NxL, size, facts, tree.write)


def _residual(job: Job, levels: int, size: int) -> Made:
    """See residual.py. New passages get codes of the fitted codebooks, and the next numbers within them."""
    if job.earlier:
        settings = residual.Settings(**job.earlier.manifest["settings"])
        books = residual.Codebooks.open(job.earlier.folder)
        _check_dimensions(job, books.vectors_LxVxE)
        old = residual.codes(job.earlier.table.tokens_NxL, levels, size)
    else:
        settings = job.settings
        books = residual.fit(job.vectors, levels, size, job.seed, job.mesh)
        old = None
    codes, errors = books.encode(job.vectors, job.rows, job.mesh)
    numbers = residual.numbers(codes, *(old or (codes[:0], np.zeros(0, np.int64))))
    if old:
        digits = job.earlier.table.length - levels
    else:
        numbered = settings.shared_codes == "token"
        digits = residual.digits_needed(int(numbers.max()) if numbered else 0, size)
    last = size**digits - 1
    sharing = int((numbers > last).sum())
    if sharing and settings.shared_codes == "token":
        log(f"{sharing} new passages share a docid: the table that is extended has no numbers left for them")
    facts = {
        "settings": dataclasses.asdict(settings),
        "codes": books.sizes_L.tolist(),
        "reconstruction_error": (errors[1:] / max(errors[0], 1e-30)).tolist(),
        "collisions": sharing,
    }
    tokens_NxL = residual.tokens(codes, np.minimum(numbers, last), digits, size)
    return Made(tokens_NxL, functools.partial(residual.output_size, size=size), facts, books.write)


def _check_dimensions(job: Job, fitted: np.ndarray) -> None:
    if job.vectors.shape[-1] != fitted.shape[-1]:
        raise UserError(
            f"EMBEDDINGS: vectors of {job.vectors.shape[-1]} dimensions, but {job.earlier.folder} was made "
            f"of {fitted.shape[-1]}: use the same model's"
        )


BY_ID = {maker.__name__: maker for maker in (atomic, naive, naive_digits)}
KIND = Names("a kind of docids", (*BY_ID, "semantic", "semantic_2d", "rq_LxV"))


def maker_of(kind: str | None) -> tuple[Callable[[Job], Made], type | None]:
    """(what makes docids of a kind, the class of its settings). UserError for a kind that does not exist."""
    if kind in BY_ID:
        return BY_ID[kind], None
    if kind in ("semantic", "semantic_2d"):
        return functools.partial(_semantic, two_d=kind == "semantic_2d"), semantic.Settings
    if match := re.fullmatch(r"rq_([1-9]\d*)x([1-9]\d*)", kind or ""):
        levels, size = map(int, match.groups())
        if size > 1:
            return functools.partial(_residual, levels=levels, size=size), residual.Settings
    kinds = ", ".join([*BY_ID, "semantic", "semantic_2d"])
    raise UserError(f"DOCIDS: no kind {kind!r}: choose one of {kinds}, or rq_LxV (L codes of V, as rq_8x256)")
