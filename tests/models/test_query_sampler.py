"""Sampled queries depend on the seed and on the passage alone, not on batches or shards."""

import jax
import numpy as np
from model_folders import random_params

from retrieval_jax.data.collection import Collection
from retrieval_jax.data.synthetic import QueryShards
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.query_sampler import QuerySampler, SamplingSettings


def test_batches_and_shards_do_not_matter(collection: Collection, tmp_path):
    vocabulary = Vocabulary(collection.vocabulary_path)
    model = QueryGenerator(T5Config(vocabulary.size, 8, 1, 8, 16, 1, 1, embedding_init_std=3.0))
    params = random_params(model)

    def sample(batch_size: int, shard_size: int, numbers: list[int], seed: int = 0) -> list[list[str]]:
        settings = SamplingSettings(2, 1.0, 10, seed, batch_size, passage_length=8, query_length=4)
        sampler = QuerySampler(model, params, vocabulary, all_devices(), settings)
        shards, done = QueryShards(tmp_path, collection.passage_count, shard_size), []
        made = sampler.queries(collection, shards, numbers, lambda n, note="": done.append(n))
        queries = [some for shard in made for some in shard]
        assert sum(done) == len(queries)
        return queries

    found = sample(8, 10, [1, 2])
    assert sample(5, 20, [0])[10:] + sample(5, 20, [1])[:10] == found
    assert sample(8, 10, [1, 2], seed=1) != found
    # Straight from the model.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(10, 30))
    passages = vocabulary.batch([p.full_text for p in collection.get(range(10, 30))], 8)
    tokens, _ = jax.jit(model.sample, static_argnums=(3, 4))(params, passages, keys, 2, 4)
    assert [vocabulary.decode(some) for some in np.asarray(tokens)] == found
