"""`score`: by every searcher that can, killed or not, on one host or two, and of files."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_files import write_run

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.mined import MinedNegatives
from retrieval_jax.data.scores import TeacherScores
from retrieval_jax.search.searcher import Searcher


def settings(**values) -> list[str]:
    return [f"--gin.score_pairs.{name}={value!r}" for name, value in values.items()]


@pytest.fixture(scope="module")
def here(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A work folder of this module's own: other tests evaluate all runs of theirs."""
    work = Workspace(tmp_path_factory.mktemp("scores"))
    work.collection.symlink_to(collection.folder)
    return work


@pytest.fixture(scope="module")
def flags(arguments: list[str], here: Workspace) -> list[str]:
    return [*arguments, f"--gin.WORK_DIR='{here.folder}'"]


@pytest.fixture(scope="module")
def sources(flags: list[str], here: Workspace, collection: Collection) -> dict[str, dict]:
    """BM25's negatives and a run of random passages, of train queries, and the negatives' of dev ones."""
    from retrieval_jax.main import main

    assert main(["index", *flags]) == 0
    assert main(["mine", *flags, "--gin.mine.depth=9", "--gin.mine.name='mined'"]) == 0
    rng, ids = np.random.default_rng(0), collection.ids.to_pylist()
    run = {q.id: [(p, -float(i)) for i, p in enumerate(rng.permutation(ids)[:6])]
           for q in collection.queries("train")}  # fmt: skip
    write_run(here.run("random", "train"), run, "random")
    negatives = MinedNegatives(here.negatives("mined"))
    return {
        "train": {q: [*negatives.of_queries(collection)[q], *(p for p, _ in run[q][:5])] for q in run},
        "dev": negatives.of_queries(collection, "dev"),
    }


def expected(here: Workspace, collection: Collection, searcher: str, sources: dict, split: str) -> dict:
    opened = Searcher.open(here.searcher(searcher))
    found = {}
    for query in collection.queries(split):
        ids = [*dict.fromkeys([*query.positives, *sources[split].get(query.id, ())])]
        (given,) = opened.score([query.text], [ids])
        found[query.id] = dict(zip(ids, given, strict=True))
    return found


CANDIDATES = settings(candidates=("mined", "random"), depth=5, shard_size=7)


@pytest.fixture(scope="module")
def scored(flags, here: Workspace, sources) -> Path:
    from retrieval_jax.main import main

    assert main(["score", *flags, *CANDIDATES, *settings(name="whole")]) == 0
    return here.scores("whole")


