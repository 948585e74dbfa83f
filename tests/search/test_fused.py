"""Fused searchers: what they find by hand, how they are made by the verb, and what they refuse."""

import json
from collections.abc import Sequence
from pathlib import Path

import ir_measures
import numpy as np
import pytest

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.search import fused
from retrieval_jax.search.fused import FusedSearcher
from retrieval_jax.search.fusion import DEPTHS, Fusion
from retrieval_jax.search.index_inputs import IndexSettings
from retrieval_jax.search.searcher import RankedList, Searcher

QUERIES = ["smooth a noisy signal", "print a table", "qqq"]


class Listed(Searcher):
    """Finds what it was given: query -> passage -> score."""

    def __init__(self, scores: dict[str, dict[str, float]]):
        self.scores = scores

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        return [sorted(self.scores[q].items(), key=lambda pair: -pair[1])[:k] for q in queries]

    def score(self, queries, candidates):
        pairs = zip(queries, candidates, strict=True)
        return [[self.scores[q].get(p, float("nan")) for p in wanted] for q, wanted in pairs]


A = Listed({"x": {"a": 9.0, "b": 8.0, "c": 5.0, "d": 1.0}, "y": {"a": 1.0}, "z": {}})
B = Listed({"x": {"b": 0.5, "d": 0.4, "e": 0.1}, "y": {}, "z": {}})


def test_lists_are_fused():
    searcher = FusedSearcher([A, B], Fusion("min_max", (0.5, 0.5), 3))
    x, y, z = searcher.search(["x", "y", "z"], 10)
    # a: (9-5)/4 / 2; b: (3/4 + 1) / 2; c: 0; d: (.4-.1)/.4 / 2, as it is fourth of the first list; e: 0.
    assert [p for p, _ in x] == ["b", "a", "d", "c", "e"]
    assert dict(x) == pytest.approx({"b": 0.875, "a": 0.5, "d": 0.375, "c": 0, "e": 0})
    assert (y, z) == ([("a", 0.5)], [])
    assert searcher.search([], 10) == []
    assert searcher.search(["x", "z"], 0) == searcher.search(["x", "z"], -1) == [[], []]


def test_an_explanation_adds_up_to_the_scores():
    searcher = FusedSearcher([A, B], Fusion("min_max", (0.5, 0.5), 3), ["one", "two"])
    (found,) = searcher.search(["x"], 10)
    why = searcher.explain("x", found)
    assert (why["fusion"], why["certain"]) == ("min_max", None)
    sums = {one["passage"]: sum(part["adds"] for part in one["parts"]) for one in why["docids"]}
    assert sums == pytest.approx(dict(found))
    assert [one["passage"] for one in why["docids"]] == [passage for passage, _ in found]
    assert why["docids"][2] == {  # fourth of the first list, of which three count
        "passage": "d",
        "parts": [
            {"part": "one", "rank": None, "score": None, "adds": 0.0},
            {"part": "two", "rank": 2, "score": 0.4, "adds": pytest.approx(0.375)},
        ],
    }
    reranking = FusedSearcher([A, B], Fusion("rerank", (0.5, 0.5), 3))
    (found,) = reranking.search(["x"], 10)
    b, *_, rest = reranking.explain("x", found)["docids"]
    assert [(part["rank"], part["score"], part["adds"]) for part in b["parts"]] == [
        (2, 8.0, 0.375),
        (None, 0.5, 0.5),
    ]
    assert rest == {"passage": "d", "parts": []}
    assert searcher.explain("z", []) == {"certain": None, "fusion": "min_max", "docids": []}


@pytest.mark.parametrize("method", DEPTHS)
def test_a_shorter_list_is_the_beginning_of_a_longer_one(method):
    searcher = FusedSearcher([A, B], Fusion(method, (0.3, 0.7), 2))
    (longest,) = searcher.search(["x"], 10)
    for k in range(1, 6):
        assert searcher.search(["x"], k) == [longest[:k]]
        assert searcher.search(["y", "x"], k)[1] == longest[:k]


def test_the_first_part_finds_and_the_others_score():
    (found,) = FusedSearcher([A, B], Fusion("rerank", (0, 1), 3)).search(["x"], 10)
    # Of a, b and c the second part knows b alone, whose scores' spread is 0; d is below the depth.
    assert found == [("b", 1.0), ("a", 0.0), ("c", 0.0), ("d", -4.0)]
    (found,) = FusedSearcher([A, B], Fusion("rerank", (0.5, 0.5), 4)).search(["x"], 3)
    assert found == [("b", 0.5 * 7 / 8 + 0.5), ("a", 0.5), ("c", 0.25)]
    assert FusedSearcher([A, B], Fusion("rerank", (0, 1), 3)).search(["z", "y"], 3) == [[], [("a", 0.0)]]


