"""Making synthetic queries by shards: which are kept, and that an interruption changes nothing."""

from pathlib import Path

from retrieval_jax.core import unfinished
from retrieval_jax.data import generation
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.generation import ConsistencyFilter, distinct
from retrieval_jax.data.synthetic import QueryShards


def test_distinct():
    queries = ["What is  JAX?", "what is jax?", "", "  ", "Straße", "STRASSE", "b", "\ta\n"]
    assert distinct(queries) == ["What is JAX?", "Straße", "b", "a"]


def test_a_query_is_kept_only_if_it_finds_its_passage():
    ranked = {"a": ["p1", "p0"], "b": ["p0", "p2"], "c": [], "d": ["p2", "p1", "p0"]}
    asked: list[int] = []

    def search(queries, k):
        asked.append(len(queries))
        return [[(passage, 1.0) for passage in ranked[query][:k]] for query in queries]

    queries = [["a", "b"], [], ["c", "d", "b"]]
    assert ConsistencyFilter(search, 1, 2).keep(["p0", "p1", "p2"], queries) == [["b"], [], ["d"]]
    assert asked == [2, 2, 1]
    assert ConsistencyFilter(search, 2, 9).keep(["p0", "p1", "p2"], queries) == [["a", "b"], [], ["d", "b"]]


class Rows:
    """A source of queries whose texts name the passage's row."""

    def __init__(self):
        self.asked: list[int] = []

    def prepare(self, collection, shards):
        raise AssertionError("not called by make_shards")

    def queries(self, collection, shards, numbers, advance):
        for number in numbers:
            self.asked.append(number)
            advance(len(shards.rows(number)))
            yield [[f"of {row}", f"OF  {row}", "x", "y"] for row in shards.rows(number)]


def test_only_missing_shards_are_made_and_each_is_whole(collection: Collection, tmp_path: Path):
    shards, recipe = QueryShards(tmp_path / "unfinished", collection.passage_count, 16), {"a": (1,)}
    unfinished.begin(shards.folder, recipe, shards.paths)
    source = Rows()
    generation.make_shards(collection, shards, [1, 4], source, count=3)
    unfinished.begin(shards.folder, recipe, shards.paths)  # keeps them
    rest = shards.missing(0, 1)
    assert rest == [0, 2, 3, 5, 6]
    assert (shards.missing(0, 2), shards.missing(1, 2)) == ([0, 2, 6], [3, 5])
    generation.make_shards(collection, shards, rest, source, count=3)
    assert source.asked == [1, 4, *rest]
    lines = list(shards.read(range(shards.count)))
    assert [line["queries"] for line in lines] == [[f"of {row}", "x"] for row in range(len(lines))]
    assert {(line["made"], line["distinct"]) for line in lines} == {(3, 2)}
    unfinished.begin(shards.folder, {"a": (2,)}, shards.paths)
    assert shards.missing(0, 1) == [*range(shards.count)]
