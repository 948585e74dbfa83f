"""A teacher's scores on disk, read back as dictionaries and as rows."""

from pathlib import Path

import numpy as np
import pytest
from teacher import random_scores, write_scores

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import scores
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.trec import read_run


def test_scores_come_back_as_they_were_best_first(own_work: Workspace, collection: Collection, monkeypatch):
    given = random_scores(collection)
    first = next(iter(given))
    given[first] |= dict.fromkeys(list(given[first])[1:4], 1 / 3)  # equal ones stay equal
    monkeypatch.setattr(scores, "_AT_ONCE", 20)
    teacher = write_scores(own_work, "t", given, {"d": {collection.ids[3].as_py(): -2.5}})
    assert dict(teacher.read(collection)) == given
    assert dict(teacher.read(collection, "dev")) == {"d": {collection.ids[3].as_py(): -2.5}}
    for of_query in dict(teacher.read(collection)).values():
        assert list(of_query.values()) == sorted(of_query.values(), reverse=True)
    # Other tools read the file as a run.
    run = read_run(own_work.scores("t") / "run.train.trec")
    assert {query: dict(results) for query, results in run.items()} == given

    rows = {passage.id: row for row, passage in enumerate(collection.passages())}
    by_row = teacher.by_row(collection)
    for query in collection.queries("train"):
        found, wanted = by_row[query.id], given.get(query.id, {})
        of_row = dict(zip(found.rows_P.tolist(), found.scores_P.tolist(), strict=True))
        assert of_row == {rows[passage]: float(np.float32(score)) for passage, score in wanted.items()}
    assert [*write_scores(own_work, "no_dev", given).read(collection, "dev")] == []


def test_the_first_passages_of_a_run_are_those_of_its_ranked_lists(collection: Collection, tmp_path: Path):
    """Of the queries that are asked for; equal scores as trec_eval ranks them, the greater id first."""
    rng, ids = np.random.default_rng(0), collection.ids.to_pylist()
    lines = [
        f"q{query} Q0 {ids[row]} 0 {score} tag\n"
        for query in range(5)
        for row, score in zip(rng.permutation(len(ids))[:20].tolist(), rng.integers(0, 9, 20), strict=True)
    ]
    (tmp_path / "any.trec").write_text("".join(lines))
    found = scores.first_of_run(tmp_path / "any.trec", collection, {"q1", "q4", "q9"}, 6)
    run = read_run(tmp_path / "any.trec")
    assert len(found.rows) == 12
    for query in ("q1", "q4"):
        ranked = [
            (ids[row], score) for row, score in zip(found[query].rows_P, found[query].scores_P, strict=True)
        ]
        assert ranked == run[query][:6]
    assert not len(found["q0"].rows_P)
    (tmp_path / "any.trec").write_text("".join([*lines, "q9 Q0 there 0 1 tag\n", "q9 Q0 nowhere 0 2 tag\n"]))
    with pytest.raises(UserError, match=r"any.trec: passage 'nowhere' is not in .*: make the run again"):
        scores.first_of_run(tmp_path / "any.trec", collection, {"q1", "q9"}, 1)


def test_copies_have_the_highest_score_of_their_text():
    found = scores.ScoredPassages(np.array([7, 2, 9]), np.array([2, 2, 9]), np.float32([5, 4, 1]))
    assert found.by_text() == {2: 5.0, 9: 1.0}


def test_stale_altered_and_missing_scores_are_told(own_work: Workspace, collection: Collection):
    with pytest.raises(UserError, match="t: nothing finished here: make it with `retrieval-jax score`"):
        scores.TeacherScores(own_work.scores("t"))
    teacher = write_scores(own_work, "t", random_scores(collection))
    teacher.recipe["collection"] = "another"
    with pytest.raises(UserError, match=r"of another collection .*: make it again"):
        dict(teacher.read(collection))
    path = own_work.scores("t") / "run.train.trec"
    path.write_text(path.read_text()[:-4])
    with pytest.raises(UserError, match=r"run.train.trec: missing or altered: make it again"):
        scores.TeacherScores(own_work.scores("t")).by_row(collection)
