"""The same searches on one device and on eight simulated ones, over `data`, over `model`, and over both."""

import os
import subprocess
import sys

SCRIPT = """
import itertools
import math
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from retrieval_jax.core import arrow_ids
from retrieval_jax.data.vocabulary import Vocabulary, learn
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.mesh import partitioning

assert jax.device_count() == 8
learn(["the quick brown fox", "jumps over", "the lazy dog"], 60, Path(sys.argv[1]))
vocabulary = Vocabulary(Path(sys.argv[1]))
queries = ["the fox", "lazy", "over the dog", "quick", "brown", "the", "dog jumps", "fox fox", "a", "over"]
rng = np.random.default_rng(0)
N, OUTPUTS = 100, 128
codes = 2 + np.arange(3) * 40 + rng.integers(0, 40, (N, 3))
kinds = {"atomic": np.arange(1, N + 1)[:, None], "rq_3x40": codes}
BEAMS, BATCH = 12, 8


def most_gathered(searcher):
    # Elements of the largest array that its compiled search puts together from several devices.
    tokens = searcher.place(np.ones((BATCH, 6), np.int32), "data")
    batch, docids = {"encoder_input_tokens": tokens}, searcher.docids
    lowered = searcher._decode.lower(searcher.strategy, searcher.params, batch, docids, BEAMS, None)
    text = lowered.compile().as_text()
    shapes = re.findall(r"= \\w+\\[([\\d,]*)\\]\\S* all-gather(?:-start)?\\(", text)
    return max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)


for kind, score in itertools.product(kinds, ("log_prob", "logits")):
    tokens = kinds[kind]
    search = docid_kind(kind).search.name
    table = DocidTable(kind, tokens, arrow_ids.array(map(str, range(N))), OUTPUTS, "", search=search)
    sizes = {"output_size": OUTPUTS, "separate_target_embedding": kind != "atomic"}
    config = T5Config(128, 32, 8, 8, 64, 1, 1, **sizes)
    model = GenerativeRetriever(config, score=score)
    shapes = {"encoder_input_tokens": (1, 4), "decoder_input_tokens": (1, tokens.shape[1])}
    boxed = jax.jit(lambda key: model.get_initial_variables(key, shapes)["params"])(jax.random.key(0))
    alone = GenerativeSearcher(model, nn.unbox(boxed), table, vocabulary, 6, BEAMS, BATCH)
    expected = alone.search(queries, 10)
    for parallelism in (1, 2, 8) if score == "log_prob" else (2,):
        mesh = partitioning.make_mesh(parallelism)
        placed = jax.device_put(nn.unbox(boxed), partitioning.params_shardings(mesh, boxed))
        kernel = placed["decoder"]["logits_dense"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (32, OUTPUTS // parallelism)
        searcher = GenerativeSearcher(model, placed, table, vocabulary, 6, BEAMS, BATCH, mesh)
        found = searcher.search(queries, 10)
        for query, ranking in zip(expected, found, strict=True):
            assert [p for p, _ in query] == [p for p, _ in ranking], (kind, parallelism)
            np.testing.assert_allclose([s for _, s in query], [s for _, s in ranking], atol=1e-4)
        if parallelism == 2:
            given = searcher.score(queries, [[p for p, _ in ranking] for ranking in expected])
            np.testing.assert_allclose(given, [[s for _, s in ranking] for ranking in expected], atol=1e-4)
        if kind != "atomic":  # no device looks at the beams' children of others' queries
            assert most_gathered(searcher) <= BATCH * BEAMS
    assert len({tuple(p for p, _ in ranking) for ranking in expected}) > 5  # the queries matter

from retrieval_jax.search.exact import ExactSearch

queries = rng.normal(size=(9, 8)).astype(np.float32)
for count in (3, 8, 101):
    vectors = rng.normal(size=(count, 8)).astype(np.float32) - 9  # all dot products may be below 0
    for k in {1, 3, count}:
        wanted = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
        for parallelism in (1, 4):
            rows, scores = ExactSearch(vectors, partitioning.make_mesh(parallelism))(queries, k)
            np.testing.assert_array_equal(rows, wanted)
            products = np.take_along_axis(queries @ vectors.T, wanted, 1)
            np.testing.assert_allclose(scores, products, rtol=1e-5)

# Whole numbers, of which many products are equal: the lower row comes first, wherever it lies.
vectors, whole = (rng.integers(-1, 2, (count, 3)).astype(np.float32) for count in (101, 9))
wanted = np.argsort(-(whole @ vectors.T), axis=1, kind="stable")
for k in (1, 10, 101):
    for parallelism in (1, 2, 8):
        rows, _ = ExactSearch(vectors, partitioning.make_mesh(parallelism))(whole, k)
        np.testing.assert_array_equal(rows, wanted[:, :k])
print("equal")
"""


def test_searches_are_the_same_on_any_mesh(tmp_path):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "sentencepiece.model")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "equal\n", result.stderr
