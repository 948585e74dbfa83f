"""The verb `import`: any source of passages and queries becomes a `collection` folder."""

import concurrent.futures
import functools
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

import gin
import numpy as np

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Fraction, Positive, Seed
from retrieval_jax.core.workspace import Workspace, source_path
from retrieval_jax.data import copies, parallel, subsets, vocabulary
from retrieval_jax.data.collection import Query
from retrieval_jax.data.records import mark_passages, write_passages, write_queries
from retrieval_jax.data.sources import from_packages
from retrieval_jax.data.sources.folders import Source
from retrieval_jax.data.sources.layouts import open_source
from retrieval_jax.data.sources.lines import ErrorLog
from retrieval_jax.data.sources.passages import Passages
from retrieval_jax.data.sources.python_docs import PACKAGES

LAYOUT = 3  # of the collection folder: folders of another one are made anew


@gin.configurable
def import_collection(
    source: str,
    work_dir: str | None = None,
    vocabulary_path: str | None = None,
    vocab_size: Positive = 8000,
    held_out: Fraction = 0.05,
    on_error: str = "fail",
    subset: Positive | None = None,
    subset_seed: Seed = 0,
    shard_bytes: Positive = 32 << 20,
    beam_options: tuple[str, ...] = (),
    docs_size: Positive = 5000,
    docs_packages: tuple[str, ...] = PACKAGES,
) -> dict:
    """Writes the records and the vocabulary of a collection, once.

    Args:
      source: `python_docs` (embedded), `ir_datasets:ID` or `ir_datasets:ID,ID` (splits of one corpus), or a
        folder in the layout of BEIR, TSV, MS MARCO, NCI or Tevatron.
      work_dir: where everything made of this collection goes; None is `work/NAME`.
      vocabulary_path: a SentencePiece model to use; None learns one on passages, their ids and train queries.
      vocab_size: pieces of a learned vocabulary.
      held_out: where there are train but no dev queries, this share of them, chosen by a hash of the id,
        becomes dev.
      on_error: a bad line ends the import ("fail") or is left out and counted ("skip").
      subset: passages to keep: those relevant to dev and test queries, then to train queries, then others, in
        a random order that `subset_seed` sets; None is all.
      shard_bytes: about how much source text goes into a file of records (MS MARCO's 3 GB into 94 files).
      beam_options: flags of a Beam runner that shall write the records instead of this machine's cores, as in
        ("--runner=FlinkRunner", …); its workers must share this file system.
      docs_size, docs_packages: most passages of `python_docs`, and the packages that they come from.
    """
    if on_error not in ("fail", "skip"):
        raise UserError(f"ON_ERROR: no way {on_error!r} to treat bad lines: choose 'fail' or 'skip'")
    path = Workspace.for_source(source, work_dir).collection
    parallel.check_beam_options(beam_options, path)
    opened = _open(source, docs_size, docs_packages)
    # Size and time of the files stand for their contents. The embedded collection has no files: once made,
    # it stays as it is, also when packages are upgraded.
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in opened.files]
    recipe = {"layout": LAYOUT, "source": opened.name, "files": stats, "held_out": held_out}
    given = vocabulary.Vocabulary(vocabulary_path).checksum if vocabulary_path else vocab_size
    recipe |= {"vocabulary": given, "on_error": on_error, "shard_bytes": shard_bytes}
    if subset is not None:
        recipe |= {"subset": subset, "subset_seed": subset_seed}
    if not opened.files:
        recipe |= {"source": source}
    if source == from_packages.PYTHON_DOCS:
        recipe |= {"docs_size": docs_size, "docs_packages": docs_packages}

    def make(folder: Path) -> dict:
        scratch, errors = folder / "scratch", ErrorLog(skip=on_error == "skip")
        passages = opened.passages(scratch, errors, shard_bytes)
        queries = opened.queries(functools.partial(arrow_ids.find_rows, passages.ids), errors)
        errors.report()
        queries, without_positives = answerable(queries)
        facts = {
            "name": opened.name,
            "source": source,
            "source_path": source_path(source),
            "skipped": dict(errors.counts),
            "without_positives": without_positives,
        }
        queries = with_dev(queries, held_out)
        if subset is not None:
            passages, queries, facts["subset"] = _subset(passages, queries, subset, subset_seed)

        write_passages(folder, opened.name, passages.shards(), beam_options)
        arrow_ids.write(folder / "ids.arrow", passages.ids)
        np.save(folder / "copies.npy", same := copies.pairs(passages.digests))
        queries = {
            split: mark_passages(folder, opened.name, passages.ids, some) for split, some in queries.items()
        }
        write_queries(folder, opened.name, queries)
        _vocabulary(folder / "sentencepiece.model", vocabulary_path, vocab_size, passages, queries)
        shutil.rmtree(scratch, ignore_errors=True)
        records = sorted((folder / opened.name).rglob("*.array_record-*"))
        checksums = _checksums([*opened.files, *records])
        return facts | {
            "passages": len(passages.ids),
            "copies": len(same),
            "queries": {split: len(judged) for split, judged in queries.items()},
            "fingerprint": storage.digest([passages.fingerprint(), *_query_digests(queries)]),
            "files": {str(file): checksums[file] for file in opened.files},
            "records": {str(file.relative_to(folder)): checksums[file] for file in records},
        }

    manifest = storage.build_once(path, recipe, make)
    shown = ("name", "passages", "copies", "queries", "skipped", "without_positives", "subset")
    return {"collection": str(path), **{key: manifest[key] for key in shown if manifest.get(key)}}


