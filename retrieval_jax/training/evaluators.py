"""Evaluators measure a model while it trains. Retrievers search for the dev queries as a user would."""

import abc
import zlib
from collections.abc import Sequence
from typing import Protocol

import gin
import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from retrieval_jax.checkpoints.learning_curve import POOL_DIGEST
from retrieval_jax.core import arrow_ids, configuration, storage
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import NonNegative, Positive
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.trec import drop_identical_ids
from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.embeddings.text_encoder import TextEncoder, passage_shapes, query_shapes
from retrieval_jax.evaluation.metrics import compute_metrics
from retrieval_jax.examples.examples import Examples
from retrieval_jax.examples.features import pad
from retrieval_jax.examples.tasks import LabelledPairs
from retrieval_jax.examples.training_data import TrainDataset
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.text_groups import few_lengths
from retrieval_jax.search.dense import ExactSearcher
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.search.lexical import LexicalSearcher
from retrieval_jax.search.planned import PlannedSearcher
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.pool import BUDGET, EvaluationCost, pool_rows
from retrieval_jax.training.settings import TrainSettings

RETRIEVAL_METRICS = ("Hits@1", "Hits@10", "MRR@10")
METRICS = (*RETRIEVAL_METRICS, "loss")
"""The metrics of the evaluators, by one of which the best checkpoint can be kept."""
SAMPLES = 5  # queries whose results are kept to be looked at
_POOL_BYTES = 1 << 30  # of the vectors of a pool, unless its size is given: a lexical encoder's are wide
_TEXTS_AT_ONCE = 4096  # passages for each shard of data that are read at once to be encoded


class Evaluator(Protocol):
    """Measures a model while it trains.

    Attributes:
      samples: the results for the first few queries of the last evaluation; may be empty. Each is {"query":
        its text, "right": relevant passages, "found": retrieved passages}; a passage is {"id", and "docid",
        its tokens, where docids are written}, and a retrieved one has its "score".
      prefix: what the metrics are of, and are named by in the learning curve: "dev" or "dev_pool".
    """

    samples: Sequence[dict]
    prefix: str

    def __call__(self, params: dict) -> dict[str, float]:
        """Gives metrics, by name, of these parameters; {} where there are no dev queries."""
        ...


@gin.configurable(allowlist=["max_queries"])
class RetrievalEvaluator(abc.ABC):
    """Searches for the dev queries, and gives Hits@1, Hits@10 and MRR@10.

    A query that is itself a passage of the collection is left out of its own results, as in `evaluate`.

    Args:
      model: the retriever.
      examples: the collection, and how texts are read in training.
      settings: of the run.
      mesh: the mesh to run on; None: all devices.
      max_queries: the most dev queries to search for; a hash of the id chooses them.
    """

    prefix = "dev"

    def __init__(
        self,
        model,
        examples: TrainDataset,
        settings: TrainSettings,
        mesh: Mesh | None = None,
        max_queries: NonNegative = 256,
    ):
        self.samples: Sequence[dict] = ()
        self.settings = settings
        queries = _dev_queries(examples.collection)
        self.queries = sorted(queries, key=lambda q: storage.hash_fraction(q.id))[:max_queries]
        self.qrels = {q.id: q.relevant for q in self.queries}
        self.themselves = {query.id for query in self.queries if query.is_passage}
        if self.queries:
            self.prepare(model, examples, mesh or all_devices())

    @abc.abstractmethod
    def prepare(self, model, examples: TrainDataset, mesh: Mesh) -> None:
        """Makes what all searches share, once."""

    @abc.abstractmethod
    def searcher(self, params: dict) -> Searcher:
        """Gives a searcher with these parameters."""

    def passage(self, passage_id: str) -> dict:
        """Describes a passage in the samples."""
        return {"id": passage_id}

    def __call__(self, params: dict) -> dict[str, float]:
        """See `Evaluator.__call__`."""
        if not self.queries:
            return {}
        searched = self.searcher(params).search([q.text for q in self.queries], 10 + bool(self.themselves))
        run = {query.id: ranking for query, ranking in zip(self.queries, searched, strict=True)}
        run = {query: ranking[:10] for query, ranking in drop_identical_ids(run, self.themselves).items()}
        self.samples = [
            {
                "query": query.text,
                "right": [self.passage(passage) for passage in query.positives],
                "found": [self.passage(passage) | {"score": round(s, 4)} for passage, s in run[query.id][:5]],
            }
            for query in self.queries[:SAMPLES]
        ]
        metrics = compute_metrics(self.qrels, run)
        return {name: metrics[name] for name in RETRIEVAL_METRICS}


