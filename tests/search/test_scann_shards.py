"""ScaNN's shards against exact search: as built, and after passages came and went; in one process and two."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.checkpoints import checksums
from retrieval_jax.core import storage
from retrieval_jax.search import scann_index, scann_shards
from retrieval_jax.search.scann_shards import Indexed, ScannIndex, merged

N, E = 3000, 32
SETTINGS = {
    "exact": {},
    "quantised": {"reorder": 800},
    "tree": {"reorder": 800, "leaves": 50},
    "shards": {"reorder": 270, "leaves": 30, "shards": 3},
}

UPDATE = """
import json, sys
from pathlib import Path
import numpy as np
from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.search import scann_index, scann_shards
from retrieval_jax.embeddings.encoding import Embeddings

def embeddings_in(folder):
    arrays = (np.load(folder / f"{name}.npy") for name in ("vectors", "text_hashes"))
    vectors, texts = arrays
    return Embeddings(folder, vectors, arrow_ids.read(folder / "ids.arrow"), texts, {})

was, before, now, target = map(Path, sys.argv[1:5])
scann_index.settings = lambda count: json.loads(sys.argv[5])
earlier = embeddings_in(was)
facts = storage.read_json(before / "facts.json", "")
indexed = scann_shards.Indexed(before, facts, earlier.ids, earlier.text_hashes_N)
index = scann_shards.build(target, embeddings_in(now), "float32", {}, indexed)
storage.write_json(target / "facts.json", index.facts)
"""


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, E)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def written(index: ScannIndex, folder: Path) -> Path:
    storage.write_json(folder / "facts.json", index.facts)
    return folder


def opened(folder: Path) -> ScannIndex:
    return ScannIndex.open(folder, storage.read_json(folder / "facts.json", ""))


@pytest.mark.parametrize("size", SETTINGS)
def test_passages_come_and_go(size, embeddings, python, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scann_index, "settings", lambda count: SETTINGS[size])
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, N), unit(rng, 50)
    ids = np.array([f"p{i}" for i in range(N)])
    was = embeddings(tmp_path / "first", vectors, ids.tolist())
    index = scann_shards.build(tmp_path / "index0", was, "float32", {})
    told = index.tune(was, queries)
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
        result = python(UPDATE, was.folder, folder, now.folder, target, json.dumps(SETTINGS[size]))
        assert result.returncode == 0, result.stderr
        was = now
        # Moved, and opened by another process than wrote it.
        folder = target.rename(tmp_path / f"moved{number}")
        index = opened(folder)
        assert sorted(row for shard in index.shards for row in shard.rows_M) == [*range(len(ids))]
        assert index.tune(now, queries)["recall_at_100"] >= 0.985
        index.searched_leaves = index.settings.get("leaves")  # all
        rows, scores = index.search(queries, len(ids))
        for query, some, found in zip(queries, rows, scores, strict=True):
            assert sorted(some) == [*range(len(ids))]  # none that went, and each once
            exact = vectors[some].astype(np.float64) @ query
            np.testing.assert_allclose(found, exact, atol=1e-5)
        # When a tenth of a shard has changed, its clusters are fitted anew: of all the second time.
        for shard, facts in zip(index.shards, index.all_facts, strict=True):
            assert facts["changes"] <= 0.1 * facts["training_size"]
            if not facts["changes"]:
                assert facts["training_size"] == len(shard.rows_M)
        sums = {name: sum(shard[name] for shard in index.all_facts) for name in ("changes", "training_size")}
        if size != "shards" or number == 2:
            assert sums["changes"] == (gone + come + 2 * changed if number == 1 else 0)
            assert sums["training_size"] == (N if number == 1 else len(ids))
        else:
            assert 0 < sums["changes"] < gone + come + 2 * changed
        sizes = [len(shard.rows_M) for shard in index.shards]
        assert max(sizes) - min(sizes) <= len(sizes)  # the new ones went where there was room


def around(centres: int, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and 40 queries at a distance from random centres."""
    rng = np.random.default_rng(0)
    middle = unit(rng, centres)
    return tuple(middle[rng.integers(0, centres, count)] + distance * unit(rng, count) for count in (N, 40))


def test_no_more_leaves_are_searched_than_needed(embeddings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scann_index, "settings", lambda count: SETTINGS["tree"])
    vectors, queries = around(50, 0.1)
    of = embeddings(tmp_path / "embeddings", vectors, [f"p{i}" for i in range(N)])
    index = scann_shards.build(tmp_path / "index", of, "float32", {})
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
    index, queries = scann_shards.build(tmp_path / "index", of, "float32", {}), unit(rng, 50)
    assert index.tune(of, queries, 0)["recall_at_100"] < 1
    assert index.settings == {"reorder": 400}
    assert index.tune(of, queries, 1)["recall_at_100"] == 1
    assert 400 < index.settings["reorder"] <= 3200
    assert opened(written(index, tmp_path / "index")).settings == index.settings


