"""Mined hard negatives: what a searcher finds and is wrong, written as qrels, and trained on."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_folders import random_params, write_model_folder
from teacher import random_scores, write_scores

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.mined import MinedNegatives
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.targets import PassageTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search import searcher as registry
from retrieval_jax.search.bm25 import BM25Searcher
from retrieval_jax.search.planned import PlannedSearcher
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.run import docid_softmax
from retrieval_jax.verbs.mine import MineConfig, _recipe

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
    for settings, message in (
        (["prefix_lengths=(1,)"], "prefix_lengths: bm25 (bm25) writes no docids: mine with a generative"),
        (["prefix_lengths=(1,)", "margin=0.1"], "scores of prefixes of different lengths do not compare"),
        (["relative_margin=5.0"], "relative_margin"),
        (["teacher='nothing'"], "nothing finished here: make it with `retrieval-jax index`"),
    ):
        status, _, error = mine(cli, arguments, *(f"--gin.mine.{setting}" for setting in settings))
        assert status == 2
        assert message in " ".join(error.split())
    with pytest.raises(UserError, match="nothing: nothing finished here: make it with `retrieval-jax mine`"):
        data.computed("labelled")


def test_a_kind_that_extends_a_generative_searcher_writes_docids(
    own_work: Workspace, collection: Collection, monkeypatch: pytest.MonkeyPatch
):
    class Own(PlannedSearcher):
        kind = "own"

    monkeypatch.setitem(registry._CLASSES, "own", Own)
    recipe = {"collection": collection.fingerprint}
    storage.build_once(own_work.searcher("own"), recipe, lambda _: {"kind": "own"})
    config = MineConfig(source="x", searcher="own", prefix_lengths=(1,))
    assert _recipe(config, own_work, collection, ["train"])["prefixes"]["lengths"] == (1,)


def test_interrupted_and_started_again_it_goes_on(work: Workspace, arguments, cli, monkeypatch):
    assert cli("index", *arguments)[0] == 0
    flags = [f"--gin.mine.{setting}" for setting in ("shard_size=8", "sample=True", "margin=0.5")]
    assert mine(cli, arguments, *flags, "--gin.mine.name='whole'")[0] == 0
    search, asked = BM25Searcher.search, []

    def interrupted(self, queries, k):
        asked.append(len(queries))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return search(self, queries, k)

    monkeypatch.setattr(BM25Searcher, "search", interrupted)
    assert mine(cli, arguments, *flags, "--gin.mine.name='again'")[0] == 130
    unfinished = work.folder / "negatives" / "again.unfinished"
    assert len([*unfinished.glob("train/*.jsonl")]) == 4
    assert not work.negatives("again").exists()
    status, told, err = mine(cli, arguments, *flags, "--gin.mine.name='again'")
    assert status == 0
    assert "going on, 4 of" in err
    assert "fewer than 3 negatives" in err
    assert sum(asked[2:]) == told["queries"] - 32 + 10  # the dev queries, too
    for split in ("train", "dev"):
        made, whole = (work.negatives(name) / f"qrels.{split}.tsv" for name in ("again", "whole"))
        assert made.read_text() == whole.read_text()
    assert not unfinished.exists()
    # Another seed draws others; without a draw it changes nothing.
    searches = len(asked)
    assert mine(cli, arguments, *flags, "--gin.mine.name='again'", "--SEED=1")[0] == 0
    assert (work.negatives("again") / "qrels.train.tsv").read_text() != (
        work.negatives("whole") / "qrels.train.tsv"
    ).read_text()
    assert len(asked) > searches
    assert mine(cli, arguments, "--gin.mine.name='plain'")[0] == 0
    searches = len(asked)
    assert mine(cli, arguments, "--gin.mine.name='plain'", "--SEED=1")[0] == 0
    assert len(asked) == searches


@pytest.mark.slow
def test_two_hosts_share_the_work(work: Workspace, arguments, cli):
    assert cli("index", *arguments)[0] == 0
    assert mine(cli, arguments, "--gin.mine.name='one'")[0] == 0
    script = (
        "import sys, jax; jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2])); "
        "from retrieval_jax.main import main; sys.exit(main(sys.argv[3:]))"
    )
    argv = ["mine", *arguments, "--gin.mine.name='two'", "--gin.mine.shard_size=8"]
    argv += [f"--gin.mine.depth={DEPTH}", f"--gin.mine.negatives_per_query={MOST}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(host), *argv], stderr=subprocess.PIPE, text=True
        )
        for host in range(2)
    ]
    told = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    for split in ("train", "dev"):
        one, two = (work.negatives(name) / f"qrels.{split}.tsv" for name in ("one", "two"))
        assert one.read_text() == two.read_text()
    assert "train: mine with bm25" in told[0]
    assert "train: mine with bm25" in told[1]


def test_prefixes_of_docids_are_mined_and_a_teacher_s_scores_are_read(
    work: Workspace, collection: Collection, arguments, cli, tmp_path: Path
):
    assert cli("index", *arguments)[0] == 0
    assert cli("docids", *arguments, "--DOCIDS=naive")[0] == 0
    table = DocidTable.open(work.docids("naive"))
    model = GenerativeRetriever(T5Config(1152, 16, 2, 8, 20, 1, 1, **docid_softmax(table)))
    facts = {"docids": "naive", "docids_fingerprint": table.fingerprint()}
    write_model_folder(tmp_path / "naive", model, random_params(model), collection, **facts)
    index = ["index", *arguments, f"--MODEL_DIR={tmp_path / 'naive'}", "--gin.make_index.name='written'"]
    assert cli(*index)[0] == 0
    flags = ["--SEARCHER=written", "--gin.mine.prefix_lengths=(1, 3)", "--gin.mine.passages_per_prefix=2"]
    status, told, err = mine(cli, arguments, *flags)
    assert status == 0, err
    assert told["with_negatives"] == told["queries"]
    assert "scores" not in err.split("fewer")[0]  # those of two lengths do not compare
    searcher, teacher = (Searcher.open(work.searcher(name)) for name in ("written", "bm25"))
    queries = collection.queries("train")
    found = MinedNegatives(work.negatives("written")).of_queries(collection)
    prefixes = {}
    for length in (1, 3):
        of_queries = searcher.of_prefixes(length).find_docids([query.text for query in queries], DEPTH)
        prefixes[length] = [{tuple(table.tokens_NxL[row, :length]) for row in rows} for rows, _ in of_queries]
    rows = {passage: row for row, passage in enumerate(table.passage_ids.to_pylist())}
    for n, query in enumerate(queries):
        docids = [table.tokens_NxL[rows[passage]] for passage in found[query.id]]
        assert len(docids) == MOST
        assert tuple(docids[0][:1]) in prefixes[1][n]
        assert any(tuple(docid[:3]) in prefixes[3][n] for docid in docids)
        assert all(tuple(d[:1]) in prefixes[1][n] or tuple(d[:3]) in prefixes[3][n] for d in docids)
        assert not {*found[query.id]} & {*query.positives}

    status, told, err = mine(cli, arguments, *flags, "--gin.mine.teacher='bm25'", "--gin.mine.margin=2.0")
    assert status == 0, err
    assert "positives" in err
    found = MinedNegatives(work.negatives("written")).of_queries(collection)
    assert found
    for query in queries:
        negatives = found.get(query.id, ())
        (scores,) = teacher.score([query.text], [[*query.positives, *negatives]])
        good, bad = scores[: len(query.positives)], scores[len(query.positives) :]
        assert all(score <= max(good) - 2 for score in bad)


def test_a_teacher_s_scores_on_disk_are_read(work: Workspace, collection: Collection, arguments, cli):
    assert cli("index", *arguments)[0] == 0
    given = random_scores(collection)
    write_scores(work, "given", given)
    middle = float(np.median([score for of_query in given.values() for score in of_query.values()]))
    flags = ["--gin.mine.teacher='scores/given'", f"--gin.mine.max_score={middle}", "--gin.mine.depth=200"]
    status, told, err = mine(cli, arguments, *flags, "--gin.mine.name='taught'")
    assert status == 0, err
    assert told["fewer_than_wanted"] > 0
    found = MinedNegatives(work.negatives("taught")).of_queries(collection)
    assert found
    for query, negatives in found.items():
        assert all(given[query][passage] <= middle for passage in negatives)
