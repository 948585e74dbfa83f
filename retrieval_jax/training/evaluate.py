"""Evaluation during training: retrievers search for dev queries as a user would; others tell their loss."""

from collections.abc import Callable

import gin
import jax
import numpy as np

from retrieval_jax import storage
from retrieval_jax.data.batches import encoder_decoder
from retrieval_jax.data.examples import Examples, LabelledPairs, QueryTargets, pad
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.evaluation.metrics import score
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training import partitioning

SHOWN = ("Hits@1", "Hits@10", "MRR@10")


@gin.configurable(allowlist=["most", "beams"])
class DevQueries:
    """Called with parameters, gives Hits@1, Hits@10 and MRR@10 of the dev queries ({} without any).

    Args:
      model: a GenerativeRetriever or a DualEncoder.
      collection, table, vocabulary, input_length, passage_length: as in training.
      most: dev queries to search for, chosen by a hash of the id.
      beams: of a generative search.
    """

    def __init__(
        self,
        model,
        collection: Collection,
        table: DocidTable | None,
        vocabulary: Vocabulary,
        input_length: int,
        passage_length: int,
        most: int = 256,
        beams: int = 10,
    ):
        queries = collection.queries("dev") if collection.query_counts.get("dev") else []
        self.queries = sorted(queries, key=lambda q: storage.hash_fraction(q.id))[:most]
        self.qrels = {q.id: q.positives for q in self.queries}
        if not self.queries:
            return
        self.searcher: Callable[[dict], Searcher]
        if table:
            from retrieval_jax.search.generative import GenerativeSearcher

            mesh = partitioning.make_mesh()
            generative = GenerativeSearcher(model, {}, table, vocabulary, input_length, beams, mesh=mesh)

            def searcher(params: dict) -> Searcher:
                generative.params = params
                return generative
        else:
            from retrieval_jax.search.dense import ExactSearcher, TextEncoder

            ids, texts = zip(*((p.id, p.full_text) for p in collection.passages()), strict=True)
            of_passages = TextEncoder(model, {}, vocabulary, passage_length)
            of_queries = TextEncoder(model, {}, vocabulary, input_length)

            def searcher(params: dict) -> Searcher:
                of_passages.params = of_queries.params = params
                return ExactSearcher(of_queries, of_passages(texts), ids)

        self.searcher = searcher

    def __call__(self, params: dict) -> dict[str, float]:
        if not self.queries:
            return {}
        found = self.searcher(params).search([q.text for q in self.queries], 10)
        metrics = score(self.qrels, {q.id: r for q, r in zip(self.queries, found, strict=True)})
        return {name: metrics[name] for name in SHOWN}


class DevLoss:
    """Called with parameters, gives a query generator's loss (nats a token) on dev queries ({} without any).

    Args:
      model: a QueryGenerator.
      collection, targets: as in training.
      most: pairs of a passage and a dev query, the collection's first.
    """

    def __init__(self, model, collection: Collection, targets: QueryTargets, most: int = 256):
        queries = collection.queries("dev") if collection.query_counts.get("dev") else []
        pairs = LabelledPairs(collection, targets.vocabulary, queries)
        examples = Examples(pairs, targets)
        rng = np.random.default_rng(0)  # nothing is drawn
        features = [examples(i, rng) for i in range(min(len(examples), most))]
        self.batch = encoder_decoder(pad(features, targets.features)) if features else None
        self.eval_fn = jax.jit(model.eval_fn)

    def __call__(self, params: dict) -> dict[str, float]:
        return {"loss": float(self.eval_fn(params, self.batch)[0])} if self.batch else {}
