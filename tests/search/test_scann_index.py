"""ScaNN's index of each size against exact search: as built, and after passages came and went."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import storage
from retrieval_jax.search import scann_index
from retrieval_jax.search.scann_index import ScannIndex

N, E = 3000, 32
SETTINGS = {"exact": {}, "quantised": {"reorder": 800}, "tree": {"reorder": 800, "leaves": 50}}

UPDATE = """
import json, sys
from pathlib import Path
import numpy as np
from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.search import scann_index
from retrieval_jax.embeddings.encoding import Embeddings
before, now, target = map(Path, sys.argv[1:4])
scann_index.settings = lambda count: json.loads(sys.argv[4])
embeddings = Embeddings(now, np.load(now / "vectors.npy"), arrow_ids.read(now / "ids.arrow"),
                        np.load(now / "text_hashes.npy"), {})
index = scann_index.ScannIndex.open(before, storage.read_manifest(before, "index")).update(embeddings)
storage.write_manifest(target, index.write(target))
"""


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, E)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def written(index: ScannIndex, folder: Path) -> Path:
    folder.mkdir()
    storage.write_manifest(folder, index.write(folder))
    return folder


def opened(folder: Path) -> ScannIndex:
    return ScannIndex.open(folder, storage.read_manifest(folder, "index"))


@pytest.mark.parametrize("size", SETTINGS)
def test_passages_come_and_go(size, embeddings, python, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scann_index, "settings", lambda count: SETTINGS[size])
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, N), unit(rng, 50)
    ids = np.array([f"p{i}" for i in range(N)])
    first = embeddings(tmp_path / "first", vectors, ids.tolist())
    index = ScannIndex.build(first)
    told = index.tune(first, queries)
    assert told["recall_at_10"] >= told["recall_at_100"] >= 0.985
    folder = written(index, tmp_path / "index0")

    # In the collection's order: some new passages, those that stayed, of which some have another text.
    state = vectors, ids, np.zeros(N, np.uint64)
    for number, (gone, come, changed) in enumerate([(150, 100, 20), (400, 300, 0)], start=1):
        kept = np.sort(rng.permutation(len(state[1]))[gone:])
        vectors, ids, texts = (x[kept] for x in state)
        vectors[:changed], texts[:changed] = unit(rng, changed), number
        vectors = np.concatenate([unit(rng, come), vectors])
        ids = np.concatenate([[f"n{number}.{i}" for i in range(come)], ids])
        state = vectors, ids, np.concatenate([np.zeros(come, np.uint64), texts])
        now = embeddings(tmp_path / f"now{number}", vectors, ids.tolist(), state[2])
        target = tmp_path / f"index{number}"
        target.mkdir()
        result = python(UPDATE, folder, now.folder, target, json.dumps(SETTINGS[size]))
        assert result.returncode == 0, result.stderr
        # Moved, and opened by another process than wrote it.
        folder = target.rename(tmp_path / f"moved{number}")
        index = opened(folder)
        assert sorted(index.ids.to_pylist()) == sorted(ids)
        assert index.tune(now, queries)["recall_at_100"] >= 0.985
        index.searched_leaves = index.settings.get("leaves")  # all
        rows, scores = index.search(queries, len(ids))
        row_of = {name: row for row, name in enumerate(ids)}
        for query, some, found in zip(queries, rows, scores, strict=True):
            names = index.ids.take(some).to_pylist()
            assert set(names) == set(ids)  # none that went, and each once
            exact = vectors[[row_of[name] for name in names]].astype(np.float64) @ query
            np.testing.assert_allclose(found, exact, atol=1e-5)
        known = storage.read_manifest(folder, "index")["scann"]
        # The second time a tenth has changed: the clusters are fitted anew.
        assert known["changes"] == (gone + come + 2 * changed if number == 1 else 0)
        assert known["training_size"] == (N if number == 1 else len(ids))


def test_no_more_leaves_are_searched_than_needed(embeddings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scann_index, "settings", lambda count: SETTINGS["tree"])
    rng = np.random.default_rng(0)
    centres = unit(rng, 50)
    vectors, queries = (centres[rng.integers(0, 50, count)] + 0.1 * unit(rng, count) for count in (N, 40))
    of = embeddings(tmp_path / "embeddings", vectors, [f"p{i}" for i in range(N)])
    index = ScannIndex.build(of)
    told = index.tune(of, queries, 0.5), index.searched_leaves
    more = index.tune(of, queries, 0.999), index.searched_leaves
    assert told[1] < more[1] <= 50
    assert 0.5 <= told[0]["recall_at_100"] < more[0]["recall_at_100"]
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :100]
    found, _ = index.search(queries, 100)
    shared = np.mean([len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)]) / 100
    assert more[0]["recall_at_100"] == pytest.approx(shared, abs=1e-3)
    assert f"{more[1]} of 50 leaves" in capsys.readouterr().err


def test_more_are_reordered_where_the_recall_needs_it(embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(scann_index, "settings", lambda count: {"reorder": 400})
    rng = np.random.default_rng(0)
    of = embeddings(tmp_path / "embeddings", unit(rng, N), [f"p{i}" for i in range(N)])
    index, queries = ScannIndex.build(of), unit(rng, 50)
    assert index.tune(of, queries, 0)["recall_at_100"] < 1
    assert index.settings == {"reorder": 400}
    assert index.tune(of, queries, 1)["recall_at_100"] == 1
    assert 400 < index.settings["reorder"] <= 3200
    written(index, tmp_path / "index")
    assert opened(tmp_path / "index").settings == index.settings


def test_another_size_is_another_index(embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(scann_index, "settings", functools.partial(scann_index.settings, exact_below=500))
    rng = np.random.default_rng(0)
    vectors, ids = unit(rng, 1500), [f"p{i}" for i in range(1500)]
    few = embeddings(tmp_path / "few", vectors[:400], ids[:400])
    many = embeddings(tmp_path / "many", vectors, ids)
    index = ScannIndex.build(few)
    assert index.settings == {}
    index = index.update(many)
    assert index.settings == {"reorder": 800}
    assert index.tune(many, unit(rng, 20))["recall_at_10"] == 1
    assert index.update(few).settings == {}
