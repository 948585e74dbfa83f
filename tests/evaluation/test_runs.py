"""The runs of a work folder: which there are, and which no longer count."""

import contextlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from reading import write
from run_files import write_run

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.trec import read_run
from retrieval_jax.evaluation.metrics import RunValues
from retrieval_jax.evaluation.runs import (
    current_runs,
    read_facts,
    read_query_values,
    run_paths,
    write_query_values,
    write_run_with_facts,
)
from retrieval_jax.verbs.importing import import_collection


def test_evaluate_tells_runs_with_dots_apart(tmp_path: Path):
    work = Workspace(tmp_path)
    expected = {name: work.run(name, "test") for name in ("bm25", "bm25.v2", "bm25.v3")}
    for path in (*expected.values(), work.qrels("test"), work.run("other", "dev")):
        storage.atomic_write(path, b"")
    assert run_paths(work, "test") == expected


def test_facts_are_of_the_run_that_they_were_written_with(tmp_path: Path):
    path = tmp_path / "bm25.test.trec"
    assert read_facts(path) is None
    write_run_with_facts(path, {"q": [("p", 1.0)]}, "bm25", {"recipe": {"k": 7}})
    assert read_facts(path)["recipe"] == {"k": 7}
    path.write_text("q Q0 p 1 2.0 Anserini\n")
    assert read_facts(path) is None


def test_a_run_that_the_format_cannot_hold_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "bm25.test.trec"
    write_run_with_facts(path, {"q": [("p", 1.0)]}, "bm25", {"recipe": {"k": 7}})
    path.with_suffix(".values.tsv").write_text("RR\tall\t1.0\n")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="'p' is ranked twice"):
        write_run_with_facts(path, {"q": [("p", 1.0), ("p", 0.5)]}, "bm25", {"recipe": {"k": 8}})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kill", range(3))
def test_a_kill_leaves_no_run_that_seems_to_be_of_another_tool(tmp_path: Path, monkeypatch, kill: int):
    """Nor values of queries that are of the run before."""
    path, replace, files = tmp_path / "bm25.test.trec", os.replace, itertools.count()
    old, new = ({"q": [(passage, 1.0)]} for passage in "pr")
    write_run_with_facts(path, old, "bm25", {"recipe": {"k": 7}})
    path.with_suffix(".values.tsv").write_text("RR\tall\t1.0\n")

    def killed(*args):
        if next(files) == kill:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):
        write_run_with_facts(path, new, "bm25", {"recipe": {"k": 8}})
    assert path.exists() == (kill == 2)
    assert not path.exists() or (read_run(path), read_facts(path)["recipe"]) == (new, {"k": 8})
    assert not path.with_suffix(".values.tsv").exists()


def test_the_mean_is_told_from_a_query_that_is_called_as_it_is(tmp_path: Path):
    path, queries, values = tmp_path / "bm25.test.trec", ["a", "all", "z"], np.array([0.5, 1.0, 0.0])
    of = {"RR": values, "AP": values / 2}
    means = {name: float(some.mean()) for name, some in of.items()} | {"Answered": 0.25}
    write_query_values(path, RunValues(means, of), queries)
    for name, some in of.items():
        assert read_query_values(path, name) == dict(zip(queries, some.tolist(), strict=True))
    assert read_query_values(path, "Answered") == {}


