"""Mined hard negatives: what a searcher finds and is wrong, written as qrels, and trained on."""

from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.mined import MinedNegatives
from retrieval_jax.data.records import Collection
from retrieval_jax.examples.targets import PassageTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.search.searcher import Searcher

DEPTH, MOST, SKIP = 12, 3, 1


def mine(cli, arguments, *bindings: str) -> tuple[int, dict | None, str]:
    settings = [
        f"--gin.mine.{name}={value}" for name, value in (("depth", DEPTH), ("negatives_per_query", MOST))
    ]
    return cli("mine", *arguments, *settings, *bindings)


def test_they_are_the_best_of_the_searcher_without_the_positives(
    work: Workspace, collection: Collection, arguments, cli
):
    assert cli("index", *arguments)[0] == 0
    status, told, _ = mine(cli, arguments, f"--gin.mine.skip_top={SKIP}")
    assert status == 0
    path = work.negatives("bm25") / "qrels.train.tsv"
    assert told["made"] == str(path)
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    assert told["negatives"] == len(lines) > 0
    assert {grade for _, _, grade in lines} == {"0"}

    searcher, queries = Searcher.open(work.searcher("bm25")), collection.queries("train")
    for query in queries:
        (ranking,) = searcher.search([query.text], DEPTH)
        wrong = [p for p, _ in ranking[SKIP:] if p not in query.positives]
        assert [p for q, p, _ in lines if q == query.id] == wrong[:MOST]
    # For a pool, of the dev queries: nothing is skipped.
    of_dev = MinedNegatives(work.negatives("bm25")).of_queries(collection, "dev")
    for query in collection.queries("dev"):
        (ranking,) = searcher.search([query.text], DEPTH)
        wrong = [p for p, _ in ranking if p not in query.positives]
        assert of_dev[query.id] == tuple(wrong[:MOST])
    found = MinedNegatives(work.negatives("bm25")).of_queries(collection)
    assert found == {q: tuple(p for other, p, _ in lines if other == q) for q, _, _ in lines}

    # They are the labelled queries' negatives in training, with the collection's own.
    data = TrainDataset(DataConfig(mined="bm25", positives=1, negatives=2), work, collection, PassageTargets)
    examples = data.computed("labelled")
    ids = [p.id for p in collection.passages()]
    for i, query in enumerate(queries):
        features = examples(i, np.random.default_rng(0))
        assert features["grade"][0] > 0
        rows = [row for row, grade in zip(features["passage"], features["grade"], strict=True) if grade == 0]
        assert {ids[row] for row in rows} <= {*found.get(query.id, ()), *query.negatives}
        assert len(rows) == min(2, len({*found.get(query.id, ()), *query.negatives}))
    assert examples.task.queries[0].positives == queries[0].positives

    altered = path.read_text()[:-4]
    path.write_text(altered)
    with pytest.raises(UserError, match=r"qrels.train.tsv: missing or altered: make it again"):
        TrainDataset(DataConfig(mined="bm25"), work, collection, PassageTargets).computed("labelled")


def test_bad_settings_and_missing_negatives_are_told(
    work: Workspace, collection: Collection, arguments, cli, tmp_path: Path
):
    status, _, error = mine(cli, arguments, f"--gin.mine.skip_top={DEPTH}")
    assert status == 2
    assert "skip less than depth" in error
    data = TrainDataset(DataConfig(mined="nothing"), work, collection, PassageTargets)
    with pytest.raises(UserError, match="nothing: nothing finished here: make it with `retrieval-jax mine`"):
        data.computed("labelled")