@gin.configurable(allowlist=["beams"])
class GenerativeEvaluator(RetrievalEvaluator):
    """Searches with a generative retriever by `beams` beams. See RetrievalEvaluator.

    Where the training reads sets of tokens, the search plans by them, and docids' scores have the weight that
    `joint_ranking` gives to them.
    """

    def __init__(
        self,
        model: GenerativeRetriever,
        examples: TrainDataset,
        settings: TrainSettings,
        mesh: Mesh | None = None,
        beams: Positive = 10,
    ):
        self.beams, self.table = beams, examples.table
        super().__init__(model, examples, settings, mesh)

    def prepare(self, model: GenerativeRetriever, examples: TrainDataset, mesh: Mesh) -> None:
        """See `RetrievalEvaluator.prepare`."""
        searcher, settings = GenerativeSearcher, {"beams": self.beams, "mesh": mesh}
        if examples.sets and model.config.lexical_head:
            weight = configuration.argument(model.objective, "sequential_weight") or 1.0
            searcher, settings = (
                PlannedSearcher,
                settings | {"sets": examples.sets, "sequential_weight": weight},
            )
        length = examples.config.input_length
        self.generative = searcher(
            model, {}, self.table, examples.vocabulary, input_length=length, **settings
        )

    def searcher(self, params: dict) -> Searcher:
        """See `RetrievalEvaluator.searcher`."""
        self.generative.params = params
        return self.generative

    def passage(self, passage_id: str) -> dict:
        """See `RetrievalEvaluator.passage`; the docid's tokens are added."""
        (row,) = arrow_ids.find_rows(self.table.passage_ids, [passage_id])
        docid = self.table.tokens_NxL[row]
        return {"id": passage_id, "docid": docid[docid > 0].tolist()}


