"""BM25 over passages with their generated queries: a searcher like the others, made anew when they change."""

import json
from pathlib import Path

import pytest

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
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


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("--gin.make_index.expansion='nothing'", ["synthetic/nothing", "retrieval-jax generate-queries"]),
        ("--gin.MODEL_DIR='models/naive'", ["make_index.expansion", "MODEL_DIR=None"]),
    ],
)
def test_an_expansion_that_cannot_be(work: Workspace, arguments, cli, binding: str, words: list[str]):
    status, _, err = cli("index", *arguments, EXPANSION, binding)
    assert status == 2
    for word in words:
        assert word in err
