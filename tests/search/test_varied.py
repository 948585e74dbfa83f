"""Searchers that are asked with variations of the queries, by themselves and as parts of a fused one."""

from pathlib import Path

import pytest

from retrieval_jax.core import storage
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.variations import vary
from retrieval_jax.search.fusion import Candidates, Fusion
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.search.varied import VariedSearcher, asked_as


@pytest.fixture(scope="module")
def bm25(work, arguments) -> Searcher:
    from retrieval_jax.main import main

    assert main(["index", *arguments, "--json"]) == 0
    return Searcher.open(work.searcher("bm25"))


def test_it_finds_what_the_searcher_finds_for_the_variation(bm25: Searcher, collection: Collection):
    queries = [query.text for query in collection.queries("test")]
    varied = [vary(text, "drop_words", text) for text in queries]
    searcher = asked_as("bm25~drop_words", bm25)
    found = searcher.search(queries, 5)
    assert found == bm25.search(varied, 5) != bm25.search(queries, 5)
    ids = [[passage for passage, _ in ranked_list] for ranked_list in found]
    assert searcher.score(queries, ids) == bm25.score(varied, ids)
    half = ["a table \ud800"]  # what is drawn depends on the text, which is to be UTF-8
    assert searcher.search(half, 3) == searcher.search(["a table \ufffd"], 3)
    searcher.compile_for(queries)
    searcher.use_batch_sizes([1, 2])
    assert (searcher.truncates(queries[0]), searcher.is_shared) == (False, False)
    assert asked_as("bm25", bm25) is bm25


def test_variations_are_fused(bm25: Searcher, collection: Collection, work, arguments, cli, tmp_path: Path):
    parts = ("bm25", "bm25~typo", "bm25~no_stop_words")
    settings = {"kind": "fused", "name": "varied", "parts": parts, "fit_split": None, "depth": 100}
    given = [f"--gin.make_index.{name}={value!r}" for name, value in settings.items()]
    status, made, err = cli("index", *arguments, *given)
    assert status == 0, err
    searcher = Searcher.open(made["searcher"])
    assert [type(part) for part in searcher.parts[1:]] == [VariedSearcher] * 2
    assert len({id(getattr(part, "searcher", part)) for part in searcher.parts}) == 1  # opened once
    query = collection.queries("test")[0].text
    lists = [asked_as(part, bm25).search([query], 100)[0] for part in parts]
    expected = Fusion("min_max", (1 / 3,) * 3, 100).rank(Candidates.of(lists))
    assert searcher.search([query], 10) == [expected[:10]]

    assert cli("export", *arguments, "--SEARCHER=varied")[0] == 0
    exported = work.export("varied")
    assert Searcher.open(exported).search([query], 10) == [expected[:10]]
    assert [part["name"] for part in storage.read_manifest(exported, "index")["parts"]] == list(parts)

    status, _, err = cli("index", *arguments, *given, "--gin.make_index.parts=('bm25', 'bm25~typos')")
    assert (status, "make_index.parts: 'bm25~typos': no kind of variation 'typos'" in err) == (2, True)
