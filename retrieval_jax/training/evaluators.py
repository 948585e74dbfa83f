"""Evaluation during training: retrievers search for dev queries as a user would; others tell their loss."""

from collections.abc import Callable

import gin
import jax
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.core.values import NonNegative, Positive
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary, round_up
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.evaluation.metrics import compute_metrics
from retrieval_jax.evaluation.trec import drop_identical_ids
from retrieval_jax.examples.batches import encoder_decoder
from retrieval_jax.examples.examples import Examples
from retrieval_jax.examples.targets import QueryTargets, pad
from retrieval_jax.examples.tasks import LabelledPairs
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.search.searcher import Searcher

METRICS = ("Hits@1", "Hits@10", "MRR@10")
SAMPLES = 5  # queries whose findings are kept to be looked at


@gin.configurable(allowlist=["max_queries", "beams"])
class RetrievalEvaluator:
    """Called with parameters, gives Hits@1, Hits@10 and MRR@10 of the dev queries ({} without any).

    `samples` then tells what was found for the first few: {"query", "right": [passage, …], "found": [passage,
    …]}, a passage as {"id"} and, of a generative retriever, its "docid"'s tokens; those found with a "score".

    Args:
      model: a GenerativeRetriever or a DualEncoder.
      collection, table, vocabulary, input_length, passage_length: as in training.
      max_queries: dev queries to search for, chosen by a hash of the id.
      beams: of a generative search.
      mesh: what it runs on; None: all devices.
    """

    def __init__(
        self,
        model,
        collection: Collection,
        table: DocidTable | None,
        vocabulary: Vocabulary,
        input_length: int,
        passage_length: int,
        max_queries: NonNegative = 256,
        beams: Positive = 10,
        mesh: Mesh | None = None,
    ):
        queries = collection.queries("dev") if collection.query_counts.get("dev") else []
        self.queries = sorted(queries, key=lambda q: storage.hash_fraction(q.id))[:max_queries]
        self.qrels = {q.id: q.relevant for q in self.queries}
        # Left out of their own results, as in `evaluate`.
        self.themselves = {query.id for query in self.queries if query.is_passage}
        self.table, self.samples = table, []
        if not self.queries:
            return
        mesh = mesh or all_devices()
        self.searcher: Callable[[dict], Searcher]
        if table:
            from retrieval_jax.search.generative import GenerativeSearcher

            generative = GenerativeSearcher(model, {}, table, vocabulary, input_length, beams, mesh=mesh)

            def searcher(params: dict) -> Searcher:
                generative.params = params
                return generative
        else:
            from retrieval_jax.search.dense import ExactSearcher, TextEncoder

            ids, texts = zip(*((p.id, p.full_text) for p in collection.passages()), strict=True)
            reads_query, reads_passage = map(vocabulary.with_prompt, model.prompts)
            of_passages = TextEncoder(model.encode_passages, {}, reads_passage, passage_length, mesh=mesh)
            of_queries = TextEncoder(model.encode_queries, {}, reads_query, input_length, mesh=mesh)

            def searcher(params: dict) -> Searcher:
                of_passages.params = of_queries.params = params
                return ExactSearcher(of_queries, of_passages(texts), ids)

        self.searcher = searcher

    def __call__(self, params: dict) -> dict[str, float]:
        if not self.queries:
            return {}
        searched = self.searcher(params).search([q.text for q in self.queries], 10 + bool(self.themselves))
        run = {query.id: ranking for query, ranking in zip(self.queries, searched, strict=True)}
        run = {query: ranking[:10] for query, ranking in drop_identical_ids(run, self.themselves).items()}
        self.samples = [
            {
                "query": query.text,
                "right": [self._passage(one) for one in query.positives],
                "found": [self._passage(one) | {"score": round(s, 4)} for one, s in run[query.id][:5]],
            }
            for query in self.queries[:SAMPLES]
        ]
        metrics = compute_metrics(self.qrels, run)
        return {name: metrics[name] for name in METRICS}

    def _passage(self, passage_id: str) -> dict:
        if not self.table:
            return {"id": passage_id}
        (row,) = arrow_ids.find_rows(self.table.passage_ids, [passage_id])
        docid = self.table.tokens_NxL[row]
        return {"id": passage_id, "docid": docid[docid > 0].tolist()}


class LossEvaluator:
    """Called with parameters, gives a query generator's loss (nats a token) on dev queries ({} without any).

    Args:
      model: a QueryGenerator.
      collection, targets: as in training.
      max_queries: pairs of a passage and a dev query, the collection's first.
      mesh: what it runs on; None: all devices.
    """

    def __init__(
        self,
        model,
        collection: Collection,
        targets: QueryTargets,
        max_queries: int = 256,
        mesh: Mesh | None = None,
    ):
        queries = collection.queries("dev") if collection.query_counts.get("dev") else []
        pairs = LabelledPairs(collection, targets.vocabulary, queries)
        examples = Examples(pairs, targets)
        rng = np.random.default_rng(0)  # nothing is drawn
        features = [examples(i, rng) for i in range(min(len(examples), max_queries))]
        self.batch = None
        if features:
            mesh = mesh or all_devices()
            batch = encoder_decoder(pad(features, targets.features))
            missing = round_up(len(features), mesh.shape["data"]) - len(features)  # rows without weight
            padded = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in batch.items()}
            self.batch = multihost.make_global_arrays(mesh, padded, "data")
        self.eval_fn = jax.jit(model.eval_fn)

    def __call__(self, params: dict) -> dict[str, float]:
        return {"loss": float(self.eval_fn(params, self.batch)[0])} if self.batch else {}
