"""Making the docid table of a collection by a kind, and writing it with the report of its quality."""

import dataclasses
from pathlib import Path

import numpy as np

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import Vocabulary, round_up
from retrieval_jax.docids import quality
from retrieval_jax.docids.kinds import DocidKind, DocidRequest, DocidResult
from retrieval_jax.docids.table import DocidTable


def make_table(kind: DocidKind, request: DocidRequest) -> tuple[DocidTable, DocidResult]:
    """Makes the docid table of a collection.

    Args:
      kind: the docid kind.
      request: what it makes docids from; with `request.previous`, that table is extended.

    Returns:
      (table: docids of all passages, row by row as the collection; where a table is extended, its passages'
      docids as they were; result: what the kind made, only for `request.rows`).

    Raises:
      UserError: the kind has no docids for this collection, or what it made is not a row of tokens for each
        of `request.rows`.
    """
    collection, previous = request.collection, request.previous
    result = kind.extend(request) if previous else kind.build(request)
    tokens_NxL, output_size, ancestors = _checked_tokens(kind, request, result), result.output_size, ()
    vocabulary = Vocabulary(collection.vocabulary_path) if kind.writes_text(request.settings) else None
    if output_size is None:
        output_size = vocabulary.size if vocabulary else round_up(int(tokens_NxL.max(initial=0)) + 1, 128)
    if previous:
        tokens_NxL = _with_previous(tokens_NxL, request)
        output_size = max(output_size, previous.table.output_size)
        ancestors = (previous.table.fingerprint(), *previous.table.ancestors)
    table = DocidTable(
        kind=kind.name,
        tokens_NxL=tokens_NxL,
        passage_ids=collection.ids,
        output_size=output_size,
        collection=collection.fingerprint,
        ancestors=ancestors,
        vocabulary=vocabulary.checksum if vocabulary else None,
        search=kind.search.name,
        extra_docid_passage_M=result.extra_docid_passage_M,
    )
    return table, result


def _checked_tokens(kind: DocidKind, request: DocidRequest, result: DocidResult) -> np.ndarray:
    """Returns the tokens that a kind made. Raises UserError if they are not whole numbers, row by row."""
    tokens_NxL, method = np.asarray(result.tokens_NxL), "extend" if request.previous else "build"
    if tokens_NxL.ndim != 2:
        raise UserError(
            f"docids/{kind.name}: tokens of shape {tokens_NxL.shape}: {method} gives passages × length"
        )
    more = 0 if result.extra_docid_passage_M is None else len(result.extra_docid_passage_M)
    if len(tokens_NxL) != len(request.rows) + more:
        raise UserError(
            f"docids/{kind.name}: {len(tokens_NxL):,} rows of tokens for {len(request.rows):,} passages: "
            f"{method} gives one row for each of request.rows, and for each of extra_docid_passage_M"
        )
    if tokens_NxL.dtype.kind not in "iu":
        raise UserError(f"docids/{kind.name}: tokens are {tokens_NxL.dtype}: give whole numbers")
    return tokens_NxL


def _with_previous(new_tokens: np.ndarray, request: DocidRequest) -> np.ndarray:
    """Joins the docids of the previous table and the new ones, in the order of the collection."""
    old = request.previous.table
    dtype = max(old.tokens_NxL.dtype, new_tokens.dtype, key=lambda dtype: dtype.itemsize)
    tokens_NxL = np.zeros((request.collection.passage_count, max(old.length, new_tokens.shape[1])), dtype)
    kept = request.previous_rows >= 0
    tokens_NxL[kept, : old.length] = old.tokens_NxL[request.previous_rows[kept]]
    tokens_NxL[~kept, : new_tokens.shape[1]] = new_tokens
    return tokens_NxL


def write_docids(kind: DocidKind, request: DocidRequest, folder: Path) -> dict:
    """Makes a docid table and writes it into a folder, with quality.json, quality.png and what was fitted.

    Args:
      kind: the docid kind.
      request: what it makes docids from.
      folder: an empty folder.

    Returns:
      What the folder's manifest shall say: the table's facts, the kind's, the settings, and the table's
      quality.

    Raises:
      UserError: as `make_table`; or the docids are not those of a table; or a fact of the kind has a name of
        the manifest's own.
    """
    table, result = make_table(kind, request)
    table.check()
    result.write(folder)
    report = quality.report(table, request.vectors, seed=request.seed)
    storage.write_json(folder / "quality.json", report)
    quality.plot(report, folder / "quality.png")
    settings = {"settings": dataclasses.asdict(request.settings)} if kind.settings else {}
    facts, more = table.write(folder), settings | _quality_facts(request, report)
    if clashes := sorted(result.facts.keys() & {*facts, *more, "recipe"}):
        raise UserError(
            f"docids/{kind.name}: facts {', '.join(clashes)}: the manifest has entries of these names: "
            "choose others"
        )
    return facts | result.facts | more


def _quality_facts(request: DocidRequest, report: dict) -> dict:
    """Returns the manifest's entries about quality, and how many passages came and went."""
    facts = {"tokens_to_uniqueness": report["tokens_to_uniqueness"]["mean"]}
    if "neighbours" in report:
        facts["neighbour_prefix_overlap"] = report["neighbours"]["ratio"]  # relative to docids at random
    if request.previous:
        kept = request.collection.passage_count - len(request.rows)
        removed = len(request.previous.table.passage_ids) - kept
        facts["extension"] = {"kept": kept, "added": len(request.rows), "removed": removed}
    return facts