@pytest.mark.parametrize("method", DEPTHS)
def test_given_passages_have_the_scores_of_a_search(method):
    """Of each part its own, on the scale of what it found, also for a passage below its depth."""
    searcher = FusedSearcher([A, B], Fusion(method, (0.3, 0.7), 3))
    queries = ["x", "z", "y"]
    for query, ranked_list in zip(queries, searcher.search(queries, 10), strict=True):
        known = {passage for part in (A, B) for passage in part.scores[query]}
        in_full = {p: s for p, s in ranked_list if p in A.scores[query] and p in B.scores[query]}
        if method != "reciprocal_rank":
            in_full.pop("d", None)  # below the first part's depth
        (given,) = searcher.score([query], [[*in_full, *known, "nowhere"]])
        assert given[: len(in_full)] == [*in_full.values()]
        assert not np.isnan(given[:-1]).any()
        assert np.isnan(given[-1])
    assert searcher.score(["z", "x"], [["a"], []]) == [[pytest.approx(np.nan, nan_ok=True)], []]
    assert searcher.score([], []) == []


@pytest.mark.parametrize("method", ["min_max", "z", "rerank"])
def test_what_no_part_found_is_scored_by_all_that_can(method):
    """A positive below every list's end is not below negatives that the parts score lower."""
    rng = np.random.default_rng(0)
    scores = [{f"p{i}": float(x) for i, x in enumerate(rng.normal(size=12))} for _ in range(2)]
    parts, weights, depth = [Listed({"x": of_part}) for of_part in scores], (0.4, 0.6), 4
    (given,) = FusedSearcher(parts, Fusion(method, weights, depth)).score(["x"], [list(scores[0])])
    best = [sorted(of_part, key=of_part.get)[-depth:] for of_part in scores]
    expected = np.zeros(12)
    for of_part, weight, ids in zip(scores, weights, best, strict=True):
        found = [of_part[p] for p in (best[0] if method == "rerank" else ids)]
        if method == "z":
            low, spread = np.mean(found), np.std(found)
        else:
            low, spread = min(found), max(found) - min(found)
        expected += weight * (np.array(list(of_part.values())) - low) / spread
    assert given == pytest.approx(expected)
    assert sum(p not in {*best[0], *best[1]} for p in scores[0]) > 3  # many were found by none

    # A part that cannot score adds what a search does.
    class Finder(Listed):
        score = Searcher.score

    parts[0] = Finder(parts[0].scores)
    if method == "min_max":
        (given,) = FusedSearcher(parts, Fusion(method, weights, depth)).score(["x"], [list(scores[0])])
        low, high = (f(scores[0][p] for p in best[0]) for f in (min, max))
        expected -= [0 if p in best[0] else 0.4 * (s - low) / (high - low) for p, s in scores[0].items()]
        assert given == pytest.approx(expected)


@pytest.mark.parametrize("method", ["min_max", "z"])
def test_given_scores_beside_one_or_no_found_passage(method):
    one, none = Listed({"x": {"a": 2.0, "b": 1.0}}), Listed({"x": {}})
    none.score = lambda queries, candidates: [[3.0] * len(wanted) for wanted in candidates]
    (given,) = FusedSearcher([one, none], Fusion(method, (1, 5), 1)).score(["x"], [["a", "b"]])
    assert given == ([1.0, 0.0] if method == "min_max" else [0.0, -1.0])


@pytest.mark.parametrize("method", [None, "min_max", "z", "rerank"])
def test_weights_are_fitted_on_what_a_search_finds(method):
    """Also for queries that are passages, which their parts score far above the others."""
    rng, texts = np.random.default_rng(0), [f"q{i}" for i in range(12)]
    relevant = {f"p{i}": 1 for i in range(12, 30, 5)}
    parts = [
        Listed({
            q: {f"p{i}": rng.normal() + relevant.get(f"p{i}", 0) for i in rng.permutation(30)[:20]}
            for q in texts
        })
        for _ in range(2)
    ]  # fmt: skip
    queries = []
    for number, text in enumerate(texts):
        own = f"p{number}"
        for part, score in zip(parts, (9.0, 3.0), strict=True):
            part.scores[text][own] = score
        is_own = number % 3 > 0
        queries.append(Query(own if is_own else text, text, relevant | {own: 1}, is_passage=is_own))

    def measured(searcher: Searcher) -> float:
        run = dict(zip([query.id for query in queries], searcher.search(texts, 12), strict=True))
        run = {qid: {p: -float(i) for i, (p, _) in enumerate(one) if p != qid} for qid, one in run.items()}
        qrels = {query.id: query.relevant for query in queries}
        (value,) = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run).values()
        return value

    choice, alone = fused.fit(parts, queries, IndexSettings(fusion=method, depth=14))
    assert choice.ndcg == pytest.approx(measured(FusedSearcher(parts, choice.fusion)), abs=1e-9)
    assert alone == pytest.approx([measured(part) for part in parts], abs=1e-9)
    if method is None:
        every = [(name, w / 20) for name in ("min_max", "z", "reciprocal_rank") for w in range(1, 20)]
        others = [measured(FusedSearcher(parts, Fusion(name, (w, 1 - w), 14))) for name, w in every]
        assert choice.ndcg == pytest.approx(max(*others, *alone), abs=1e-9)


