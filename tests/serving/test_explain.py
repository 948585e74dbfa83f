"""What an explanation says of an answer."""

from retrieval_jax.serving.explain import explain


def test_a_searcher_that_explains_nothing_has_none(searchers):
    (ranked_list,) = searchers["bm25"].search(["a table"], 3)
    assert explain(searchers["bm25"], "a table", ranked_list) is None