def test_a_searcher_scores_positives_and_candidates(
    scored, flags, here: Workspace, collection: Collection, sources, cli
):
    status, made, err = cli("score", *flags, *CANDIDATES, *settings(name="whole"))  # it is there
    assert status == 0, err
    assert "scores, by quantile" in err
    teacher = TeacherScores(scored)
    assert teacher.scored_by == {"kind": "bm25"}
    cut = {"train": {}, "dev": {}}
    mined = MinedNegatives(here.negatives("mined"))
    for split in cut:
        for query, ids in sources[split].items():
            first = mined.of_queries(collection, split).get(query, ())[:5]
            cut[split][query] = [*first, *(ids[-5:] if split == "train" else [])]
        wanted = expected(here, collection, "bm25", cut, split)
        assert dict(teacher.read(collection, split)) == wanted
    wanted = expected(here, collection, "bm25", cut, "train")
    positives = {q.id: q.positives for q in collection.queries("train")}
    right = [x for q, some in wanted.items() for p, x in some.items() if p in positives[q]]
    others = [x for q, some in wanted.items() for p, x in some.items() if p not in positives[q]]
    assert made["queries"] == len(wanted)
    assert made["pairs"] == len(right) + len(others)
    assert made["without_positive"] == 0
    for name, values in {"positives": right, "others": others}.items():
        shown = made["distribution"][name]
        assert shown["count"] == len(values)
        assert shown["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        assert shown["50%"] == pytest.approx(np.median(values), rel=1e-5)
        assert shown["5%"] == pytest.approx(np.quantile(values, 0.05), rel=1e-5)


SCRIPT = """
import sys, time
from retrieval_jax.main import main
from retrieval_jax.search.bm25 import BM25Searcher

score = BM25Searcher.score
def slowly(self, queries, candidates):
    time.sleep(0.3)
    return score(self, queries, candidates)
BM25Searcher.score = slowly
sys.exit(main(sys.argv[1:]))
"""


def test_a_kill_loses_a_shard_at_most(scored, flags, here: Workspace, cli):
    command = [sys.executable, "-c", SCRIPT, "score", *flags, *CANDIDATES, *settings(name="killed")]
    process = subprocess.Popen(command)
    folder = here.scores("killed")
    scratch = folder.with_name("killed.unfinished")
    while process.poll() is None and len(list(scratch.glob("train/*.jsonl"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not folder.exists()
    finished = {path: path.stat().st_ino for path in scratch.glob("train/*.jsonl")}
    opened = [os.open(path, os.O_RDONLY) for path in finished]  # so that no other file has their numbers
    status, _, err = cli("score", *flags, *CANDIDATES, *settings(name="killed"))
    for file in opened:
        os.close(file)
    assert status == 0, err
    assert f"going on, {len(finished)} of 14 shards are finished" in " ".join(err.split())
    assert not scratch.exists()
    for split in ("train", "dev"):
        name = f"run.{split}.trec"
        assert (folder / name).read_bytes() == (scored / name).read_bytes()


@pytest.mark.slow
def test_two_hosts_make_the_same(scored, flags, here: Workspace):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "retrieval_jax.main", "score", *flags, *CANDIDATES]
    hosts = [
        subprocess.Popen([*command, *settings(name="two")], env=environment | {"JAX_PROCESS_ID": str(i)})
        for i in range(2)
    ]
    assert [host.wait(timeout=300) for host in hosts] == [0, 0]
    for split in ("train", "dev"):
        name = f"run.{split}.trec"
        assert (here.scores("two") / name).read_bytes() == (scored / name).read_bytes()


def test_missing_candidates_are_refused(flags, here: Workspace, collection: Collection, sources, cli):
    status, _, error = cli("score", *flags)
    assert status == 2
    assert "score_pairs.candidates: none: positives alone rank nothing: name negatives/ or runs/" in error
    status, _, error = cli("score", *flags, *settings(candidates=("nothing",)))
    assert status == 2
    assert "nothing.train.trec: `retrieval-jax mine`, or `retrieval-jax search --SEARCHER=nothing" in error
    query = collection.queries("train")[0].id
    write_run(here.run("other", "train"), {query: [("elsewhere", 1.0)]}, "other")
    status, _, error = cli("score", *flags, *settings(candidates=("other",)))
    assert status == 2
    assert "other.train.trec: passage 'elsewhere' is not in" in error


def test_an_earlier_collections_run_gives_no_candidates(flags, here: Workspace, cli):
    assert cli("search", *flags, "--SEARCHER=bm25", "--SPLIT=train", "--K=3")[0] == 0
    facts = here.run("bm25", "train").with_suffix(".json")
    made = json.loads(facts.read_text())
    made["recipe"]["collection"] = "earlier"
    facts.write_text(json.dumps(made))
    status, _, err = cli("score", *flags, *settings(candidates=("bm25",), name="stale"))
    here.run("bm25", "train").unlink()
    assert status == 2
    assert "bm25.train.trec: it is of another collection (or an earlier one) than" in err
    assert "`retrieval-jax search --SEARCHER=bm25 --SPLIT=train` makes it again" in err


def test_a_file_that_is_not_there_is_an_error_in_a_line(flags, tmp_path, cli):
    for path in (tmp_path / "nothing.tsv", tmp_path):
        status, _, error = cli("score", *flags, *settings(file=str(path)))
        assert status == 2
        assert f"score_pairs.file: {path}: no such file" in error


def test_files_become_scores_or_negatives(flags, here: Workspace, collection: Collection, cli, tmp_path):
    first, second = collection.queries("train")[:2]
    dev = collection.queries("dev")[0]
    ids = [p for p in collection.ids.to_pylist() if p not in {*first.positives, *second.positives}]
    right = next(iter(first.positives))
    given = {first.id: {ids[0]: 0.5, right: 2.0}, second.id: {ids[1]: -1.0}, dev.id: {ids[2]: 3.0}}
    path = tmp_path / "teacher.json"
    path.write_text(json.dumps(given))
    status, made, err = cli("score", *flags, *settings(file=str(path)))
    assert status == 0, err
    assert made["made"] == str(here.scores("teacher"))
    assert (made["queries"], made["pairs"], made["without_positive"]) == (2, 3, 1)
    assert storage.read_manifest(here.scores("teacher"), "score")["file"] == "teacher.json"
    teacher = TeacherScores(here.scores("teacher"))
    assert dict(teacher.read(collection)) == {query: given[query] for query in (first.id, second.id)}
    assert dict(teacher.read(collection, "dev")) == {dev.id: given[dev.id]}

    path.write_text(json.dumps({"nobody": {ids[0]: 1.0}} | given))
    status, _, error = cli("score", *flags, *settings(file=str(path)))
    assert status == 2
    assert "teacher.json:1: query 'nobody' is unknown" in error
    status, made, err = cli("score", *flags, *settings(file=str(path), name="rest"), "--ON_ERROR=skip")
    assert status == 0, err
    assert "left out 1 × unknown query" in err
    assert TeacherScores(here.scores("rest")).fingerprint == teacher.fingerprint

    # Another file of this name takes the place of what is there only if it is named.
    path.write_text(json.dumps({first.id: {ids[0]: 0.25}}))
    status, _, error = cli("score", *flags, *settings(file=str(path)))
    assert (status, error.count("\n")) == (2, 1)
    assert f"{here.scores('teacher')}: made of something else than {path}: name what" in error
    assert TeacherScores(here.scores("teacher")).fingerprint == teacher.fingerprint
    assert cli("score", *flags, *settings(file=str(path), name="teacher"))[0] == 0
    assert dict(TeacherScores(here.scores("teacher")).read(collection)) == {first.id: {ids[0]: 0.25}}

    path = tmp_path / "hard.jsonl"
    neg = {"bm25": [ids[0], ids[1]], "dense": [right, ids[2]]}
    path.write_text(json.dumps({"qid": first.id, "pos": [right], "neg": neg}) + "\n")
    status, made, err = cli("score", *flags, *settings(file=str(path)))
    assert status == 0, err
    assert made["made"] == str(here.negatives("hard"))
    manifest = storage.read_manifest(here.negatives("hard"), "mine")
    assert manifest["distribution"] == {"positives": {}, "negatives": {}}  # there are none
    found = MinedNegatives(here.negatives("hard")).of_queries(collection)
    assert found == {first.id: (ids[0], ids[1], ids[2])}  # in turn, without what answers the query
    status, made, err = cli("score", *flags, *settings(candidates=("hard",), name="of_hard"))
    assert status == 0, err
    scores = dict(TeacherScores(here.scores("of_hard")).read(collection))
    assert scores[first.id].keys() == {*first.positives, *ids[:3]}
    assert not math.isnan(sum(scores[first.id].values()))