def _open(source: str, docs_size: int, docs_packages: tuple[str, ...]) -> Source:
    if source == from_packages.PYTHON_DOCS:
        return from_packages.python_docs_source(docs_size, docs_packages)
    if source.startswith(from_packages.IR_DATASETS):
        return from_packages.ir_datasets_source(source.removeprefix(from_packages.IR_DATASETS))
    paths.require_local(source, "a source")
    return open_source(paths.as_path(source))


def answerable(queries: Mapping[str, list[Query]]) -> tuple[dict[str, list[Query]], dict[str, int]]:
    """Leaves out train queries without a positive passage, of which nothing is learned.

    Those of other splits stay, and count 0 in every mean, as trec_eval counts them with `-c`. Says how many
    there are, and gives (split -> queries, split -> how many).
    """
    counts = {split: sum(not query.positives for query in some) for split, some in queries.items()}
    counts = {split: count for split, count in counts.items() if count}
    for split, count in counts.items():
        what = "left out" if split == "train" else "they count 0 in evaluations"
        log(f"{split}: {count:,} of {len(queries[split]):,} judged queries have no relevant passage: {what}")
    kept = {
        split: [query for query in some if query.positives or split != "train"]
        for split, some in queries.items()
    }
    return {split: some for split, some in kept.items() if some}, counts


def with_dev(queries: dict[str, list[Query]], held_out: float) -> dict[str, list[Query]]:
    """Takes dev queries out of the train queries, unless there are dev queries or no train queries."""
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
    """The chosen passages, the queries that they answer, and what the manifest says of both."""
    rows = functools.partial(arrow_ids.find_rows, passages.ids)
    chosen = passages.subset(subsets.choose(len(passages.ids), queries, rows, size, seed))
    kept = subsets.keep(queries, functools.partial(arrow_ids.find_rows, chosen.ids))
    dropped = {split: len(some) - len(kept.get(split, [])) for split, some in queries.items()}
    return chosen, kept, {"of_passages": len(passages.ids), "seed": seed, "dropped_queries": dropped}


def _vocabulary(
    path: Path, given: str | None, size: int, passages: Passages, queries: Mapping[str, list[Query]]
) -> None:
    """Copies the vocabulary that was given, or learns one."""
    if given:
        vocabulary.Vocabulary(given)  # says what is wrong with it, if anything
        paths.copy(paths.as_path(given), path)
        return
    log(f"learning a vocabulary of {size} pieces")
    # Of a large collection, neither the queries nor the ids crowd out the texts.
    train = itertools.islice((q.text for q in queries.get("train", [])), vocabulary.MOST // 4)
    ids = passages.ids[: vocabulary.MOST // 4].to_pylist()
    texts = (p.full_text for part in passages.shards() for p in part())
    vocabulary.learn(itertools.chain(train, ids, texts), size, path)


def _query_digests(queries: Mapping[str, list[Query]]) -> list[str]:
    """A digest a split."""
    return [
        storage.digest(
            part
            for q in judged
            for part in (q.id, q.text, str(q.positives), " ".join(q.negatives), q.label, str(q.missing))
        )
        for judged in queries.values()
    ]


def _checksums(files: list[Path]) -> dict[Path, str]:
    """File -> its SHA-256."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        return dict(zip(files, threads.map(storage.checksum, files), strict=True))