def test_a_run_of_another_collection_shares_some_numbers_by_chance(tmp_path: Path, capsys):
    """It is left out where most of its passages are unknown; a few unknown ones are told."""
    files = {
        "docs.tsv": "".join(f"{i}\t\tthe text of number {i}\n" for i in range(20)),
        "queries.test.tsv": "1\tfirst?\n2\tsecond?\n",
        "qrels.test.tsv": "1\t0\t1\n2\t1\t1\n",
    }
    source, folder = str(write(tmp_path / "docs", files)), str(tmp_path / "work")
    import_collection(source, folder, vocab_size=40)
    work = Workspace.for_source(source, folder)
    for name, first in {"few": 1, "known": 0, "theirs": 11}.items():
        ranked = [(str(passage), -float(passage)) for passage in range(first, first + 20)]
        write_run(work.run(name, "test"), {"1": ranked, "2": ranked, "3": ranked}, name)
    work.run("theirs", "test").with_suffix(".values.tsv").write_text("RR\tall\t1.0\n")
    capsys.readouterr()
    found = current_runs(work, "test", Collection(work.collection))
    assert [*found] == ["few", "known"]
    few, theirs = capsys.readouterr().err.splitlines()
    assert "few.test.trec: 1 of its 20 passages (5.0%) are not in the collection: they keep their" in few
    assert "theirs.test.trec: left out, 11 of its 20 passages (55.0%) are not in the collection: " in theirs
    assert not work.run("theirs", "test").with_suffix(".values.tsv").exists()


def test_changed_qrels_alone_are_those_that_count(own, tmp_path, cli):
    """The run is of other judgements: it is left out, or scored by those of now, never by those of then.

    What is made of the passages alone stays.
    """
    source = Path(own[0].split("'")[1])
    for verb in ("import", "index", "search", "evaluate"):
        status, made, _ = cli(verb, *own)
        assert status == 0
    before = made["metrics"]["bm25"]
    indexed = (tmp_path / "work/searchers/bm25/manifest.json").stat()
    path = source / "qrels.test.tsv"
    wrong = (source / "docs.tsv").read_text().splitlines()[0].split("\t")[0]
    path.write_text("".join(f"{line.split()[0]}\t{wrong}\t1\n" for line in path.read_text().splitlines()))
    assert cli("import", *own)[0] == 0
    status, _, err = cli("evaluate", *own)
    assert status == 2
    assert "bm25.test.trec: left out, the queries of test, or their judgements, were others" in err
    for verb in ("index", "search", "evaluate"):
        status, made, _ = cli(verb, *own)
        assert status == 0
    assert made["metrics"]["bm25"]["MRR@10"] < before["MRR@10"]
    assert (tmp_path / "work/searchers/bm25/manifest.json").stat().st_mtime_ns == indexed.st_mtime_ns


def test_runs_of_an_earlier_state_are_left_out(own, tmp_path, cli):
    runs, docs = tmp_path / "work/runs", Path(own[0].split("'")[1]) / "docs.tsv"
    for verb in ("import", "index", "search"):
        assert cli(verb, *own)[0] == 0
    assert cli("evaluate", *own)[0] == 0

    # A tool without a note beside its run, in BEIR's form, and a passage that the collection lacks.
    qrels = [line.split() for line in (runs / "qrels.test.trec").read_text().splitlines()]
    lines = [f"{q} Q0 elsewhere 0 0.5 x\n{q} Q0 {passage} 0 0.9 x\n" for q, _, passage, _ in qrels]
    (runs / "other.v2.test.trec").write_text("".join(lines))
    status, made, err = cli("evaluate", *own)
    assert status == 0, err
    assert set(made["metrics"]) == {"bm25", "other.v2"}
    assert made["metrics"]["other.v2"]["MRR@10"] == 1

    docs.write_text(docs.read_text() + "new\t\ta passage that was added later\n")
    assert cli("import", *own)[0] == 0
    status, made, err = cli("evaluate", *own)
    assert status == 0
    assert set(made["metrics"]) == {"other.v2"}
    assert "bm25.test.trec: left out, it is of another collection" in err
    assert [path.name for path in runs.glob("*.values.tsv")] == ["other.v2.test.values.tsv"]
    (runs / "other.v2.test.trec").unlink()
    status, _, err = cli("evaluate", *own)
    assert status == 2
    assert "every run of split 'test' is of an earlier collection or searcher" in err

    for verb in ("index", "search", "evaluate"):
        assert cli(verb, *own)[0] == 0
    note = json.loads((runs / "bm25.test.json").read_text())
    note["recipe"]["searcher"]["kind"] = "another"
    (runs / "bm25.test.json").write_text(json.dumps(note))
    status, _, err = cli("evaluate", *own)
    assert status == 2
    assert "searchers/bm25 was built again since" in err


