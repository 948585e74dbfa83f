"""The verb `score`: a searcher or a file of another tool becomes the teacher of a retriever."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import gin
import pyarrow as pa

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.unfinished import Shards
from retrieval_jax.core.values import Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import mined, query_folder, scores
from retrieval_jax.data.collection import TRAINING_SPLITS, Collection
from retrieval_jax.data.distribution import log_table
from retrieval_jax.data.mined import MinedNegatives, NegativesRule
from retrieval_jax.data.sources import score_files
from retrieval_jax.data.sources.lines import ErrorLog
from retrieval_jax.evaluation.runs import outdated, read_facts
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.search.batched import score_in_batches
from retrieval_jax.search.manifest import searcher_manifest
from retrieval_jax.search.searcher import check_scores, searcher_class
from retrieval_jax.search.shared_work import make_in_shards, open_for_share, scratch_folder

Found = Callable[[str], Sequence[str]]  # query id -> passage ids, hardest first


class _Made(NamedTuple):
    """What was made.

    Attributes:
      folder: where it lies.
      verb: the verb of its manifest.
      keys: which of the manifest's facts are shown.
    """

    folder: Path
    verb: str
    keys: Sequence[str]


def _scores(folder: Path) -> _Made:
    return _Made(folder, scores.VERB, ("queries", "without_positive", "pairs", "distribution"))


def _negatives(folder: Path) -> _Made:
    return _Made(folder, mined.VERB, ("queries", "negatives"))


@gin.configurable
def score_pairs(
    source: str,
    work_dir: str | None = None,
    searcher: str = "bm25",
    candidates: Sequence[str] = (),
    file: str | None = None,
    name: str | None = None,
    depth: Positive = 100,
    shard_size: Positive = 256,
    on_error: str = "fail",
) -> dict:
    """Writes scores/NAME: a teacher's scores of (query, passage) pairs, which --SCORES=NAME trains with.

    The teacher is a searcher (--SEARCHER), which scores the positives of each train and dev query and its
    `candidates`, or another tool, whose scores are read from a `file`. After a kill, the same command goes on
    from the shards that are finished. With several hosts, each one makes its share of them.

    A file may be JSON or JSONL, {"QUERY": {"PASSAGE": SCORE, ...}} or RIPOR's {"qid", "docids", "scores"};
    Tevatron's JSONL whose passages have a "score"; a TREC run; or TSV: query, passage, score; or query,
    positive, negative and the scores of both. Each may be in .gz. The JSONL of hard negatives of
    sentence-transformers, {"qid", "pos", "neg": {SYSTEM: [PASSAGE, ...]}}, has no scores: of it,
    negatives/NAME is made, as by `mine`, which a searcher can then score.

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      searcher: the name of the searcher that is the teacher: a generative, planned, exact, lexical, bm25 or
        fused one.
      candidates: names of negatives/ and of runs/NAME.train.trec (runs/NAME.dev.trec), whose passages are
        scored (of a run, the lines of each query together): ('mined', 'bm25').
      file: a file of scores to read instead.
      name: the name of the scores; None for the searcher's or the file's. What has this name is replaced, if
        the name is given; a file's own name replaces nothing that was made of anything else.
      depth: passages of each of the candidates' lists, for each query.
      shard_size: queries of a shard: a kill loses the work of at most this many.
      on_error: what to do with bad lines of the file, such as unknown ids: 'fail', or 'skip', which leaves
        them out and counts them.

    Returns:
      The folder that was made, of scores or of negatives, and facts of its manifest.

    Raises:
      UserError: there are no train queries, no candidates or no such file, or the file's own name is that of
        something else.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    if not collection.query_counts.get("train"):
        raise UserError(
            f"{collection.folder}: has no train queries: a teacher's scores are of their passages"
        )
    if file is not None:
        made = _from_file(work, collection, file, name, on_error)
    else:
        made = _from_searcher(work, collection, searcher, candidates, name, depth, shard_size)
    manifest = storage.read_manifest(made.folder, made.verb)
    log_table(manifest["distribution"], "scores, by quantile")
    return {"made": str(made.folder), **{key: manifest[key] for key in made.keys}}