@pytest.fixture
def two(own, cli, tmp_path: Path):
    """Two BM25 searchers, `stemmed` and `plain`; the bindings that make a fused one of them."""
    assert cli("import", *own)[0] == 0
    for name, language in (("stemmed", "'porter'"), ("plain", "None")):
        flags = [f"--gin.make_index.name={name!r}", f"--gin.make_index.language={language}"]
        assert cli("index", *own, *flags)[0] == 0
    return [*own, "--gin.make_index.kind='fused'", "--gin.make_index.parts=('stemmed', 'plain')"]


def test_weights_are_chosen_on_dev_alone(two, cli, tmp_path, monkeypatch):
    asked, queries = [], Collection.queries
    monkeypatch.setattr(
        Collection, "queries", lambda self, split: asked.append(split) or queries(self, split)
    )
    opened, open_searcher = [], Searcher.open
    opening = staticmethod(lambda folder, make=None: opened.append(make) or open_searcher(folder, make))
    monkeypatch.setattr(Searcher, "open", opening)
    status, made, err = cli("index", *two)
    assert status == 0, err
    assert asked == ["dev"]
    assert opened == [make_partitioner] * 2  # the parts search on the mesh that the user chose
    assert made["fitted"]["split"] == "dev"
    assert made["fitted"]["queries"] == len(queries(Collection(tmp_path / "work/collection"), "dev"))
    assert made["fitted"]["nDCG@10"] >= max(made["fitted"]["alone"].values()) - 1e-9
    assert sum(made["fused_by"]["weights"]) == pytest.approx(1)

    # The manifest's figure is that of the searcher's run, as it is evaluated.
    for name in ("fused", "plain"):
        for verb in ("search", "evaluate"):
            assert cli(verb, *two, f"--gin.SEARCHER={name!r}", "--SPLIT=dev")[0] == 0
    metrics = storage.read_json(tmp_path / "work/metrics.json", "")
    assert metrics["fused"]["nDCG@10"] == pytest.approx(made["fitted"]["nDCG@10"], abs=1e-9)
    assert metrics["plain"]["nDCG@10"] == pytest.approx(made["fitted"]["alone"]["plain"], abs=1e-9)

    # The same command again makes nothing; equal weights, or others, are another searcher.
    folder = tmp_path / "work/searchers/fused"
    before = folder.stat().st_ino
    assert cli("index", *two)[1] == made
    assert folder.stat().st_ino == before
    status, made, err = cli("index", *two, "--gin.make_index.fit_split=None")
    assert status == 0, err
    assert made["fused_by"] == {"method": "min_max", "weights": [0.5, 0.5], "depth": 200}
    assert "fitted" not in made
    given = [
        "--gin.make_index.weights=(0, 1)",
        "--gin.make_index.fusion='rerank'",
        "--gin.make_index.depth=5",
    ]
    assert cli("index", *two, *given)[0] == 0
    found, stemmed, plain = (Searcher.open(folder.parent / name) for name in ("fused", "stemmed", "plain"))
    for query in QUERIES:
        best = [passage for passage, _ in stemmed.search([query], 5)[0]]
        score = dict(plain.search([query], 1000)[0])
        wanted = sorted(best, key=lambda passage: -score.get(passage, 0))
        assert [passage for passage, _ in found.search([query], 5)[0]] == wanted


def test_parts_that_changed_are_told(two, cli, tmp_path):
    assert cli("index", *two)[0] == 0
    folder = tmp_path / "work/searchers/fused"
    search = ["search", *two, "--gin.SEARCHER='fused'", "--QUERY=a table"]
    assert cli(*search)[0] == 0
    other = ["--gin.make_index.name='plain'", "--gin.make_index.language='english'"]
    assert cli("index", *two[:-2], *other)[0] == 0
    status, _, err = cli(*search)
    assert status == 2
    assert f"searchers/plain: not the searcher that {folder} was made of: make fused again" in err
    with pytest.raises(UserError, match="plain: not the searcher that"):
        Searcher.open(folder)
    assert cli("export", *two, "--gin.SEARCHER='fused'")[0] == 2
    assert cli("index", *two)[0] == 0
    assert cli(*search)[0] == 0
    # A fused searcher of a fused one knows the parts of its parts.
    nested = ["--gin.make_index.name='nested'", "--gin.make_index.parts=('fused', 'stemmed')"]
    assert cli("index", *two, *nested)[0] == 0
    assert cli("index", *two[:-2], "--gin.make_index.name='plain'", "--gin.make_index.language=None")[0] == 0
    status, _, err = cli("search", *two, "--gin.SEARCHER='nested'", "--QUERY=a table")
    assert status == 2
    assert "searchers/plain: not the searcher" in err
    # Made of itself, it would never again be what it was made of.
    for part, words in (("fused", "fused would be a part of itself:"), ("nested", "of itself (by nested)")):
        status, _, err = cli("index", *two, f"--gin.make_index.parts=({part!r}, 'plain')")
        assert status == 2
        assert words in err
    assert cli("index", *two)[0] == 0


