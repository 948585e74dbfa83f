"""From a source to a `collection` folder: splits, subset, records, vocabulary and the manifest's facts.

source -> passages and queries, checked -> subset, dev split -> records, ids, copies, vocabulary
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.progress import log
from retrieval_jax.data import copies, subsets, vocabulary
from retrieval_jax.data.collection import Query, read_passages, write_passages, write_queries
from retrieval_jax.data.records import Records
from retrieval_jax.data.sources.folders import Source
from retrieval_jax.data.sources.lines import ErrorLog
from retrieval_jax.data.sources.passages import Passages

LAYOUT = 4  # of the collection folder: folders of another one are made again
_BATCH = 1024  # passages read at once


@dataclasses.dataclass(frozen=True)
class ImportSettings:
    """How a source becomes a collection.

    Attributes:
      vocabulary_path: a SentencePiece model to copy; None learns one.
      vocab_size: pieces of a learned vocabulary.
      held_out: where there are train but no dev queries, this share of them becomes dev.
      skip_errors: whether bad lines are left out and counted; otherwise the first one ends the import.
      subset: the number of passages to keep; None for all.
      subset_seed: the seed of the random choice of the subset.
      shard_bytes: about how many bytes of source text go into a file of records.
      beam_options: flags of a Beam runner that writes the records; () for this machine's cores.
    """

    vocabulary_path: str | None
    vocab_size: int
    held_out: float
    skip_errors: bool
    subset: int | None
    subset_seed: int
    shard_bytes: int
    beam_options: tuple[str, ...] = ()

    def recipe(self) -> dict:
        """Returns the part of the manifest's recipe that the settings are, without what changes nothing."""
        given = self.vocabulary_path
        recipe = {
            "held_out": self.held_out,
            "vocabulary": vocabulary.Vocabulary(given).checksum if given else self.vocab_size,
            "on_error": "skip" if self.skip_errors else "fail",
            "shard_bytes": self.shard_bytes,
        }
        if not given:  # collections whose vocabulary was learned without it are made anew
            recipe |= {"split_punctuation": True}
        if self.subset is not None:
            recipe |= {"subset": self.subset, "subset_seed": self.subset_seed}
        return recipe


def source_recipe(source: Source) -> dict:
    """Returns the part of the manifest's recipe that the source is: its name and its files.

    Size and time of the files stand for their contents. A source without files (`python_docs`) stays as it is
    once it was imported, also when packages are upgraded.
    """
    stats = [(str(file.resolve()), file.stat()) for file in source.files]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return {"layout": LAYOUT, "source": source.name, "files": files}


def write_collection(folder: Path, source: Source, settings: ImportSettings) -> dict:
    """Reads a source and writes the collection's files into an empty folder.

    Args:
      folder: an empty local folder.
      source: the source.
      settings: how it becomes a collection.

    Returns:
      The facts that `Collection` reads from the manifest, and what was read, left out and written.

    Raises:
      UserError: a line of the source is bad (unless `skip_errors`), the subset is too small for the passages
        that are relevant to dev and test queries, or no vocabulary can be learned.
    """
    scratch, errors = folder / "scratch", ErrorLog(skip=settings.skip_errors)
    passages = source.passages(scratch, errors, settings.shard_bytes)
    queries = source.queries(functools.partial(arrow_ids.find_rows, passages.ids), errors)
    errors.raise_first()
    errors.report()
    queries, without_positives = leave_out_unanswerable(queries)
    facts = {
        "name": source.name,
        "skipped": dict(errors.counts),
        "without_positives": without_positives,
    }
    queries = hold_out_dev(queries, settings.held_out)
    if settings.subset is not None:
        chosen = _subset(passages, queries, settings.subset, settings.subset_seed)
        passages, queries, facts["subset"] = chosen

    write_passages(folder, source.name, passages.shards(), settings.beam_options)
    arrow_ids.write(folder / "ids.arrow", passages.ids)
    np.save(folder / "copies.npy", same := copies.find_copies(passages.digests))
    queries = {
        split: _mark_passages(judged, passages.ids, folder, source.name) for split, judged in queries.items()
    }
    write_queries(folder, source.name, queries)
    _write_vocabulary(folder / "sentencepiece.model", settings, passages, queries)
    shutil.rmtree(scratch, ignore_errors=True)
    records = sorted((folder / source.name).rglob("*.array_record-*"))
    checksums = _checksums([*source.files, *records])
    return facts | {
        "passages": len(passages.ids),
        "copies": len(same),
        "queries": {split: len(judged) for split, judged in queries.items()},
        "fingerprint": passages.fingerprint(),
        "query_fingerprints": {split: _digest(judged) for split, judged in queries.items()},
        "files": {str(file): checksums[file] for file in source.files},
        "records": {str(file.relative_to(folder)): checksums[file] for file in records},
    }


