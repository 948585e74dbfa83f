"""BM25 against its formula; and over passages with their generated queries, made anew when they change."""

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Passage
from retrieval_jax.search import bm25 as bm25_module
from retrieval_jax.search.analysis import analyzer
from retrieval_jax.search.bm25 import BM25Searcher, top_rows
from retrieval_jax.search.searcher import Searcher

WORD = "zyzzyva"  # in no passage
EXPANSION = "--gin.make_index.expansion='words'"


def generate(work: Workspace, collection: Collection, arguments, cli, folder: Path, row: int) -> None:
    """One passage alone gets a generated query, with a word of its own."""
    record = {"id": collection.passage(row).id, "predicted_queries": [f"what is {WORD}"]}
    (folder / "predictions.jsonl").write_text(json.dumps(record))
    binding = f"--gin.generate_queries.predictions='{folder}'"
    assert cli("generate-queries", *arguments, binding, "--gin.generate_queries.name='words'")[0] == 0


@pytest.fixture
def expanded(work: Workspace, collection: Collection, arguments, cli, tmp_path: Path) -> Path:
    generate(work, collection, arguments, cli, tmp_path, 42)
    status, result, _ = cli("index", *arguments, EXPANSION)
    assert status == 0
    assert result["searcher"] == str(work.searcher("bm25_words"))
    return work.searcher("bm25_words")


def test_a_word_of_a_generated_query_finds_its_passage(
    work: Workspace, collection: Collection, arguments, cli, expanded: Path, tmp_path: Path
):
    assert cli("index", *arguments)[0] == 0
    plain, searcher = Searcher.open(work.searcher("bm25")), Searcher.open(expanded)
    assert plain.search([WORD], 10) == [[]]
    (ranking,) = searcher.search([WORD], 10)
    assert [passage for passage, _ in ranking] == [collection.passage(42).id]
    # The passages' own words still count.
    title = collection.passage(7).title
    assert collection.passage(7).id in [passage for passage, _ in searcher.search([title], 10)[0]]

    generate(work, collection, arguments, cli, tmp_path, 5)
    assert cli("index", *arguments, EXPANSION)[0] == 0
    (ranking,) = Searcher.open(expanded).search([WORD], 10)
    assert [passage for passage, _ in ranking] == [collection.passage(5).id]


def test_it_is_searched_and_reported_like_the_others(work: Workspace, arguments, cli, expanded: Path):
    assert cli("search", *arguments, "--gin.SEARCHER='bm25_words'")[0] == 0
    status, result, _ = cli("evaluate", *arguments)
    assert status == 0
    assert 0 < result["metrics"]["bm25_words"]["Hits@10"] <= 1
    status, result, _ = cli("search", *arguments, "--gin.SEARCHER='bm25_words'", f"--gin.QUERY='{WORD}'")
    assert status == 0
    assert len(result["passages"]) == 1


def bm25(query: list[str], document: list[str], documents: list[list[str]]) -> float:
    """Lucene's BM25, k1 .9 and b .4, from its definition (Kamphuis et al. 2020, table 1)."""
    N, mean = len(documents), sum(map(len, documents)) / len(documents)
    counts, score = Counter(document), 0.0
    for word in query:
        df = sum(word in d for d in documents)
        idf = math.log(1 + (N - df + 0.5) / (df + 0.5))
        score += idf * counts[word] / (counts[word] + 0.9 * (1 - 0.4 + 0.4 * len(document) / mean))
    return score


def test_bm25_equals_its_formula(tmp_path: Path, bm25_of):
    texts = [
        "a red apple falls",
        "green apple trees grow, apple by apple",
        "the falls of the river",
        "nothing",
    ]
    passages = [Passage(f"p{i}", "", text) for i, text in enumerate(texts)]
    searcher = bm25_of(tmp_path, passages)
    documents = [analyzer()(text) for text in texts]
    for query in ("apple falls", "river", "apple apple trees", "unseen words", ""):
        (ranking,) = searcher.search([query], 10)
        scores = {f"p{i}": bm25(analyzer()(query), d, documents) for i, d in enumerate(documents)}
        expected = sorted((s for s in scores.values() if s > 0), reverse=True)
        assert [s for _, s in ranking] == pytest.approx(expected, rel=1e-4)
        assert {p for p, _ in ranking} == {p for p, s in scores.items() if s > 0}
        (given,) = searcher.score([query], [[*scores, "no such passage"]])
        assert given == pytest.approx([*scores.values(), math.nan], rel=1e-4, nan_ok=True)
    assert searcher.score(["apple", "apple"], [["p1"], []]) == [[searcher.search(["apple"], 1)[0][0][1]], []]
    assert len(searcher.search(["apple", "river"], 1)) == 2
    assert searcher.search(["apple", "river"], 0) == searcher.search(["apple", "river"], -1) == [[], []]
    assert searcher.search(["apple \ud800"], 4) == searcher.search(["apple \ufffd"], 4)


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory, bm25_of) -> Searcher:
    """A searcher of two passages in which no word is "s"."""
    passages = [Passage("cats", "Cats", "eat fish"), Passage("dogs", "Dogs", "run far")]
    return bm25_of(tmp_path_factory.mktemp("cats"), passages)


