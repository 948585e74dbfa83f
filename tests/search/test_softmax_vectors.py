"""Atomic docids found by ScaNN: what the exact softmax finds, with logits for log-probabilities."""

import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import random_params, write_model_folder

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search import softmax_vectors
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.run import docid_softmax

QUERIES = ["smooth a noisy signal", "print a table", "Adam with weight decay"]


@pytest.fixture
def index(own, collection, tmp_path, cli):
    """`index(kind, docids)` makes a searcher of a model of random weights that writes such docids."""
    assert cli("import", *own)[0] == 0
    work = Workspace(tmp_path / "work")

    def run(kind: str, docids: str = "atomic"):
        assert cli("docids", *own, f"--DOCIDS={docids}")[0] == 0
        table, folder = DocidTable.open(work.docids(docids)), tmp_path / "work/models" / docids
        model = GenerativeRetriever(T5Config(1152, 16, 2, 8, 20, 1, 1, **docid_softmax(table)))
        facts = {"docids": docids, "docids_fingerprint": table.fingerprint()}
        if not folder.exists():
            write_model_folder(folder, model, random_params(model), collection, **facts)
        return cli("index", *own, f"--MODEL_DIR={folder}", f"--gin.make_index.kind={kind!r}")

    return run


def test_it_finds_what_the_softmax_does(index, own, cli, collection, tmp_path):
    for kind in ("generative", "softmax_vectors"):
        status, made, err = index(kind)
        assert status == 0, err
    assert made["searcher"] == str(tmp_path / "work/searchers/atomic_softmax_vectors")
    assert made["recall_at_100"] == 1  # so few are searched exactly
    softmax, vectors = (
        Searcher.open(tmp_path / "work/searchers" / name) for name in ("atomic", "atomic_softmax_vectors")
    )
    assert "logits_dense" not in vectors.encoder.params["decoder"]
    for k in (5, 1000):
        for expected, found in zip(softmax.search(QUERIES, k), vectors.search(QUERIES, k), strict=True):
            assert [passage for passage, _ in found] == [passage for passage, _ in expected]
            off = np.subtract([score for _, score in found], [score for _, score in expected])
            np.testing.assert_allclose(off, off[0], atol=1e-5)  # the log-sum-exp of all logits
    assert len(found) == collection.passage_count

    search = ["--SEARCHER=atomic_softmax_vectors", "--SPLIT=dev"]
    for verb in ("search", "evaluate", "export"):
        assert cli(verb, *own, *search)[0] == 0
    moved = (tmp_path / "work/exports/atomic_softmax_vectors").rename(tmp_path / "moved")
    assert Searcher.open(moved).search(QUERIES, 5) == vectors.search(QUERIES, 5)


def test_docids_of_several_tokens_are_refused(index):
    status, _, err = index("softmax_vectors", "naive")
    assert status == 2
    assert "make_index.kind: softmax_vectors is for docids of one token each (atomic)" in err


def test_columns_are_fetched_in_blocks(monkeypatch):
    monkeypatch.setattr(softmax_vectors, "_BLOCK", 7)
    kernel_ExV = jnp.arange(40.0).reshape(2, 20)
    token_N = np.array([19, 1, 8, 6, 7, 13])
    found = np.zeros((6, 2))
    for rows, vectors in softmax_vectors.columns(kernel_ExV, token_N):
        found[rows] = vectors
    np.testing.assert_array_equal(found, np.asarray(kernel_ExV).T[token_N])


def test_columns_are_written_in_the_order_of_the_passages(monkeypatch, tmp_path):
    """Also where the docids were extended, and the order of their tokens is another."""
    monkeypatch.setattr(softmax_vectors, "_BLOCK", 7)
    kernel_ExV = jnp.arange(40.0).reshape(2, 20)
    token_N = np.array([19, 1, 8, 6, 7, 13, 14, 2], np.int32)
    ids = arrow_ids.array([f"p{row}" for row in range(len(token_N))])
    table = DocidTable("atomic", token_N[:, None], ids, 20, "", search="softmax")
    softmax_vectors.write_columns(tmp_path, kernel_ExV, table)
    written = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, np.asarray(kernel_ExV).T[token_N])
