"""Searching by writing docids: constrained beam search, or top-k over the docid softmax (atomic)."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from retrieval_jax import storage
from retrieval_jax.data.vocabulary import Vocabulary
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
        for docid, passage in zip(docid_N.tolist(), table.passage_ids.to_pylist(), strict=True):
            self.passages[docid].append(passage)
        self.atomic = table.kind == "atomic"
        self._decode = jax.jit(functools.partial(model.predict_batch_with_aux, beams=beams))
        self._rank = jax.jit(model.rank_atomic, static_argnames="k")

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """See Searcher. Scores are log-probabilities; passages that share a docid tie, in row order."""
        results = []
        for first in range(0, len(queries), self.batch_size):
            some = list(queries[first : first + self.batch_size])
            padding = [""] * (self.batch_size - len(some))
            batch = {"encoder_input_tokens": self.vocabulary.batch(some + padding, self.input_length)}
            if self.atomic:
                docids = len(self.passages)
                rows, aux = self._rank(self.params, batch, docids, k=min(k, docids))
            else:
                rows, aux = self._decode(self.params, batch, trie=self.trie)
            scores = aux["scores"]
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
