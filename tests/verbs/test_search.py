"""The verb `search`: what it writes, and what it says of a question without an answer."""

import shutil

import pytest


def test_a_run_of_another_k_is_searched_anew_and_told_of(own, tmp_path, cli):
    for verb in ("import", "index"):
        assert cli(verb, *own)[0] == 0
    assert cli("search", *own, "--gin.K=3")[0] == 0
    run = tmp_path / "work/runs/bm25.test.trec"
    rows = run.read_text().splitlines()
    shutil.copyfile(run, run.with_name("other.test.trec"))
    status, made, err = cli("evaluate", *own)
    assert status == 0
    assert "bm25: 3 passages a query: measures that look further take the others for not found" in err
    assert made["metrics"]["bm25"] == made["metrics"]["other"]
    assert cli("search", *own, "--gin.K=100")[0] == 0
    assert len(run.read_text().splitlines()) > len(rows)
    assert run.read_text().splitlines()[:3] == rows[:3]
    status, made, err = cli("evaluate", *own)
    assert "passages a query" not in err
    assert made["metrics"]["bm25"]["Recall@100"] > made["metrics"]["other"]["Recall@100"]

    # What is not as `search` wrote it is somebody's, and stays.
    (run.with_name("bm25+rm3.test.trec")).write_text(run.read_text())
    (run.with_name(".hidden.test.trec")).write_text("no run")
    changed = run.read_text().replace("bm25", "mine")
    run.write_text(changed)
    status, _, err = cli("search", *own, "--gin.K=100")
    assert (status, err.count("\n")) == (2, 1)
    assert "bm25.test.trec: is another tool's run, or was changed since: give it another name" in err
    assert run.read_text() == changed
    status, made, err = cli("evaluate", *own)
    assert status == 0, err
    assert {*made["metrics"]} == {"bm25", "bm25+rm3", "other"}
    assert run.with_name("bm25+rm3.test.values.tsv").is_file()


@pytest.mark.parametrize("query", ["", " ", "zyzzyva"])
def test_a_query_for_which_nothing_is_found(query, work, arguments, cli):
    assert cli("index", *arguments)[0] == 0
    status, made, err = cli("search", *arguments, f"--gin.QUERY={query!r}")
    assert status == 0
    assert made == {"query": query, "passages": []}
    assert f"bm25: no passage was found for {query!r}" in err
