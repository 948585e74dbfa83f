"""Every number of the report against its definition in plain Python."""

import collections
import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids.quality import nearest, plot, report
from retrieval_jax.docids.table import DocidTable

END = 5
# Few tokens, so that much is shared; an end of its own, so that none is a prefix of another.
DOCIDS = st.lists(
    st.lists(st.integers(1, END - 1), max_size=4).map(lambda docid: (*docid, END)), min_size=1, max_size=40
)


def table_of(docids, dtype=np.uint8):
    """A table of docids, one a passage."""
    length = max(map(len, docids))
    tokens = np.array([[*docid, *[0] * (length - len(docid))] for docid in docids], dtype)
    return DocidTable("semantic", tokens, arrow_ids.array(map(str, range(len(docids)))), 300, "")


def below(docids, prefix):
    """Those docids that begin so."""
    return [docid for docid in docids if docid[: len(prefix)] == prefix]


def common(a, b):
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@given(DOCIDS, st.sampled_from([np.uint8, np.uint16, np.int32]))
@settings(deadline=None)
def test_the_tree(docids, dtype):
    found = report(table_of(docids, dtype))
    groups = collections.Counter(docids)
    different = list(groups)
    assert (found["passages"], found["distinct"]) == (len(docids), len(different))
    shared = [docid for docid in docids if groups[docid] > 1]
    assert found["collisions"] == {"passages": len(shared), "largest": max(groups.values())}
    lengths = [len(docid) for docid in different]
    assert found["length"] == {
        "min": min(lengths),
        "mean": pytest.approx(statistics.mean(lengths)),
        "max": max(lengths),
    }

    unique = {
        docid: next(n for n in range(1, len(docid) + 1) if len(below(different, docid[:n])) == 1)
        for docid in different
    }
    assert found["tokens_to_uniqueness"] == {
        "mean": pytest.approx(statistics.mean(unique.values())),
        "max": max(unique.values()),
    }

    expected = []
    for depth in range(max(lengths)):
        nodes = {docid[:depth] for docid in different if len(docid) >= depth}
        nodes = [node for node in nodes if len(below(different, node)) > 1]
        children = [len({docid[depth] for docid in below(different, node)}) for node in nodes]
        if nodes:
            mean = pytest.approx(statistics.mean(children))
            expected.append({"depth": depth, "nodes": len(nodes), "mean": mean, "max": max(children)})
    assert found["fanout"] == expected

    sizes = collections.Counter(docid[: unique[docid] - 1] for docid in different).values()
    bins = found["leaves"].pop("sizes")
    assert found["leaves"] == {
        "leaves": len(sizes),
        "mean": pytest.approx(statistics.mean(sizes)),
        "median": statistics.median(sizes),
        "max": max(sizes),
    }
    for i, some in enumerate(bins):
        assert (some["from"], some["to"]) == (2**i, 2 ** (i + 1) - 1)
        assert some["leaves"] == sum(some["from"] <= size <= some["to"] for size in sizes)
    assert bins[-1]["leaves"] > 0

    for position, some in enumerate(found["entropy"]):
        tokens = [docid[position] for docid in different if len(docid) > position]
        shares = [count / len(tokens) for count in collections.Counter(tokens).values()]
        entropy = -sum(share * math.log(share) for share in shares)
        assert some == {
            "position": position + 1,
            "docids": len(tokens),
            "used": len(shares),
            "relative": pytest.approx(entropy / math.log(len(shares)) if len(shares) > 1 else 1),
        }
    assert len(found["entropy"]) == max(lengths)
    for position, as_many in enumerate(found["perplexity"]):
        counts = collections.Counter(docid[position] for docid in docids if len(docid) > position).values()
        shares = [count / sum(counts) for count in counts]
        assert as_many == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert len(found["perplexity"]) == max(lengths)
    assert "neighbours" not in found
    assert json.loads(json.dumps(found)) == found