def _from_searcher(
    work: Workspace,
    collection: Collection,
    searcher: str,
    names: Sequence[str],
    name: str | None,
    depth: int,
    shard_size: int,
) -> _Made:
    """Makes the scores of a searcher. All processes must call this."""
    if not names:
        raise UserError(
            "score_pairs.candidates: none: positives alone rank nothing: name negatives/ or runs/"
        )
    manifest = searcher_manifest(work.searcher(searcher), collection)
    check_scores(searcher_class(manifest["kind"]), searcher, "score_pairs.searcher")
    sources = [_Source(work, collection, one) for one in names]
    splits = [split for split in TRAINING_SPLITS if collection.query_counts.get(split)]
    splits = [split for split in splits if split == "train" or any(split in x.contents for x in sources)]
    recipe = {
        **collection.recipe(*TRAINING_SPLITS),
        "teacher": manifest["recipe"],
        "scored_by": _described(work.searcher(searcher), manifest),
        "candidates": {source.name: source.contents for source in sources},
        "depth": depth,
        "splits": splits,
    }
    folder = work.scores(name or searcher)
    scratch = scratch_folder(folder)
    shards = {split: Shards(scratch / split, collection.query_counts[split], shard_size) for split in splits}
    opened = functools.cache(
        lambda: open_for_share(work.searcher(searcher), "score_pairs.searcher", make_partitioner)
    )

    def make(split: str, numbers: Sequence[int]) -> None:
        queries = collection.queries(split)
        queries = [queries[row] for number in numbers for row in shards[split].rows(number)]
        of_share = {query.id for query in queries}
        found = [*itertools.chain.from_iterable(x.found(split, of_share, depth) for x in sources)]
        chosen = functools.partial(scores.candidates, depth=depth, first_copies=collection.first_ids)
        pairs = ((q.text, chosen(q, [passages_of(q.id) for passages_of in found])) for q in queries)
        values = score_in_batches(opened(), pairs, len(queries), f"{split}: score by {searcher}")
        lines = (
            [query.id, {passage: x for passage, x in given.items() if math.isfinite(x)}]
            for query, given in zip(queries, values, strict=True)
        )
        for number in numbers:
            shards[split].write(number, itertools.islice(lines, len(shards[split].rows(number))))
        next(lines, None)  # closes the progress bar

    def join(tmp: Path) -> dict:
        return _write(
            tmp, collection, {split: some.read(range(some.count)) for split, some in shards.items()}
        )

    make_in_shards(folder, recipe, shards, make, join)
    return _scores(folder)


def _described(folder: Path, manifest: dict) -> dict[str, str]:
    """Tells what the scores of a searcher are; see `TeacherScores.scored_by`."""
    described = {"kind": manifest["kind"]}
    if manifest["kind"] == "generative":
        model = model_folder.read_description(paths.join(folder, manifest["model"]))
        described["score"] = model["settings"].get("score", "log_prob")
    return described


class _Source:
    """Passages that were found for the queries: mined negatives, runs, or both of one name.

    Attributes:
      name: their name.
      contents: split -> checksums of what lies on disk.
    """

    def __init__(self, work: Workspace, collection: Collection, name: str):
        self.name, self.collection, self.contents, self.negatives = name, collection, {}, None
        if storage.finished(work.negatives(name)):
            self.negatives = MinedNegatives(work.negatives(name))
        self.runs = {
            split: work.run(name, split) for split in TRAINING_SPLITS if work.run(name, split).is_file()
        }
        for split, path in [*self.runs.items()]:
            facts = read_facts(path)
            if reason := facts and outdated(facts["recipe"], work, name, collection, split):
                again = f"`retrieval-jax search --SEARCHER={name} --SPLIT={split}` makes it again"
                if not self.negatives:
                    raise UserError(f"{path}: {reason}: {again}")
                log(f"{path}: left out, {reason}: {again}")
                del self.runs[split]
        for split in TRAINING_SPLITS:
            found = [storage.checksum(self.runs[split])] if split in self.runs else []
            if self.negatives and (fingerprint := self.negatives.fingerprint_of(split)):
                found.append(fingerprint)
            if found:
                self.contents[split] = found
        if "train" not in self.contents:
            places = f"{work.negatives(name)} nor {work.run(name, 'train')}"
            raise UserError(
                f"score_pairs.candidates: there is neither {places}: "
                f"`retrieval-jax mine`, or `retrieval-jax search --SEARCHER={name} --SPLIT=train`"
            )

    def found(self, split: str, queries: Set[str], depth: int) -> Iterator[Found]:
        """Yields what was found for some queries of a split, by their ids; of a run, to this depth."""
        if self.negatives:
            negatives = self.negatives.of_queries(self.collection, split)
            yield lambda query: negatives.get(query, ())
        if split in self.runs:
            run = scores.first_of_run(self.runs[split], self.collection, queries, depth)
            yield lambda query: self.collection.ids.take(pa.array(run[query].rows_P)).to_pylist()


