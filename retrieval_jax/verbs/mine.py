"""The verb `mine`: passages that a searcher wrongly finds for the train queries become hard negatives."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import gin

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.unfinished import Shards
from retrieval_jax.core.values import Fraction, NonNegative, Positive, Seed
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import mined, query_folder
from retrieval_jax.data.collection import TRAINING_SPLITS, Collection
from retrieval_jax.data.mined import Chosen, MinedNegatives, NegativesRule
from retrieval_jax.data.scores import TeacherScores
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.search.manifest import searcher_manifest
from retrieval_jax.search.mining import Miner, Teacher, scores_as_teacher, searcher_as_teacher
from retrieval_jax.search.searcher import Searcher, searcher_class
from retrieval_jax.search.shared_work import make_in_shards, open_for_share, scratch_folder

SUMMARY_KEYS = ("queries", "with_negatives", "fewer_than_wanted", "negatives")  # of the manifest


@gin.configurable("mine")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MineConfig:
    """Writes negatives/NAME/qrels.train.tsv: hard negatives of the train queries.

    qrels.dev.tsv beside it has what is found for the dev queries, for the pool of passages among which a dual
    encoder searches for them while it trains: nothing is skipped, and there is no threshold.

    Train with them by --NEGATIVES=NAME and --gin.DataConfig.negatives=7. To refresh them between
    rounds, mine again with an index of the model that they trained, under the same name or another. A passage
    that is known to answer a query is never its negative: these are its positives and those of queries with
    the same text but for case and white space, all passages that have the text of one of these, and the
    passage that the query itself is.

    How the scores of positives and negatives are distributed is shown, and how many queries have fewer
    negatives than wanted. After a kill, the same command goes on from the shards that are finished. With
    several hosts, each one makes its share of them.

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      searcher: the name of a searcher, one of searchers/.
      name: the name of the negatives; None for the searcher's.
      depth: passages to search for, for each query, so the last rank that counts.
      negatives_per_query: negatives to keep, hardest first.
      skip_top: passages to leave out at the top, which are the most likely to be unlabelled positives.
      margin: against unlabelled positives, too: a negative must score lower than the query's best positive by
        this much. A query has no negatives if none of its positives is found (a teacher scores all of them).
        Of log-probabilities, 0.05 leaves 95% of the positive's probability. None: no limit.
      relative_margin: the same as a share of the best positive's score: with 0.05 a negative scores at most
        95% of it (NV-Retriever's rule, for similarities). Below 0 it is a share of the score's size, so that
        the ceiling is lower there, too: 105% of the score. None: no limit.
      max_score: the highest score of a negative. None: no limit.
      teacher: whose scores these three read instead, also of positives that were not found: the name of a
        searcher, which may be `searcher` itself, or 'scores/NAME', which `retrieval-jax score` made (what has
        no score there passes no threshold). The ranks stay those of `searcher`.
      sample: whether the negatives are drawn from all passages that these rules leave; otherwise the hardest
        are kept.
      seed: of what is drawn (--SEED); the draw depends on the query's id, too.
      prefix_lengths: with a generative searcher, numbers of tokens, such as (4, 8): its negatives are then
        passages of the docids' prefixes that its beams hold when they have written so many. The lengths take
        turns, each with its best prefix first.
      passages_per_prefix: the most passages that stand for a prefix, drawn from those that do not answer the
        query.
      shard_size: queries of a shard: a kill loses the work of at most this many.
    """

    source: str
    work_dir: str | None = None
    searcher: str = "bm25"
    name: str | None = None
    depth: Positive = 100
    negatives_per_query: Positive = 30
    skip_top: NonNegative = 0
    margin: float | None = None
    relative_margin: Fraction | None = None
    max_score: float | None = None
    teacher: str | None = None
    sample: bool = False
    seed: Seed = 0
    prefix_lengths: Sequence[Positive] = ()
    passages_per_prefix: Positive = 1
    shard_size: Positive = 1024

    @property
    def rule(self) -> NegativesRule:
        """Which passages become negatives of the train queries."""
        return NegativesRule(
            limit=self.negatives_per_query,
            skip_top=self.skip_top,
            margin=self.margin,
            relative_margin=self.relative_margin,
            max_score=self.max_score,
            sample=self.sample,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raises UserError if the values do not go together."""
        if self.skip_top >= self.depth:
            raise UserError(f"mine: depth {self.depth}, skip_top {self.skip_top}: skip less than depth")
        if self.prefix_lengths and self.rule.reads_scores and not self.teacher:
            raise UserError(
                "mine.prefix_lengths: scores of prefixes of different lengths do not compare: set a teacher "
                "whose scores the thresholds read, mine.teacher"
            )


def mine(**values: object) -> dict:
    """Mines hard negatives.

    Args:
      **values: of MineConfig's attributes; those that are left out are gin's.

    Returns:
      The file of the train queries, and SUMMARY_KEYS.

    Raises:
      UserError: the values do not go together, or a searcher is missing or cannot do what they ask for.
    """
    config = MineConfig(**values)
    config.check()
    work = Workspace.for_source(config.source, config.work_dir)
    collection = Collection(work.collection)
    if not collection.query_counts.get("train"):
        raise UserError(f"{collection.folder}: has no train queries to mine for: add queries.train.tsv")
    splits = ["train", *["dev"] * bool(collection.query_counts.get("dev"))]
    out, recipe = work.negatives(config.name or config.searcher), _recipe(config, work, collection, splits)
    scratch, counts = scratch_folder(out), collection.query_counts
    shards = {split: Shards(scratch / split, counts[split], config.shard_size) for split in splits}

    def join(tmp: Path) -> dict:
        facts = {}
        for split, some in shards.items():
            some = dataclasses.replace(some, folder=paths.ensure_local(some.folder))
            chosen = itertools.starmap(Chosen, some.read(range(some.count)))
            facts[split] = mined.write(tmp, split, chosen, config.negatives_per_query)
        return query_folder.merge(facts)

    make_in_shards(out, recipe, shards, _ShardMaker(config, work, collection, shards).make, join)
    manifest = storage.read_manifest(out, mined.VERB)
    mined.log_scores(manifest, config.negatives_per_query)
    return {"made": str(out / MinedNegatives.file_name("train"))} | {
        key: manifest[key] for key in SUMMARY_KEYS
    }


def _recipe(config: MineConfig, work: Workspace, collection: Collection, splits: Sequence[str]) -> dict:
    """Returns all that the negatives depend on. Raises UserError if a searcher is missing or stale."""
    found = searcher_manifest(work.searcher(config.searcher), collection)
    if config.prefix_lengths:
        from retrieval_jax.search.generative import GenerativeSearcher

        if not issubclass(searcher_class(found["kind"]), GenerativeSearcher):
            raise UserError(
                f"mine.prefix_lengths: {config.searcher} ({found['kind']}) writes no docids: "
                "mine with a generative searcher"
            )
    teacher = None
    if scores := _scores(config, work):
        teacher = {"scores": scores.fingerprint}
    elif config.teacher:
        teacher = searcher_manifest(work.searcher(config.teacher), collection)["recipe"]
    drawn = {"sample": config.sample, "seed": config.seed}
    prefixes = {"lengths": config.prefix_lengths, "passages": config.passages_per_prefix}
    rule = dataclasses.asdict(config.rule)
    return {
        **collection.recipe(*TRAINING_SPLITS),
        "searcher": found["recipe"],
        "teacher": teacher,
        "settings": {name: value for name, value in rule.items() if name not in drawn}
        | {"depth": config.depth},
        "prefixes": prefixes if config.prefix_lengths else None,
        "drawn": drawn if config.sample or config.prefix_lengths else None,
        "splits": splits,
    }


@dataclasses.dataclass(frozen=True)
class _ShardMaker:
    """Mines for the queries of shards; opens what it needs for the first of them."""

    config: MineConfig
    work: Workspace
    collection: Collection
    shards: Mapping[str, Shards]

    @functools.cached_property
    def searcher(self) -> Searcher:
        """The searcher that finds passages."""
        return self._open(self.config.searcher)

    @functools.cached_property
    def miner(self) -> Miner:
        """Finds passages, or those of prefixes."""
        config, finder = self.config, self.searcher
        if config.prefix_lengths:
            from retrieval_jax.search.prefixes import PrefixSearch

            finder = PrefixSearch(finder, config.prefix_lengths, config.passages_per_prefix, config.seed)
        return Miner(self.collection, finder, config.depth)

    def make(self, split: str, numbers: Sequence[int]) -> None:
        """Makes some shards of a split."""
        some, name = self.shards[split], self.config.searcher
        # All that is found for a dev query makes the pool of an evaluation as hard as it can be.
        rule, teacher = NegativesRule(self.config.negatives_per_query), None
        if split == "train":
            rule, teacher = self.config.rule, self._teacher()
        rows = [row for number in numbers for row in some.rows(number)]
        queries = self.collection.queries(split)
        chosen = self.miner.mine(queries, rows, rule, f"{split}: mine with {name}", teacher)
        for number in numbers:
            some.write(number, itertools.islice(chosen, len(some.rows(number))))
        next(chosen, None)  # closes the progress bar

    def _teacher(self) -> Teacher | None:
        """Returns what scores the passages of train queries; None where it is the search."""
        name = self.config.teacher
        if scores := _scores(self.config, self.work):
            return scores_as_teacher(scores.by_row(self.collection), self.collection)
        if name is None:
            return None
        return searcher_as_teacher(self.searcher if name == self.config.searcher else self._open(name), name)

    def _open(self, name: str) -> Searcher:
        setting = "mine.searcher" if name == self.config.searcher else "mine.teacher"
        return open_for_share(self.work.searcher(name), setting, make_partitioner)


def _scores(config: MineConfig, work: Workspace) -> TeacherScores | None:
    """Returns the scores on disk that the teacher is; None if there is none, or it is a searcher."""
    folder, _, name = (config.teacher or "").partition("/")
    return TeacherScores(work.scores(name)) if name and folder == "scores" else None
