"""What models read of a passage, and which judgements of a query count."""

from retrieval_jax.data.collection import Passage, Query


def test_the_title_comes_before_the_text():
    assert Passage("a", "Title", "text").full_text == "Title. text"
    assert Passage("a", "", "text").full_text == "text"


def test_passages_that_an_import_left_out_still_count():
    query = Query("q", "text", {"a": 2}, ("n", "m"), missing={"z": 1})
    assert query.relevant == {"a": 2, "z": 1}
    assert query.judgements == {"a": 2, "z": 1, "n": 0, "m": 0}
    assert Query("q", "text", {}).judgements == {}
