"""ScaNN's index of each size against exact search: as built, and after passages came and went."""

from pathlib import Path

import numpy as np
import pytest

from retrieval_jax import storage
from retrieval_jax.search import scann_index
from retrieval_jax.search.dense import recall, search_scann
from retrieval_jax.search.scann_index import ScannIndex

N, E = 3000, 32
SIZES = {"exact": (N * 9, N * 9), "quantised": (10, N * 9), "tree": (10, 20)}

UPDATE = """
import json, sys
from pathlib import Path
import numpy as np
from retrieval_jax import arrow_ids, storage
from retrieval_jax.search import scann_index
from retrieval_jax.search.encoding import Embeddings
before, now, target = map(Path, sys.argv[1:4])
scann_index.EXACT_BELOW, scann_index.TREE_FROM = map(int, sys.argv[4:])
embeddings = Embeddings(now, np.load(now / "vectors.npy"), arrow_ids.read(now / "ids.arrow"),
                        np.load(now / "texts.npy"), {})
index = scann_index.ScannIndex.open(before, storage.read_manifest(before, "index")).update(embeddings)
storage.write_json(target / "manifest.json", index.write(target))
"""


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, E)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def written(index: ScannIndex, folder: Path) -> Path:
    folder.mkdir()
    storage.write_json(folder / "manifest.json", index.write(folder))
    return folder


def opened(folder: Path) -> ScannIndex:
    return ScannIndex.open(folder, storage.read_manifest(folder, "index"))


@pytest.mark.parametrize("size", SIZES)
def test_passages_come_and_go(size, embeddings, python, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scann_index, "EXACT_BELOW", SIZES[size][0])
    monkeypatch.setattr(scann_index, "TREE_FROM", SIZES[size][1])
    monkeypatch.setattr(scann_index, "settings", everywhere(scann_index.settings))
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, N), unit(rng, 50)
    ids = np.array([f"p{i}" for i in range(N)])
    first = embeddings(tmp_path / "first", vectors, ids.tolist())
    index = ScannIndex.build(first)
    assert recall(index, first, queries)["recall_at_10"] == 1
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
        bounds = SIZES[size]
        result = python(UPDATE, folder, now.folder, target, *bounds)
        assert result.returncode == 0, result.stderr
        # Moved, and opened by another process than wrote it.
        folder = target.rename(tmp_path / f"moved{number}")
        index = opened(folder)
        assert sorted(index.ids.to_pylist()) == sorted(ids)
        assert recall(index, now, queries)["recall_at_10"] > 0.99
        rows, scores = search_scann(index.searcher, queries, len(ids), len(ids), index.settings.get("leaves"))
        row_of = {name: row for row, name in enumerate(ids)}
        for query, some, found in zip(queries, rows, scores, strict=True):
            names = index.ids.take(some).to_pylist()
            assert set(names) == set(ids)  # none that went, and each once
            exact = vectors[[row_of[name] for name in names]].astype(np.float64) @ query
            np.testing.assert_allclose(found, exact, atol=1e-5)
        known = storage.read_manifest(folder, "index")["scann"]
        # The second time a tenth has changed: the clusters are fitted anew.
        assert known["changes"] == (gone + come + 2 * changed if number == 1 else 0)
        assert known["trained_on"] == (N if number == 1 else len(ids))


def everywhere(settings):
    """The same, searching all leaves: what is not found then is the index's fault."""

    def found(count: int) -> dict:
        chosen = settings(count)
        return chosen | ({"leaves_to_search": chosen["leaves"]} if "leaves" in chosen else {})

    return found


def test_another_size_is_another_index(embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(scann_index, "EXACT_BELOW", 500)
    rng = np.random.default_rng(0)
    vectors, ids = unit(rng, 1500), [f"p{i}" for i in range(1500)]
    few = embeddings(tmp_path / "few", vectors[:400], ids[:400])
    many = embeddings(tmp_path / "many", vectors, ids)
    index = ScannIndex.build(few)
    assert index.settings == {}
    index = index.update(many)
    assert index.settings == {"reorder": 1000}
    assert recall(index, many, unit(rng, 20))["recall_at_10"] == 1
    assert index.update(few).settings == {}
