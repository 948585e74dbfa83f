"""How a source is divided into splits, and the vocabulary that a collection gets; imports: tests/verbs."""

from retrieval_jax.data.collection import Query
from retrieval_jax.data.writing import hold_out_dev, leave_out_unanswerable


def test_dev_is_held_out_of_train_by_a_hash():
    train = [Query(str(i), "text", {"p": 1}) for i in range(2000)]
    test = [Query("t", "text", {"p": 1})]
    split = hold_out_dev({"train": train, "test": test}, 0.05)
    assert sorted([*split["train"], *split["dev"]], key=lambda q: int(q.id)) == train
    assert 60 < len(split["dev"]) < 140
    assert split["test"] == test
    assert hold_out_dev({"test": test}, 0.05) == {"test": test}
    given = {"train": train, "dev": test}
    assert hold_out_dev(given, 0.05) == given
    # A query's place does not depend on the others.
    fewer = hold_out_dev({"train": train[::2]}, 0.05)
    assert [q for q in split["dev"] if int(q.id) % 2 == 0] == fewer["dev"]


def test_train_queries_without_a_positive_are_left_out_and_counted(capsys):
    found, unanswered = Query("a", "text", {"p": 1}), Query("b", "text", {}, ("p",))
    queries = {"train": [found, unanswered], "test": [unanswered, found], "extra": [found], "none": []}
    kept, counts = leave_out_unanswerable(queries)
    assert kept == {"train": [found], "test": [unanswered, found], "extra": [found]}
    assert counts == {"train": 1, "test": 1}
    told = capsys.readouterr().err
    assert "train: 1 of 2 judged queries have no relevant passage: left out" in told
    assert "test: 1 of 2 judged queries have no relevant passage: they count 0 in evaluations" in told
    assert leave_out_unanswerable({"train": [unanswered]}) == ({}, {"train": 1})