@pytest.mark.parametrize(("query", "found"), [("U.S. fish", ["cats"]), ("s", []), ("S&P 500", [])])
def test_a_lone_letter_in_no_passage_finds_nothing(cats: Searcher, query: str, found: list[str]):
    assert [passage for passage, _ in cats.search([query], 10)[0]] == found


@given(st.lists(st.sampled_from(["s", "'s", "fish", "日", " ", "."]) | st.text(max_size=5)).map("".join))
def test_any_query_is_searched(cats: Searcher, query: str):
    (ranking,) = cats.search([query], 10)
    words = {"cat": "cats", "eat": "cats", "fish": "cats", "dog": "dogs", "run": "dogs", "far": "dogs"}
    assert {passage for passage, _ in ranking} == {words[t] for t in analyzer()(query) if t in words}


def test_a_query_of_one_letter_finds_the_pairs_with_it(bm25_of, tmp_path: Path):
    texts = {"ja": "日本語の本", "shelf": "本棚", "alone": "本", "ko": "물을 마신다", "en": "book"}
    searcher = bm25_of(tmp_path, [Passage(name, "", text) for name, text in texts.items()])

    def found(query: str) -> set[str]:
        return {passage for passage, _ in searcher.search([query], 10)[0]}

    for letter in "日本語棚물다猫":
        assert found(letter) == {name for name, text in texts.items() if letter in text}
    # Its score is the sum of those of the pairs.
    (ranking,), (expected,) = searcher.search(["本"], 10), searcher.search(["本 日本 本語 の本 本棚"], 10)
    assert dict(ranking) == pytest.approx(dict(expected), rel=1e-5)
    assert found("棚 book") == {"en"}  # a longer query has its own terms alone
    assert found("b") == set()


def test_passages_without_a_term_are_no_index(bm25_of, tmp_path: Path):
    passages = [Passage("a", "", "to be or not to be"), Passage("b", "", "!?")]
    with pytest.raises(
        UserError, match=r"no passage has a term .*stop words.*: --gin.make_index.language=None$"
    ):
        bm25_of(tmp_path, passages)
    assert len(bm25_of(tmp_path, passages, None).search(["be"], 10)[0]) == 1
    with pytest.raises(UserError, match=r"no passage has a term: .*$"):
        bm25_of(tmp_path, passages[1:], None)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5]), max_size=30), st.integers(1, 12))
def test_top_rows_are_those_of_a_stable_sort(scores: list[float], k: int):
    order = sorted((row for row, score in enumerate(scores) if score > 0), key=lambda row: -scores[row])
    assert top_rows(np.array(scores, np.float32), k).tolist() == order[:k]


@pytest.mark.parametrize("scored", [0, 3, 40, 5000])
def test_top_rows_of_many_are_those_of_a_stable_sort(scored: int):
    rng = np.random.default_rng(scored)
    scores = np.zeros(6000, np.float32)
    scores[rng.choice(6000, scored, replace=False)] = rng.choice([0.5, 1, 1.5, 2], scored)
    order = np.argsort(-scores, kind="stable")[: np.count_nonzero(scores)].tolist()
    for k in (1, 5, 12, 100, 7000):
        assert top_rows(scores, k).tolist() == order[:k]