@given(DOCIDS.filter(lambda docids: len(docids) > 1), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_neighbours(docids, seed):
    vectors = np.random.default_rng(seed).normal(size=(len(docids), 3)).astype(np.float32)
    count = len(docids)
    k = min(3, count - 1)
    found = report(table_of(docids), vectors, queries=count, neighbours=3)["neighbours"]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [
        (i, j)
        for i in range(count)
        for j in sorted(set(range(count)) - {i}, key=lambda j: -float(unit[i] @ unit[j]))[:k]
    ]
    near = [common(docids[i], docids[j]) for i, j in pairs]
    chance = [common(a, b) for a, b in itertools.permutations(docids, 2)]
    depths = range(1, max(map(len, docids)) + 1)
    assert found == {
        "queries": count,
        "neighbours": k,
        "shares": pytest.approx([statistics.mean(n >= depth for n in near) for depth in depths]),
        "shares_by_chance": pytest.approx([statistics.mean(n >= depth for n in chance) for depth in depths]),
        "mean": pytest.approx(statistics.mean(near)),
        "mean_by_chance": pytest.approx(statistics.mean(chance)),
        "ratio": pytest.approx(statistics.mean(near) / statistics.mean(chance)) if any(chance) else None,
    }
    assert json.loads(json.dumps(found)) == found


def test_by_chance_is_the_mean_over_random_deals():
    generator = np.random.default_rng(0)
    docids = [(*row, END) for row in generator.integers(1, END, (60, 3)).tolist()]
    vectors = generator.normal(size=(60, 4))
    expected = report(table_of(docids), vectors)["neighbours"]
    shares = []
    for _ in range(100):
        dealt = [docids[row] for row in generator.permutation(60)]
        shares.append(report(table_of(dealt), vectors)["neighbours"]["shares"])
    np.testing.assert_allclose(np.mean(shares, 0), expected["shares_by_chance"], atol=0.01)
    assert expected["shares_by_chance"][0] > 0.2


def test_docids_made_of_the_vectors_beat_chance_and_the_seed_chooses_the_queries():
    vectors = np.random.default_rng(1).normal(size=(500, 2))
    angle = ((np.arctan2(*vectors.T) / np.pi + 1) * 32).astype(int)
    table = table_of(
        [(1 + a // 16, 1 + a // 4 % 4, 1 + a % 4, 10 + i // 2) for i, a in enumerate(angle)], np.uint16
    )
    found = report(table, vectors, seed=3, queries=50)
    assert found == report(table, vectors, seed=3, queries=50) != report(table, vectors, seed=4, queries=50)
    assert found["neighbours"]["queries"] == 50
    assert found["neighbours"]["ratio"] > 5


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_nearest_in_blocks(block, tmp_path):
    generator = np.random.default_rng(2)
    vectors = generator.normal(size=(200, 8)).astype(np.float16) * generator.uniform(0.1, 9, (200, 1))
    vectors[17] = 0
    np.save(tmp_path / "vectors.npy", vectors.astype(np.float32))
    queries = np.array([0, 17, 60, 199])
    found = nearest(np.load(tmp_path / "vectors.npy", mmap_mode="r"), queries, 5, block)
    norm = np.linalg.norm(vectors, axis=1)
    cosine = vectors[queries] @ vectors.T / np.maximum(np.outer(norm[queries], norm), 1e-9)
    cosine[range(4), queries] = -2
    expected = np.argsort(-cosine, axis=1, kind="stable")[:, :5]
    assert np.array_equal(found, expected)


def test_one_passage_alone_has_no_neighbours():
    found = report(table_of([(3, END)]), np.ones((1, 2)))
    assert "neighbours" not in found
    assert (found["tokens_to_uniqueness"], found["fanout"]) == ({"mean": 1, "max": 1}, [])
    assert found["leaves"] == {
        "leaves": 1,
        "mean": 1,
        "median": 1,
        "max": 1,
        "sizes": [{"from": 1, "to": 1, "leaves": 1}],
    }


def test_vectors_of_another_collection_are_refused():
    with pytest.raises(
        UserError, match=re.escape("docids/semantic: 2 vectors for 1 passages: encode the same")
    ):
        report(table_of([(3, END)]), np.ones((2, 2)))


@pytest.mark.parametrize(
    "docids", [[(1, END)], [(1,), (2,), (3,)], [(1, 1, END), (1, 2, END), (2, END), (2, END)]]
)
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.filterwarnings("error")
def test_plot_writes_a_png(docids, vectors, tmp_path):
    found = report(
        table_of(docids), np.random.default_rng(0).normal(size=(len(docids), 4)) if vectors else None
    )
    plot(json.loads(json.dumps(found)), tmp_path / "made" / "quality.png")
    assert (tmp_path / "made" / "quality.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        plot(found, tmp_path / "made" / "quality.png" / "below.png")