def test_an_exported_one_holds_its_parts(two, cli, tmp_path):
    assert cli("index", *two)[0] == 0
    expected = Searcher.open(tmp_path / "work/searchers/fused").search(QUERIES, 20)
    assert cli("export", *two, "--gin.SEARCHER='fused'")[0] == 0
    moved = (tmp_path / "work/exports/fused").rename(tmp_path / "moved")
    (tmp_path / "work").rename(tmp_path / "gone")
    assert Searcher.open(moved).search(QUERIES, 20) == expected
    manifest = json.loads((moved / "manifest.json").read_text())
    assert [part["folder"] for part in manifest["parts"]] == ["parts/stemmed", "parts/plain"]
    assert "made of others" in (moved / "README.md").read_text()
    (file,) = (moved / "parts/plain").glob("ids.arrow")
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"parts/plain/ids\.arrow was changed after it was exported"):
        Searcher.open(moved)


REFUSED = {
    "parts=('stemmed',)": "make_index.parts: a fused searcher is made of two or more different",
    "parts=('stemmed', 'stemmed')": "make_index.parts: a fused searcher is made of two or more",
    "parts=('stemmed', 'other')": "searchers/other: nothing finished here: make it with",
    "fusion='sum'": "make_index.fusion: 'sum'",
    "weights=(0.5, 0.5)": "make_index.weights: of which fusion?",
    "weights=(1, 1, 1)": "make_index.weights: (1, 1, 1): give 2 numbers",
    "weights=(0, 0)": "make_index.weights: (0, 0): give 2 numbers",
    "fit_split='test'": "make_index.fit_split: 'test' is what figures are reported on",
    "fit_split='none'": "make_index.fit_split: no queries of split 'none': choose one of ",
    "kind='bm25'": "make_index.parts: only a fused searcher has parts",
    "vector_dtype='int8'": "make_index.vector_dtype: only a searcher of vectors has vector_dtype",
}


def test_what_is_refused(two, cli):
    for binding, words in REFUSED.items():
        method = ["--gin.make_index.fusion='z'"] if "numbers" in words else []
        status, _, err = cli("index", *two, *method, f"--gin.make_index.{binding}")
        assert status == 2
        assert words in err
    for setting in ("weights=(1, 2)", "fusion='z'", "depth=50", "fit_split='train'"):
        name = setting.split("=")[0]
        status, _, err = cli("index", *two[:-2], f"--gin.make_index.{setting}")
        assert status == 2
        which = "a fused or planned searcher" if name == "fit_split" else "a fused searcher"
        assert f"make_index.{name}: only {which} has {name}, and this is of the kind bm25" in err
    assert cli("index", *two, "--gin.make_index.fit_split=None")[1]["fused_by"]["weights"] == [0.5, 0.5]
    assert cli("export", *two, "--gin.SEARCHER='fused'", "--gin.export.format='t5x'")[0] == 2


def test_each_model_that_is_searched_with_is_counted_once(tmp_path):
    models = {"exact": ("a", 10), "scann": ("a", 10), "naive": ("b", 7), "bm25": (None, None)}
    for name, (checksum, count) in models.items():
        recipe = {"checksum": checksum} if checksum else {}
        facts = {"kind": name, "parameters": count}
        storage.build_once(tmp_path / name, recipe, lambda folder, facts=facts: facts)

    def counted(weights: tuple[float, ...], method: str = "z") -> int:
        manifest = {
            "parts": [{"folder": f"../{name}"} for name in models],
            "fused_by": {"method": method, "weights": weights, "depth": 100},
        }
        return sum(filter(None, fused.models(tmp_path / "bm25", manifest).values()))

    assert counted((1, 1, 1, 1)) == 17
    assert counted((0, 1, 0, 1)) == 10
    assert counted((0, 0, 1, 1)) == 7
    assert counted((0, 0, 1, 1), "rerank") == 17  # the first part finds
    assert counted((0, 0, 0, 1)) == 0
