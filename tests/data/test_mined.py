"""The choice of hard negatives from a ranked list."""

from retrieval_jax.data.collection import Query
from retrieval_jax.data.mined import choose_negatives


def test_a_margin_leaves_out_what_scores_like_a_positive():
    query = Query("q", "text", {"right": 1, "also": 1})
    ranking = [("a", 9.0), ("right", 8.0), ("b", 7.5), ("also", 7.0), ("c", 6.0), ("d", 2.0)]
    assert choose_negatives(query, ranking, 10, 0, None) == ["a", "b", "c", "d"]
    assert choose_negatives(query, ranking, 2, 1, None) == ["b", "c"]
    assert choose_negatives(query, ranking, 10, 0, 1.0) == ["c", "d"]
    assert choose_negatives(query, ranking, 10, 0, 0.0) == ["b", "c", "d"]
    assert choose_negatives(query, ranking, 10, 3, 1.0) == ["c", "d"]  # the positive counts, though skipped
    assert choose_negatives(Query("q", "text", {"z": 1}), ranking, 10, 0, 1.0) == []
    assert choose_negatives(Query("q", "text", {"z": 1}), ranking, 10, 0, None) == [p for p, _ in ranking]


def test_a_copy_of_a_positive_sets_the_margin():
    ranking = [("copy", 9.0), ("other", 8.5), ("far", 2.0)]
    query = Query("q", "text", {"right": 1})
    assert choose_negatives(query, ranking, 9, 0, 1.0, first_copies={"copy": "right"}) == ["far"]
    assert choose_negatives(query, ranking, 9, 0, None, first_copies={"right": "copy"}) == ["other", "far"]
    assert choose_negatives(
        query, ranking, 9, 0, None, other_positives=["right"], first_copies={"copy": "right"}
    ) == [
        "other",
        "far",
    ]