def leave_out_unanswerable(
    queries: Mapping[str, list[Query]],
) -> tuple[dict[str, list[Query]], dict[str, int]]:
    """Leaves out train queries without a positive passage, from which nothing is learned.

    Such queries of other splits stay: they count 0 in every mean, as trec_eval counts them with `-c`. A line
    on stderr says how many there are.

    Args:
      queries: split -> its queries.

    Returns:
      (split -> the queries that are kept, without empty splits; split -> the number of such queries).
    """
    counts = {split: sum(not query.positives for query in judged) for split, judged in queries.items()}
    counts = {split: count for split, count in counts.items() if count}
    for split, count in counts.items():
        what = "left out" if split == "train" else "they count 0 in evaluations"
        log(f"{split}: {count:,} of {len(queries[split]):,} judged queries have no relevant passage: {what}")
    kept = {
        split: [query for query in judged if query.positives or split != "train"]
        for split, judged in queries.items()
    }
    return {split: judged for split, judged in kept.items() if judged}, counts


def hold_out_dev(queries: dict[str, list[Query]], held_out: float) -> dict[str, list[Query]]:
    """Moves train queries to a dev split, unless there is one already or there are no train queries.

    Args:
      queries: split -> its queries.
      held_out: the share of train queries to move. A hash of its id alone decides whether a query moves.

    Returns:
      Split -> its queries, without empty splits.
    """
    if "dev" in queries or "train" not in queries:
        return queries
    held = [storage.hash_fraction(q.id) < held_out for q in queries["train"]]
    split = {
        "train": [q for q, dev in zip(queries["train"], held, strict=True) if not dev],
        "dev": [q for q, dev in zip(queries["train"], held, strict=True) if dev],
    }
    return {name: judged for name, judged in {**queries, **split}.items() if judged}


def _subset(
    passages: Passages, queries: dict[str, list[Query]], size: int, seed: int
) -> tuple[Passages, dict[str, list[Query]], dict]:
    """Returns the chosen passages, the queries that they answer, and the manifest's facts about both."""
    rows = functools.partial(arrow_ids.find_rows, passages.ids)
    chosen = passages.subset(subsets.choose(len(passages.ids), queries, rows, size, seed))
    kept = subsets.keep(queries, functools.partial(arrow_ids.find_rows, chosen.ids))
    dropped = {split: len(judged) - len(kept.get(split, [])) for split, judged in queries.items()}
    return chosen, kept, {"of_passages": len(passages.ids), "seed": seed, "dropped_queries": dropped}


def _mark_passages(queries: Sequence[Query], ids: pa.Array, folder: Path, name: str) -> list[Query]:
    """Finds the queries that are passages themselves (`Query.is_passage`). The passages are written already.

    Args:
      queries: the queries.
      ids: the ids of the passages, by row.
      folder: the collection's folder.
      name: the name of the dataset.

    Returns:
      The queries, in their order.
    """
    rows = arrow_ids.find_rows(ids, [query.id for query in queries]).tolist()
    found = [i for i, query in enumerate(queries) if rows[i] >= 0 and query.id not in query.relevant]
    marked = [*queries]
    records = Records(folder, name, "passages", "train") if found else None
    for first in range(0, len(found), _BATCH):
        some = found[first : first + _BATCH]
        for i, passage in zip(some, read_passages(records, [rows[i] for i in some]), strict=True):
            if copies.same_text(queries[i], passage):
                marked[i] = dataclasses.replace(queries[i], is_passage=True)
    return marked


def _write_vocabulary(
    path: Path, settings: ImportSettings, passages: Passages, queries: Mapping[str, list[Query]]
) -> None:
    """Copies the vocabulary that was given, or learns one."""
    if given := settings.vocabulary_path:
        vocabulary.Vocabulary(given)  # raises UserError where it is none
        paths.copy(paths.as_path(given), path)
        return
    log(f"learning a vocabulary of {settings.vocab_size} pieces")
    # Of a large collection, neither the queries nor the ids crowd out the texts.
    train = itertools.islice((q.text for q in queries.get("train", [])), vocabulary.MAX_TEXTS // 4)
    ids = passages.ids[: vocabulary.MAX_TEXTS // 4].to_pylist()
    texts = (p.full_text for part in passages.shards() for p in part())
    learned_on = itertools.chain(train, ids, texts)
    # Naive docids are the ids: one whose rare character had no piece could not be told from others.
    some = (passages.ids[first : first + _BATCH] for first in range(0, len(passages.ids), _BATCH))
    required = (" ".join(batch.to_pylist()) for batch in some)
    vocabulary.learn(learned_on, settings.vocab_size, path, required)


def _digest(judged: Sequence[Query]) -> str:
    """Returns a digest of queries, in their order."""
    return storage.digest(
        part
        for q in judged
        for part in (q.id, q.text, str(q.positives), " ".join(q.negatives), q.label, str(q.missing))
    )


def _checksums(files: list[Path]) -> dict[Path, str]:
    """Returns the SHA-256 of each file."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        return dict(zip(files, threads.map(storage.checksum, files), strict=True))
