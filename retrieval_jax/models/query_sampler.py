"""Sampling queries for the passages of a collection from a query generator, over the devices of one host."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.data.collection import Collection
from retrieval_jax.data.generation import Advance
from retrieval_jax.data.synthetic import QueryShards
from retrieval_jax.data.vocabulary import Vocabulary, round_up
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.query_generator import QueryGenerator


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How queries are sampled.

    Attributes:
      count: samples of each passage.
      temperature: the logits are divided by it.
      top_k: each token is drawn from this many likeliest ones.
      seed: the seed. A passage's samples depend on it and on the passage's row alone, not on batches or
        devices.
      batch_size: passages that are sampled for at once; it is rounded up to divide over the devices.
      passage_length: the most tokens of a passage that are read.
      query_length: the most tokens of a query.
    """

    count: int
    temperature: float
    top_k: int
    seed: int
    batch_size: int
    passage_length: int
    query_length: int


class QuerySampler:
    """A source of queries (`data.generation.QuerySource`) that samples them from a model.

    Args:
      model: the query generator.
      params: its parameters, on the devices of `mesh`.
      vocabulary: the vocabulary of passages and queries.
      mesh: devices of this host alone: hosts sample independently.
      settings: how queries are sampled.
    """

    def __init__(
        self,
        model: QueryGenerator,
        params: dict,
        vocabulary: Vocabulary,
        mesh: Mesh,
        settings: SamplingSettings,
    ):
        self.params, self.vocabulary, self.settings = params, vocabulary, settings
        self.batch_size = round_up(settings.batch_size, mesh.shape["data"])
        self.sharding = partitioning.batch_sharding(mesh)

        @jax.jit
        def sample(params: dict, passages_BxS: jax.Array, rows_B: jax.Array) -> jax.Array:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(settings.seed), rows_B)
            tokens_BxNxT, _ = model.sample(
                params,
                passages_BxS,
                keys_B,
                settings.count,
                settings.query_length,
                settings.temperature,
                settings.top_k,
            )
            return tokens_BxNxT

        self.sample = sample

    def prepare(self, collection: Collection, shards: QueryShards) -> None:
        """Does nothing: passages are read as they are sampled for."""

    def queries(
        self, collection: Collection, shards: QueryShards, numbers: Sequence[int], advance: Advance
    ) -> Iterator[list[list[str]]]:
        """See `QuerySource.queries`: `settings.count` of each passage. `advance` is told the speed, too."""
        tokens, began = 0, None
        for number in numbers:
            made: list[list[str]] = []
            for samples, real in self._dispatch(collection, shards.rows(number)):
                sampled_BxNxT = np.asarray(samples)[:real]
                made += map(self.vocabulary.decode, sampled_BxNxT)
                if began is None:  # the first batch waited for the compilation
                    began = time.monotonic()
                    advance(real)
                    continue
                tokens += int((sampled_BxNxT > 0).sum())
                advance(real, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
            yield made

    def _dispatch(self, collection: Collection, rows: range) -> list[tuple[jax.Array, int]]:
        """Starts the sampling of all batches: for each (its samples BxNxT, how many passages it has)."""
        texts = [passage.full_text for passage in collection.get(rows)]
        passages = self.vocabulary.batch(texts, self.settings.passage_length)
        dispatched = []
        for first in range(0, len(rows), self.batch_size):
            batch = passages[first : first + self.batch_size]
            real, short = len(batch), self.batch_size - len(batch)
            padded = (np.pad(batch, ((0, short), (0, 0))), rows.start + first + np.arange(self.batch_size))
            dispatched.append((self.sample(self.params, *jax.device_put(padded, self.sharding)), real))
        return dispatched