def test_runs_of_other_tools_join_the_table(own, tmp_path, cli):
    """With the values of each query; what is of another split or collection is told, and left out."""
    runs = tmp_path / "work/runs"
    for verb in ("import", "index", "search"):
        assert cli(verb, *own)[0] == 0
    qrels = [line.split() for line in (runs / "qrels.test.trec").read_text().splitlines()]
    queries = list(dict.fromkeys(query for query, *_ in qrels))
    files = {
        "pyserini.test.trec": [f"{q} Q0 {p} 1 9.5 Anserini" for q, _, p, _ in qrels if q != queries[0]],
        "dev_queries.test.trec": [f"other{q} Q0 {p} 1 9.5 x" for q, _, p, _ in qrels],
        "msmarco.test.trec": [f"{q} Q0 {i}0000 1 9.5 x" for i, (q, *_) in enumerate(qrels)],
        "renamed.test.trec": (runs / "bm25.test.trec").read_text().splitlines(),
        "run.beir.txt": ["no run at all"],
        "bm25.validation.trec": ["nor this"],
    }
    for name, lines in files.items():
        (runs / name).write_text("\n".join(lines) + "\n")
    facts = json.loads((runs / "bm25.test.json").read_text())
    facts["recipe"]["split"] = "dev"
    (runs / "renamed.test.json").write_text(json.dumps(facts))
    (runs / "pyserini.test.json").write_text('{"tool": "its own notes"}')
    (runs / "pyserini.test.tsv").write_text("q0 d0 1\n")

    measures = "('RR@10', 'R@1000', 'AP', 'Judged@10')"
    status, made, err = cli("evaluate", *own, f"--gin.evaluate.measures={measures}")
    assert status == 0, err
    told = " ".join(err.split())
    assert set(made["metrics"]) == {"bm25", "pyserini"}
    for line in (
        "dev_queries.test.trec: left out, none of its queries is of split 'test'",
        f"msmarco.test.trec: left out, {len(qrels)} of its {len(qrels)} passages (100.0%) are not in the",
        "renamed.test.trec: left out, it is of split 'dev'",
        "run.beir.txt: left out: the name of a run is NAME.SPLIT.trec",
        "bm25.validation.trec: left out: the name",
        f"pyserini.test.trec: no results for 1 of {len(queries)} queries",
    ):
        assert line in told, line
    # The collection has some dozens of passages, so that bm25 is deep enough and a run of one a query is not.
    assert "pyserini: lists of 1 at most: measures that look further take the others for not found" in told
    assert "not compared: AP, Judged@10, R@1000, RR@10" in told
    expected = (len(queries) - 1) / len(queries)
    assert made["metrics"]["pyserini"] == dict.fromkeys(("RR@10", "R@1000", "AP", "Judged@10"), expected)
    significance = json.loads(Path(made["significance_file"]).read_text())
    assert (significance["baseline"], significance["queries"]) == ("bm25", len(queries))
    assert significance["differences"] == {"pyserini": {}}
    assert json.loads((runs / "pyserini.test.json").read_text()) == {"tool": "its own notes"}

    lines = [line.split("\t") for line in (runs / "pyserini.test.values.tsv").read_text().splitlines()]
    values = {query: float(value) for metric, query, value in lines if metric == "AP"}
    assert values == dict.fromkeys(queries, 1.0) | {queries[0]: 0.0, "all": expected}
    assert (runs / "pyserini.test.tsv").read_text() == "q0 d0 1\n"
    status, _, err = cli("evaluate", *own, "--gin.evaluate.baseline='nothing'")
    assert status == 2
    assert "evaluate.baseline: no run 'nothing': there are bm25, pyserini" in err
