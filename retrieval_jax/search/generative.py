"""Searching by writing docids: constrained beam search, or top-k over the docid softmax (atomic)."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax import storage
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.decoding.atomic import top_docids
from retrieval_jax.decoding.beam_search import constrained_beam_search
from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.search.searcher import Ranking
from retrieval_jax.training.checkpoints import open_model


class GenerativeSearcher:
    """A generative retriever and the docids of a collection.

    Args:
      model, params: the retriever; `params` may be replaced between searches (nothing recompiles).
      table: the docids.
      vocabulary, input_length: how queries become tokens.
      beams: beams of the search; a search finds at most so many docids.
      batch_size: queries decoded at once.
    """

    def __init__(
        self,
        model: GenerativeRetriever,
        params: dict,
        table: DocidTable,
        vocabulary: Vocabulary,
        input_length: int,
        beams: int = 40,
        batch_size: int = 32,
    ):
        self.params = params
        self.vocabulary = vocabulary
        self.input_length = input_length
        self.batch_size = batch_size
        trie, docid_N = build_trie(table.tokens_NxL)
        self.trie = jax.device_put(trie)
        self.passages = defaultdict(list)  # docid row -> passage ids; usually one
        for docid, passage in zip(docid_N.tolist(), table.passage_ids, strict=True):
            self.passages[docid].append(passage)
        module, self.atomic = model.module, table.kind == "atomic"

        def decode(params, trie, inputs_BxS):
            variables = {"params": params}
            cross = module.apply(variables, inputs_BxS, method="start")

            def step(tokens, position, past):
                return module.apply(variables, tokens, position, past, cross, inputs_BxS, method="step")

            return constrained_beam_search(step, trie, len(inputs_BxS), beams)

        def rank(params, count, inputs_BxS, k):
            start = jnp.zeros((len(inputs_BxS), 1), jnp.int32)
            logits_Bx1xV = module.apply({"params": params}, inputs_BxS, start)
            return top_docids(logits_Bx1xV[:, 0], count, k)

        self._decode = jax.jit(decode)
        self._rank = jax.jit(rank, static_argnames="k")

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """See Searcher. Scores are log-probabilities; passages that share a docid tie, in row order."""
        results = []
        for first in range(0, len(queries), self.batch_size):
            some = list(queries[first : first + self.batch_size])
            padding = [""] * (self.batch_size - len(some))
            tokens = self.vocabulary.batch(some + padding, self.input_length)
            if self.atomic:
                k_found = min(k, len(self.passages))
                rows, scores = self._rank(self.params, len(self.passages), tokens, k_found)
            else:
                rows, scores = self._decode(self.params, self.trie, tokens)
            for found, score in zip(
                np.asarray(rows)[: len(some)].tolist(), np.asarray(scores).tolist(), strict=False
            ):
                ranking = [
                    (p, s)
                    for row, s in zip(found, score, strict=True)
                    if row >= 0
                    for p in self.passages[row]
                ]
                results.append(ranking[:k])
        return results

    @classmethod
    def open(cls, folder: Path) -> "GenerativeSearcher":
        """Opens a folder that `index` made."""
        manifest = storage.read_manifest(folder, "index")
        opened = open_model(folder / manifest["model"], manifest["step"])
        table = DocidTable.open(folder / manifest["docids"])
        return cls(
            opened.model,
            opened.params,
            table,
            opened.vocabulary,
            opened.description["input_length"],
            manifest["beams"],
            manifest["batch_size"],
        )
