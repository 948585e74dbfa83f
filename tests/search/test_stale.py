"""What was made of an earlier model, searcher or collection is made anew, or left out and named."""

import json
import shutil
from pathlib import Path

import pytest
from model_folders import random_params, write_model_folder

from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import learn
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.run import docid_softmax


@pytest.fixture
def own(arguments, source, tmp_path) -> list[str]:
    """Bindings of a work folder, and a source, that a test may change."""
    folder = shutil.copytree(source, tmp_path / "small_docs")
    return [f"--gin.COLLECTION={str(folder)!r}", f"--gin.WORK_DIR='{tmp_path / 'work'}'", *arguments[2:]]


def test_a_generative_model_that_is_another_at_the_same_step_is_noticed(own, collection, tmp_path, cli):
    assert cli("import", *own)[0] == 0
    assert cli("docids", *own, "--gin.DOCIDS='atomic'")[0] == 0
    table, folder = DocidTable.open(tmp_path / "work/docids/atomic"), tmp_path / "model"
    model = GenerativeRetriever(T5Config(1152, 16, 2, 8, 20, 1, 1, **docid_softmax(table)))

    def trained(seed: int) -> None:
        facts = {"docids": "atomic", "docids_fingerprint": table.fingerprint()}
        write_model_folder(folder, model, random_params(model, seed), collection, **facts)

    index = ["index", *own, f"--gin.MODEL_DIR='{folder}'"]
    search = ["search", *own, "--gin.SEARCHER='atomic'"]
    export = ["export", *own, "--gin.SEARCHER='atomic'"]
    trained(0)
    for command in (index, search, export):
        assert cli(*command)[0] == 0
    first = (tmp_path / "work/runs/atomic.test.trec").read_text()
    exported = shutil.copytree(tmp_path / "work/exports/atomic", tmp_path / "carried")
    found = Searcher.open(exported).search(["smooth a signal"], 5)

    trained(1)
    for command in (search, export, ["mine", *own, "--gin.SEARCHER='atomic'"]):
        status, _, err = cli(*command)
        assert status == 2
        assert "not the model (of step 7) that" in err
        assert "`retrieval-jax index`" in err
    for command in (index, search, export):
        assert cli(*command)[0] == 0
    assert (tmp_path / "work/runs/atomic.test.trec").read_text() != first
    # What was exported holds all that it answers with; exported again it is the new model's.
    assert Searcher.open(exported).search(["smooth a signal"], 5) == found
    again = Searcher.open(tmp_path / "work/exports/atomic").search(["smooth a signal"], 5)
    assert again == Searcher.open(tmp_path / "work/searchers/atomic").search(["smooth a signal"], 5) != found


def test_queries_of_a_generator_that_is_another_at_the_same_step_are_made_anew(
    own, collection, tmp_path, cli
):
    assert cli("import", *own)[0] == 0
    model, folder = QueryGenerator(T5Config(1152, 16, 2, 8, 20, 1, 1)), tmp_path / "model"
    generate = ["generate-queries", *own, f"--gin.MODEL_DIR='{folder}'", "--gin.generate_queries.count=1"]

    def generated(seed: int) -> tuple[list[list[str]], int]:
        write_model_folder(folder, model, random_params(model, seed), collection)
        status, _, err = cli(*generate)
        assert status == 0, err
        made = tmp_path / "work/synthetic/doc2query"
        texts = SyntheticQueries(made).get(range(collection.passage_count))
        assert any(texts)
        return texts, (made / "manifest.json").stat().st_mtime_ns

    first = generated(0)
    assert generated(0) == first
    assert generated(1)[0] != first[0]


def test_changed_qrels_alone_are_those_that_count(own, tmp_path, cli):
    """The run is of other judgements: it is left out, or scored by those of now, never by those of then."""
    source = Path(own[0].split("'")[1])
    for verb in ("import", "index", "search", "evaluate"):
        status, made, _ = cli(verb, *own)
        assert status == 0
    before = made["metrics"]["bm25"]
    path = source / "qrels.test.tsv"
    wrong = (source / "docs.tsv").read_text().splitlines()[0].split("\t")[0]
    path.write_text("".join(f"{line.split()[0]}\t{wrong}\t1\n" for line in path.read_text().splitlines()))
    assert cli("import", *own)[0] == 0
    status, _, err = cli("evaluate", *own)
    assert status == 2
    assert "bm25.test.trec: left out, it is of another collection (or an earlier one)" in err
    for verb in ("index", "search", "evaluate"):
        status, made, _ = cli(verb, *own)
        assert status == 0
    assert made["metrics"]["bm25"]["MRR@10"] < before["MRR@10"]


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
    assert "searchers/bm25 was made anew since" in err


@pytest.mark.parametrize("query", ["", " ", "zyzzyva"])
def test_a_query_for_which_nothing_is_found(query, work, arguments, cli):
    assert cli("index", *arguments)[0] == 0
    status, made, err = cli("search", *arguments, f"--gin.QUERY={query!r}")
    assert status == 0
    assert made == {"query": query, "passages": []}
    assert f"bm25: no passage was found for {query!r}" in err


def test_another_vocabulary_under_the_same_name_is_noticed(own, collection, tmp_path, cli):
    path, work = tmp_path / "pieces.model", tmp_path / "work"
    own = [*own, f"--gin.VOCABULARY='{path}'", "--gin.DOCIDS='naive'"]
    shutil.copyfile(collection.vocabulary_path, path)
    for verb in ("import", "docids"):
        assert cli(verb, *own)[0] == 0
    first = (work / "docids/naive/tokens.npy").read_bytes()

    learn(["an altogether different text", "of few words", *collection.ids.to_pylist()], 300, path)
    assert cli("import", *own)[0] == 0
    assert (work / "collection/sentencepiece.model").read_bytes() == path.read_bytes()
    status, _, err = cli("train", "--gin_file=runs/naive.gin", *own)
    assert status == 2
    assert "docids/naive: written in another vocabulary" in err
    assert cli("docids", *own)[0] == 0
    assert (work / "docids/naive/tokens.npy").read_bytes() != first