def test_what_rounding_takes_is_not_searched_for(embeddings, tmp_path, monkeypatch):
    """int8 never has a recall of 1: that is no reason to search everything."""
    monkeypatch.setattr(scann_index, "settings", lambda count: SETTINGS["shards"])
    vectors, queries = around(20, 0.3)
    of = embeddings(tmp_path / "embeddings", vectors, [f"p{i}" for i in range(N)])
    index = scann_shards.build(tmp_path / "index", of, "int8", {})
    told = index.tune(of, queries, 1)
    assert 0.95 < told["recall_at_100"] < 1
    assert index.searched_leaves < 30


def test_another_size_is_another_index(embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(scann_index, "settings", functools.partial(scann_index.settings, exact_below=500))
    rng = np.random.default_rng(0)
    vectors, ids = unit(rng, 1500), [f"p{i}" for i in range(1500)]
    few = embeddings(tmp_path / "few", vectors[:400], ids[:400])
    many = embeddings(tmp_path / "many", vectors, ids)

    def updated(folder: str, was, index: ScannIndex, now) -> ScannIndex:
        earlier = Indexed(tmp_path / folder, index.facts, was.ids, was.text_hashes_N)
        return scann_shards.build(tmp_path / f"{folder}.now", now, "float32", {}, earlier)

    index = scann_shards.build(tmp_path / "index", few, "float32", {})
    assert index.settings == {}
    index = updated("index", few, index, many)
    assert index.settings == {"reorder": 800}
    assert index.tune(many, unit(rng, 20))["recall_at_10"] == 1
    assert updated("index.now", many, index, few).settings == {}


def test_smaller_shards_and_damaged_ones_are_built_again(embeddings, tmp_path, monkeypatch):
    whole = scann_index.settings

    def sized(size: int) -> None:
        chosen = functools.partial(whole, exact_below=0, reorder=3000, shard_size=size)
        monkeypatch.setattr(scann_index, "settings", chosen)

    def updated(folder: str, was, index: ScannIndex, now) -> ScannIndex:
        earlier = Indexed(tmp_path / folder / "shards", index.facts, was.ids, was.text_hashes_N)
        return scann_shards.build(tmp_path / f"{folder}.now" / "shards", now, "float32", {}, earlier)

    rng = np.random.default_rng(0)
    vectors, ids = unit(rng, N), [f"p{i}" for i in range(N)]
    few = embeddings(tmp_path / "few", vectors[:2800], ids[:2800])
    many = embeddings(tmp_path / "many", vectors, ids)
    sized(1450)
    first = scann_shards.build(tmp_path / "a" / "shards", few, "float32", {})
    assert [len(shard.rows_M) for shard in first.shards] == [1400, 1400]
    # One more shard is due: what is there stays, and no shard has more vectors than it may.
    grown = updated("a", few, first, many)
    assert [len(shard.rows_M) for shard in grown.shards] == [1400, 1400, 200]
    assert grown.facts["settings"]["shards"] == 3
    sized(1000)
    smaller = updated("a.now", many, grown, many)
    assert [len(shard.rows_M) for shard in smaller.shards] == [1000] * 3

    checksums.write(tmp_path / "a")
    sized(1450)
    path = next((tmp_path / "a/shards/001/scann").glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-1])
    storage.paths.remove(tmp_path / "a.now")
    mended = updated("a", few, first, many)
    assert [len(shard.rows_M) for shard in mended.shards] == [1400, 1400, 200]
    assert [shard.changes for shard in mended.shards] == [0] * 3
    queries = unit(rng, 10)
    rows, _ = mended.search(queries, 10)
    np.testing.assert_array_equal(rows, np.argsort(-(queries @ vectors.T), axis=1)[:, :10])


def test_shards_that_are_there_are_not_built_again(embeddings, tmp_path, monkeypatch):
    """Nor do their number and their rows depend on anything but the number of vectors."""
    monkeypatch.setattr(scann_index, "settings", functools.partial(scann_index.settings, shard_size=1100))
    of = embeddings(tmp_path / "e", unit(np.random.default_rng(0), N), [f"p{i}" for i in range(N)])
    build, calls = scann_index.build, []

    def counted(vectors, *rest):
        calls.append(len(vectors))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return build(vectors, *rest)

    monkeypatch.setattr(scann_index, "build", counted)
    with pytest.raises(KeyboardInterrupt):
        scann_shards.build(tmp_path / "index", of, "int8", {"of": 1})
    index = scann_shards.build(tmp_path / "index", of, "int8", {"of": 1})
    assert calls == [1000] * 4  # the third one again
    assert [shard.rows_M[0] for shard in index.shards] == [0, 1000, 2000]
    scann_shards.build(tmp_path / "index", of, "int8", {"of": 2})
    assert len(calls) == 7
    scann_shards.copy_shards(tmp_path / "index", tmp_path / "copy", 3)
    assert len(ScannIndex.open(tmp_path / "copy", index.facts).shards) == 3