@gin.configurable(allowlist=["pool_size"])
class DenseEvaluator(RetrievalEvaluator):
    """Encodes passages with a dual encoder, and searches them exactly. See RetrievalEvaluator.

    The passages are a pool, the same at each evaluation, and the metrics are then named "dev_pool/…", as they
    are higher than those of the whole collection. `passages`, the pool's size, is one of them. If the pool
    has room for the whole collection, the metrics are the collection's own, "dev/…".

    Args:
      model: the dual encoder.
      examples: the collection, and how texts are read in training.
      settings: of the run.
      mesh: the mesh to run on; None: all devices.
      pool_size: the number of passages of the pool. None: as many as an evaluation may encode for at most 5%
        of the training's computation, with vectors of at most 1 GiB, but at least the positives of the dev
        queries. 0: all passages of the collection.
    """

    def __init__(
        self,
        model: DualEncoder,
        examples: TrainDataset,
        settings: TrainSettings,
        mesh: Mesh | None = None,
        pool_size: NonNegative | None = None,
    ):
        self.pool_size = pool_size
        super().__init__(model, examples, settings, mesh)

    def prepare(self, model: DualEncoder, examples: TrainDataset, mesh: Mesh) -> None:
        """See `RetrievalEvaluator.prepare`."""
        self.collection, config = examples.collection, examples.config
        self._choose_passages(examples, 4 * model.module.vector_dim)
        query, passage = map(examples.vocabulary.with_prompt, model.prompts)
        # Few shapes: to compile all those of an index would take longer than they save.
        lengths = few_lengths(config.passage_length)
        shapes = {length: passage_shapes(length, mesh)[length][-1:] for length in lengths}
        self.queries_encoder = TextEncoder(
            model.encode_queries, {}, query, query_shapes(config.input_length), mesh=mesh
        )
        self.passages_encoder = TextEncoder(model.encode_passages, {}, passage, shapes, mesh=mesh)
        self.texts_at_once = _TEXTS_AT_ONCE * mesh.shape["data"]

    def _choose_passages(self, examples: TrainDataset, vector_bytes: int) -> None:
        """Chooses the passages to search, of whose vectors each takes so much, and says what that costs."""
        count = self.collection.passage_count
        cost = EvaluationCost.of(examples.config, self.settings, len(self.queries))
        within = min(cost.passages_within(BUDGET), _POOL_BYTES // vector_bytes)
        size = within if self.pool_size is None else self.pool_size or count
        mined = {}
        if size < count and examples.mined:
            mined = examples.mined.of_queries(self.collection, "dev")
        self.rows = pool_rows(self.collection, self.queries, mined, size)
        share = cost.share(len(self.rows))
        if len(self.rows) < count:
            self.prefix = "dev_pool"
        elif share <= BUDGET:
            return
        hint = ""
        if share > BUDGET:
            hint = (
                f", more than {BUDGET:.0%}: set a larger train.eval_every, fewer "
                "RetrievalEvaluator.max_queries or a smaller DenseEvaluator.pool_size"
            )
        log(
            f"evaluation: {len(self.queries)} dev queries are searched among {len(self.rows):,} of {count:,} "
            f"passages, which takes about {share:.1%} of the training's computation{hint}"
        )

    def searcher(self, params: dict) -> Searcher:
        """See `RetrievalEvaluator.searcher`. No texts are kept, and few are read at a time."""
        self.queries_encoder.params = self.passages_encoder.params = params
        parts = range(0, len(self.rows), self.texts_at_once)
        vectors_NxE = np.concatenate([self._encode(self.rows[n : n + self.texts_at_once]) for n in parts])
        return ExactSearcher(self.queries_encoder, vectors_NxE, self.collection.ids.take(pa.array(self.rows)))

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        return self.passages_encoder([passage.full_text for passage in self.collection.get(rows)])

    def __call__(self, params: dict) -> dict[str, float]:
        """See `Evaluator.__call__`."""
        metrics = super().__call__(params)
        if self.prefix != "dev_pool":
            return metrics
        # Learning curves keep nine digits.
        digest = zlib.crc32(np.asarray(self.rows, np.int64).tobytes()) % 10**9
        return metrics | {"passages": len(self.rows), POOL_DIGEST: digest}


class SetsEvaluator(RetrievalEvaluator):
    """Searches the sets of tokens that a lexical encoder is trained with. See RetrievalEvaluator."""

    def prepare(self, model: LexicalEncoder, examples: TrainDataset, mesh: Mesh) -> None:
        """See `RetrievalEvaluator.prepare`."""
        vocabulary = examples.vocabulary.with_prompt(model.prompts.query)
        shapes = query_shapes(examples.config.input_length)
        encoder = TextEncoder(model.encode_queries, {}, vocabulary, shapes, mesh=mesh)
        self.lexical = LexicalSearcher(encoder, examples.sets, mesh)

    def searcher(self, params: dict) -> Searcher:
        """See `RetrievalEvaluator.searcher`."""
        self.lexical.encoder.params = params
        return self.lexical


def lexical_evaluator(
    model: LexicalEncoder, examples: TrainDataset, settings: TrainSettings, mesh: Mesh | None = None
) -> RetrievalEvaluator:
    """Makes what evaluates a lexical encoder: by the sets of the training, or by passages that it encodes."""
    return (SetsEvaluator if examples.sets else DenseEvaluator)(model, examples, settings, mesh)


@gin.configurable(allowlist=["max_queries"])
class LossEvaluator:
    """Gives a query generator's loss on dev queries, in nats a token.

    Args:
      model: the query generator.
      examples: the collection, and how texts are read and written in training.
      settings: of the run.
      mesh: the mesh to run on; None: all devices.
      max_queries: the most pairs of a passage and a dev query, the first of the collection.
    """

    prefix = "dev"

    def __init__(
        self,
        model: QueryGenerator,
        examples: TrainDataset,
        settings: TrainSettings,
        mesh: Mesh | None = None,
        max_queries: NonNegative = 256,
    ):
        self.samples: Sequence[dict] = ()
        targets = examples.targets
        pairs = LabelledPairs(examples.collection, targets.vocabulary, _dev_queries(examples.collection))
        labelled = Examples(pairs, targets)
        rng = np.random.default_rng(0)  # nothing is drawn
        features = [labelled(i, rng) for i in range(min(len(labelled), max_queries))]
        self.batch = None
        if features:
            mesh = mesh or all_devices()
            batch = targets.to_batch(pad(features, targets.features))
            missing = round_up(len(features), mesh.shape["data"]) - len(features)  # rows without weight
            padded = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in batch.items()}
            self.batch = multihost.make_global_arrays(mesh, padded, "data")
        self.eval_fn = jax.jit(model.eval_fn)

    def __call__(self, params: dict) -> dict[str, float]:
        """See `Evaluator.__call__`."""
        return {"loss": float(self.eval_fn(params, self.batch)[0])} if self.batch else {}


def _dev_queries(collection: Collection) -> list[Query]:
    return collection.queries("dev") if collection.query_counts.get("dev") else []