def test_rankings_are_those_of_the_library_with_ties_in_order(bm25_of, tmp_path: Path):
    """The same float32 scores, for queries one by one or together, for any k."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(60)])
    texts = [" ".join(rng.choice(words[: rng.integers(2, 60)], rng.integers(1, 9))) for _ in range(2000)]
    searcher = bm25_of(tmp_path, [Passage(str(i), "", text) for i, text in enumerate(texts)])
    library = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    library.index([analyzer()(text) for text in texts], show_progress=False)
    queries = [" ".join(rng.choice(words, size)) for size in rng.integers(1, 9, 20)] + ["w0 w0 w1 unseen w0"]
    for k in (1, 10, 3000):
        for query, found in zip(queries, searcher.search(queries, k), strict=True):
            scores = library.get_scores(analyzer()(query))
            order = sorted(np.flatnonzero(scores).tolist(), key=lambda row, of=scores: -of[row])[:k]
            assert found == [(str(row), float(scores[row])) for row in order]
            assert searcher.search([query], k) == [found]


def test_passages_without_words_and_of_100_000_words(bm25_of, tmp_path: Path):
    texts = ["", "apple", "?!", "apple pear " * 50_000, "pear of the apple tree"]
    searcher = bm25_of(tmp_path, [Passage(f"p{i}", "", text) for i, text in enumerate(texts)])
    documents = [analyzer()(text) for text in texts]
    assert len(documents[3]) == 100_000
    for query in ("apple", "pear", "tree", "pear tree"):
        (ranking,) = searcher.search([query], 10)
        expected = {f"p{i}": bm25(analyzer()(query), d, documents) for i, d in enumerate(documents)}
        assert dict(ranking) == pytest.approx({p: s for p, s in expected.items() if s > 0}, rel=1e-5)
    assert searcher.search(["apple " * 100_000], 1)[0][0][0] == searcher.search(["apple"], 1)[0][0][0]


def test_several_processes_index_what_one_does(
    collection: Collection, arguments, cli, expanded: Path, monkeypatch: pytest.MonkeyPatch
):
    def files() -> dict[str, bytes]:
        there = {str(path.relative_to(expanded)): path for path in expanded.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in there.items()}

    before = files()
    assert before.keys() >= {"ids.arrow", "terms.arrow", "manifest.json"}
    storage.write_json(expanded / "manifest.json", json.loads(before["manifest.json"]) | {"recipe": {}})
    monkeypatch.setattr(bm25_module, "SHARD", collection.passage_count // 3)
    assert cli("index", *arguments, EXPANSION)[0] == 0
    assert files() == before


def test_a_damaged_file_is_one_line(bm25_of, tmp_path: Path):
    bm25_of(tmp_path, [Passage("a", "", "a red apple")])
    path = tmp_path / "bm25" / "data.csc.index.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        UserError, match=r"cannot be read \(.*\): delete the folder, then `retrieval-jax index`$"
    ):
        BM25Searcher.open(tmp_path)


def test_another_analysis_is_another_searcher(work: Workspace, arguments, cli):
    assert cli("index", *arguments)[0] == 0
    before = (work.searcher("bm25") / "manifest.json").stat().st_mtime_ns
    assert cli("index", *arguments)[0] == 0
    assert (work.searcher("bm25") / "manifest.json").stat().st_mtime_ns == before
    assert cli("index", *arguments, "--gin.make_index.language='german'")[0] == 0
    manifest = json.loads((work.searcher("bm25") / "manifest.json").read_text())
    assert (manifest["language"], manifest["recipe"]["language"]) == ("german", "german")
    assert Searcher.open(work.searcher("bm25")).analyze("die Häuser") == ["haus"]
    status, _, told = cli("index", *arguments, "--gin.make_index.language='klingon'")
    assert status == 2
    assert "make_index.language: no language 'klingon': choose one of arabic, armenian, " in told
    assert cli("index", *arguments)[0] == 0
    (work.searcher("bm25") / "manifest.json").write_text(json.dumps(manifest | {"analysis": 0}))
    with pytest.raises(UserError, match="another version of the analysis: `retrieval-jax index`"):
        Searcher.open(work.searcher("bm25"))
    (work.searcher("bm25") / "manifest.json").write_text(json.dumps(manifest | {"index_version": 1}))
    with pytest.raises(UserError, match="another version of the index: `retrieval-jax index`"):
        Searcher.open(work.searcher("bm25"))
    assert cli("index", *arguments, "--gin.make_index.language='german'")[0] == 0


def test_squad_has_the_ndcg_that_stemming_and_stop_words_give(shared: Path, bm25_of, tmp_path: Path):
    """0.836 without either, 0.856 with Lucene's 33 stop words."""

    def read(name: str) -> list[list[str]]:
        with gzip.open(shared / "data" / "squad_dev" / name, "rt", newline="\n") as lines:
            return [line.rstrip("\n").split("\t") for line in lines]

    searcher = bm25_of(tmp_path, [Passage(*row) for row in read("docs.tsv.gz")])
    queries = read("queries.test.tsv.gz")
    relevant: dict[str, set[str]] = {}
    for query, passage, _ in read("qrels.test.tsv.gz"):
        relevant.setdefault(query, set()).add(passage)
    total = 0.0
    for (query, _), found in zip(queries, searcher.search([text for _, text in queries], 10), strict=True):
        gain = sum(1 / math.log2(i + 2) for i, (passage, _) in enumerate(found) if passage in relevant[query])
        total += gain / sum(1 / math.log2(i + 2) for i in range(min(len(relevant[query]), 10)))
    assert total / len(queries) == pytest.approx(0.8736, abs=0.001)