def test_what_several_find_is_merged():
    nan = np.nan
    one = (
        np.array([[7, 3, 0], [2, 0, 0]], np.int32),
        np.array([[0.5, 0.25, nan], [nan, nan, nan]], np.float32),
    )
    other = np.array([[5, 1], [4, 8]], np.int32), np.array([[0.5, -1], [-2, -3]], np.float32)
    rows, scores = merged([one, other], 4)
    np.testing.assert_array_equal(rows[0], [5, 7, 3, 1])
    np.testing.assert_array_equal(scores[0], np.array([0.5, 0.5, 0.25, -1], np.float32))
    np.testing.assert_array_equal(rows[1, :2], [4, 8])
    np.testing.assert_array_equal(scores[1], np.array([-2, -3, nan, nan], np.float32))
    rows, scores = merged([other], 3)
    assert rows.shape == scores.shape == (2, 3)
    assert np.isnan(scores[:, 2]).all()


def test_two_processes_give_what_one_gives(embeddings, tmp_path: Path):
    """Each builds and opens its own shards, and has its own blocks of an exact search."""
    script = """
import functools, sys
from pathlib import Path
import jax, numpy as np
from retrieval_jax.core import arrow_ids, storage
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.search import exact, scann_index, scann_shards
multihost.initialize("index")
of, index_folder, found = map(Path, sys.argv[1:4])
scann_index.settings = functools.partial(
    scann_index.settings, exact_below=0, tree_from=0, reorder=300, shard_size=1100
)
vectors, queries = (np.load(of / f"{name}.npy", mmap_mode="r") for name in ("vectors", "queries"))
of = Embeddings(of, vectors, arrow_ids.read(of / "ids.arrow"), np.load(of / "text_hashes.npy"), {})
index = scann_shards.build(index_folder, of, "bfloat16", {})
assert len(index.shards) == (2 - jax.process_index() if jax.process_count() == 2 else 3)
recalls = index.tune(of, queries, 0.9)
exact._elements = lambda *_: 32 * 512
exactly = exact.ExactSearch(vectors, all_devices())(queries, 150)
np.savez(f"{found}.{jax.process_index()}.npz", *index.search(queries, 150), *exactly, *recalls.values(),
         index.searched_leaves, index.settings["reorder"])

if jax.process_count() == 2:
    if jax.process_index() == 1:
        def build(*_):
            raise UserError("the disk is full")
        scann_index.build = build
    try:
        scann_shards.build(index_folder.with_name("failing"), of, "bfloat16", {})
    except UserError as error:
        expected = ("process 1 met an error", "the disk is full")[jax.process_index()]
        assert expected in str(error), error
    else:
        raise AssertionError
"""
    rng = np.random.default_rng(0)
    of = embeddings(tmp_path / "e", unit(rng, N), [f"p{i}" for i in range(N)])
    np.save(of.folder / "queries.npy", unit(rng, 20))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def run(name: str, index: str, processes: int) -> list[list[np.ndarray]]:
        """Of as many devices in all."""
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment["JAX_NUM_CPU_DEVICES"] = str(2 // processes)
        if processes > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        command = [
            sys.executable,
            "-c",
            script,
            *map(str, (of.folder, tmp_path / index, tmp_path / name)),
        ]
        started = [
            subprocess.Popen(
                command, env=environment | {"JAX_PROCESS_ID": str(process)}, stderr=subprocess.PIPE
            )
            for process in range(processes)
        ]
        told = [process.communicate(timeout=300)[1].decode() for process in started]
        assert [process.returncode for process in started] == [0] * processes, "\n".join(told)
        files = [np.load(tmp_path / f"{name}.{process}.npz") for process in range(processes)]
        return [[file[key] for key in file.files] for file in files]

    # ScaNN draws its clusters at random: only of the same shards are the results the same.
    together, alone, apart = run("two", "index", 2), run("one", "index", 1), run("apart", "apart", 1)
    for number in range(3):
        for name in ("rows.npy", "scann/bfloat16_dataset.npy"):
            shards = [np.load(tmp_path / index / f"00{number}" / name) for index in ("index", "apart")]
            assert len(shards[0]) == N // 3
            np.testing.assert_array_equal(*shards)
    for found in together:
        for x, y in zip(found, alone[0], strict=True):
            np.testing.assert_array_equal(x, y)
    _, _, exact_rows, *_ = alone[0]
    vectors, queries = of.vectors_NxE, np.load(of.folder / "queries.npy")
    np.testing.assert_array_equal(exact_rows, np.argsort(-(queries @ vectors.T), axis=1)[:, :150])
    for rows, *_ in (alone[0], apart[0]):
        shared = [np.isin(a[:100], b[:100]).mean() for a, b in zip(exact_rows, rows, strict=True)]
        assert np.mean(shared) >= 0.9