def _from_file(work: Workspace, collection: Collection, file: str, name: str | None, on_error: str) -> _Made:
    """Makes the scores that a file holds, or its negatives. All processes must call this."""
    skip = ErrorLog.skips(on_error)
    path = paths.as_path(file)
    if not path.is_file():
        raise UserError(f"score_pairs.file: {path}: no such file: give the path of one")
    given, name = name, name or path.name.split(".")[0]
    recipe = {
        **collection.recipe(*TRAINING_SPLITS),
        "teacher": {"file": storage.checksum(path), "on_error": on_error},
    }
    of_scores, of_negatives = _scores(work.scores(name)), _negatives(work.negatives(name))
    for made in (of_scores, of_negatives):
        if multihost.broadcast_from_process_0(storage.is_up_to_date(made.folder, recipe)):
            return made

    def make() -> int:
        errors = ErrorLog(skip=skip)
        found = score_files.read(path, collection, errors)
        errors.report()
        folder = (of_scores if found.has_scores else of_negatives).folder
        if not given and storage.finished(folder):
            raise UserError(
                f"{folder}: made of something else than {path}: name what the file becomes, "
                "--gin.score_pairs.name=\"'NAME'\" (that of the folder replaces it)"
            )
        if found.has_scores:
            splits = [split for split in TRAINING_SPLITS if collection.query_counts.get(split)]
            of_splits = {split: _of_split(collection, split, found.scores) for split in splits}
            write = functools.partial(_write, collection=collection, of_splits=of_splits)
        else:
            write = functools.partial(_write_negatives, collection=collection, found=found.scores)
        # Who gave them is no part of the recipe: the same file under another name changes nothing.
        storage.build_once(folder, recipe, lambda tmp: {"file": path.name, **write(tmp)})
        return found.has_scores

    return of_scores if multihost.value_from_process_0(make) else of_negatives


def _write_negatives(folder: Path, collection: Collection, found: Mapping[str, Mapping[str, float]]) -> dict:
    """Writes negatives of a file into a new folder, and returns the manifest's facts."""
    facts = {}
    for split in TRAINING_SPLITS:
        queries = collection.queries(split) if collection.query_counts.get(split) else []
        if split == "train" or any(query.id in found for query in queries):
            lists = ([(passage, math.nan) for passage in found.get(query.id, ())] for query in queries)
            chosen = mined.choose_all(collection, queries, lists, NegativesRule(limit=None))
            facts[split] = mined.write(folder, split, chosen)
    return query_folder.merge(facts)


def _of_split(
    collection: Collection, split: str, found: Mapping[str, Mapping[str, float]]
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yields (query id, scores) of the queries of a split."""
    return ((query.id, found.get(query.id, {})) for query in collection.queries(split))


def _write(folder: Path, collection: Collection, of_splits: Mapping[str, Iterator]) -> dict:
    """Writes the scores of all splits into a new folder, and returns the manifest's facts."""
    return query_folder.merge(
        {
            split: scores.write(folder, split, some, {q.id: q.positives for q in collection.queries(split)})
            for split, some in of_splits.items()
        }
    )
