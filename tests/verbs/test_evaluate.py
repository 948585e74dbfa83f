"""The verb `evaluate`: what the field's evaluators say of other tools' runs, and which runs are compared."""

import json
import re
from pathlib import Path

import ir_measures
import pytest
from ir_measures import RR, R, nDCG
from reading import python_of, write

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import variations
from retrieval_jax.data.collection import Collection
from retrieval_jax.evaluation import metrics
from retrieval_jax.evaluation.runs import write_run_with_facts
from retrieval_jax.verbs.evaluate import evaluate
from retrieval_jax.verbs.importing import import_collection
from retrieval_jax.verbs.index import make_index
from retrieval_jax.verbs.search import search
from retrieval_jax.verbs.vary import vary

WORDS = ["marble", "falcon", "thunder", "candle", "meadow", "lantern"]


def collection(folder: Path, files: dict[str, str], **settings) -> tuple[str, str, Workspace]:
    """A collection of these files; (its source, its work folder, the same as a Workspace)."""
    source, work = str(write(folder / "docs", files)), str(folder / "work")
    import_collection(source, work, vocab_size=40, **settings)
    return source, work, Workspace.for_source(source, work)


def add_run(work: Workspace, lines: str) -> None:
    path = work.run("theirs", "test")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line} tag\n" for line in lines.splitlines()))


def expected(qrels: str, run: str, rel: int = 1) -> dict[str, float]:
    """By ir_measures from the files' texts alone, over all judged queries."""
    rows = [line.split("\t") for line in qrels.splitlines()]
    judged = [ir_measures.Qrel(query, passage, int(grade)) for query, passage, grade in rows]
    ranked = [
        ir_measures.ScoredDoc(query, passage, float(score))
        for query, _, passage, _, score in (line.split() for line in run.splitlines())
    ]
    measures = {"MRR@10": RR(rel=rel) @ 10, "Recall@10": R(rel=rel) @ 10, "nDCG@10": nDCG @ 10}
    means = ir_measures.calc_aggregate(measures.values(), judged, ranked)
    return {name: means[measure] for name, measure in measures.items()}


DOCS = "".join(f"d{i}\t\t{word} text\n" for i, word in enumerate(WORDS))


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_grades_have_a_threshold_and_queries_without_relevant_passages_count(tmp_path, capsys, threshold):
    qrels = "q1\td0\t1\nq1\td1\t3\nq1\td2\t2\nq2\td3\t1\nq2\td4\t0\nq3\td5\t0\n"
    run = "q1 Q0 d0 1 3\nq1 Q0 d2 2 2\nq1 Q0 d1 3 1\nq2 Q0 d3 1 1\nq3 Q0 d5 1 2\nq3 Q0 d0 2 1\n"
    files = {
        "docs.tsv": DOCS,
        "queries.test.tsv": "q1\tmarble?\nq2\tcandle?\nq3\tlantern?\n",
        "qrels.test.tsv": qrels,
    }
    source, folder, work = collection(tmp_path, files)
    assert "test: 1 of 3 judged queries have no relevant passage: they count 0" in capsys.readouterr().err
    add_run(work, run)
    told = evaluate(source, folder, min_relevant_grade=threshold)
    metrics = told["metrics"]["theirs"]
    reference = expected(qrels, run, threshold)
    assert {name: metrics[name] for name in reference} == pytest.approx(reference)
    report = Path(told["report"]).read_text()
    assert ("relevant from grade" in report) == (threshold > 1)
    without = {1: 1, 2: 2, 3: 2}[threshold]
    assert f"<dt>none relevant</dt><dd>{without}</dd>" in report


def test_positives_that_cannot_be_found_stay_in_the_mean(tmp_path):
    qrels = "q1\td0\t1\nq1\tgone\t2\nq2\tgone\t1\nq3\td3\t1\n"
    run = "q1 Q0 d0 1 2\nq1 Q0 d1 2 1\nq2 Q0 d2 1 1\nq3 Q0 d3 1 1\n"
    files = {
        "docs.tsv": DOCS + "gone\tno text\n",
        "queries.test.tsv": "q1\tmarble?\nq2\tcandle?\nq3\tlantern?\n",
        "qrels.test.tsv": qrels,
    }
    source, folder, work = collection(tmp_path, files, on_error="skip")
    add_run(work, run)
    metrics = evaluate(source, folder)["metrics"]["theirs"]
    assert metrics["MRR@10"] == pytest.approx(2 / 3)
    assert metrics["Recall@10"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    reference = expected(qrels, run)
    assert {name: metrics[name] for name in reference} == pytest.approx(reference)


def test_a_query_that_is_a_passage_is_left_out_of_its_own_results(tmp_path):
    """As BEIR does it; but not where a query and an unrelated passage only share their number."""
    texts = {
        "a1": "marble harbour",
        "a2": "marble harbour bay",
        "a3": "falcon anchor",
        "a4": "falcon anchor pier",
    }
    queries = {"a1": texts["a1"], "a3": texts["a3"], "a4": "harbour?"}
    files = {
        "docs.tsv": "".join(f"{key}\t\t{text}\n" for key, text in texts.items()),
        "queries.test.tsv": "".join(f"{key}\t{text}\n" for key, text in queries.items()),
        "qrels.test.tsv": "a1\ta2\t1\na3\ta4\t1\na4\ta1\t1\n",
    }
    source, folder, work = collection(tmp_path, files)
    make_index(source=source, work_dir=folder, kind="bm25")
    search(source, folder, k=1)
    run = [line.split() for line in work.run("bm25", "test").read_text().splitlines()]
    assert [(query, passage) for query, _, passage, *_ in run] == [
        *[("a1", "a1"), ("a1", "a2")],  # one more than K, of which the first does not count
        *[("a3", "a3"), ("a3", "a4")],
        ("a4", "a1"),
    ]
    told = evaluate(source, folder)
    assert told["metrics"]["bm25"]["Hits@1"] == 1.0
    assert "<dt>left out of their own results</dt><dd>2</dd>" in Path(told["report"]).read_text()
    kept = evaluate(source, folder, ignore_identical_ids=False)
    assert kept["metrics"]["bm25"]["Hits@1"] == pytest.approx(1 / 3)
    judged = ir_measures.read_trec_qrels(str(work.qrels("test")))
    assert [one[:3] for one in judged] == [("a1", "a2", 1), ("a3", "a4", 1), ("a4", "a1", 1)]


def test_runs_of_different_k_are_compared_in_what_both_go_deep_enough_for(tmp_path, capsys):
    """They are joined: a run's depth is known, and a star marks what looks further."""
    files = {
        "docs.tsv": DOCS,
        "queries.test.tsv": "q1\tmarble text?\nq2\tcandle text?\n",
        "qrels.test.tsv": "q1\td0\t1\nq1\td2\t1\nq2\td3\t1\n",
    }
    source, folder, work = collection(tmp_path, files)
    for name, k in (("deep", 6), ("shallow", 1)):
        make_index(source=source, work_dir=folder, kind="bm25", name=name)
        search(source, folder, name=name, k=k)
    capsys.readouterr()
    told = evaluate(source, folder, measures=("RR@1", "R@5"))
    err = " ".join(capsys.readouterr().err.split())
    assert told["metrics"].keys() == {"deep", "shallow"}
    assert "left out" not in err
    assert "shallow: 1 passages a query: measures that look further" in err
    assert told["metrics"]["shallow"]["R@5"] < told["metrics"]["deep"]["R@5"]
    tests = json.loads(work.significance.read_text())
    assert tests["not_comparable"] == {"shallow": ["R@5"]}
    assert tests["differences"]["shallow"].keys() == {"RR@1"}


def test_what_stays_certain_and_what_plans_keep_in_other_words(tmp_path):
    """As the runs of a planned search and of its lexical half tell; a dash where nothing was proven."""
    files = {
        "docs.tsv": DOCS,
        "queries.test.tsv": "q1\tmarble text?\nq2\tcandle text?\nq3\tmeadow text?\n",
        "qrels.test.tsv": "q1\td0\t1\nq2\td3\t1\nq3\td4\t1\n",
    }
    source, folder, work = collection(tmp_path, files)
    vary(source, folder, kinds=("shuffle",))
    model = {"model": "m", "step": 1, "checksum": "c", "sets_fingerprint": "s"}
    planned = {"kind": "planned", "planned_by": {"plan_size": 2}} | model
    searchers = {"pag": planned, "pag_lexical": {"kind": "lexical"} | model, "logits": planned | {"step": 2}}
    certain = {"pag": {"test": ["q1", "q2"], "test~shuffle": ["q2", "q3"]}, "logits": {"test": []}}
    read = Collection(work.collection).recipe("test")
    for split in ("test", "test~shuffle"):
        passages = ("d0", "d3", "d4") if split == "test" else ("d0", "d4", "d3")
        run = {f"q{i}": [(passage, -float(i)) for i, passage in enumerate(passages)] for i in (1, 2, 3)}
        for name, searcher in searchers.items():
            recipe = {"searcher": searcher, **read, "split": split, "k": 3}
            if variation := variations.fingerprint(work, split):
                recipe["variation"] = variation
            facts = {"recipe": recipe, "family": searcher["kind"], "parameters": 1, "summary": {}}
            if name in certain:
                ids = certain[name].get(split, [])
                facts |= {"summary": {"certain": round(len(ids) / 3, 4)}, "certain": ids}
            write_run_with_facts(work.run(name, split), run, name, facts)
    told = evaluate(source, folder, measures=("RR@3",))
    assert told["metrics"].keys() == searchers.keys()
    effects = {
        name: kinds["shuffle"] for name, kinds in json.loads(work.robustness.read_text())["methods"].items()
    }
    assert {name: effect["still_certain"] for name, effect in effects.items()} == {
        "pag": 0.5,
        "pag_lexical": None,
        "logits": None,
    }
    assert {name: effect["plan_overlap"] for name, effect in effects.items()} == {
        "pag": 0.5,  # of the first two passages of three: d0, d3 and d0, d4
        "pag_lexical": None,
        "logits": None,
    }
    section = work.report.read_text().partition("Other wordings of the queries")[2]
    rows = dict(re.findall("<tr><th>(pag|pag_lexical|logits)</th>(.*?)</tr>", section))
    shown = {
        name: re.findall("<small>((?:still )?certain .*?|of the plans .*?)</small>", row)
        for name, row in rows.items()
    }
    assert shown == {
        "pag": ["certain 67%", "of the plans 50%", "still certain 50%"],
        "pag_lexical": ["certain –", "still certain –"],
        "logits": ["certain –", "still certain –"],
    }


def test_a_metric_of_a_module_that_a_gin_file_imports_is_in_the_table_and_the_report(
    tmp_path, cli, monkeypatch
):
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    (example,) = (
        code for code in python_of("retrieval_jax/evaluation/README.md") if "register_metric" in code
    )
    (tmp_path / "answered_metric_module.py").write_text(example)
    (tmp_path / "answered.gin").write_text("import answered_metric_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "docs.tsv": DOCS,
        "queries.test.tsv": "q1\tmarble?\nq2\tcandle?\n",
        "qrels.test.tsv": "q1\td0\t1\nq1\td2\t1\nq2\td3\t1\n",
    }
    source, folder, work = collection(tmp_path, files)
    add_run(work, "q1 Q0 d1 1 3\nq1 Q0 d2 2 2\nq1 Q0 d0 3 1\n")
    here = [f"--COLLECTION={source}", f"--WORK_DIR={folder}", f"--gin_file={tmp_path / 'answered.gin'}"]
    status, made, err = cli("evaluate", *here)
    assert status == 0, err
    assert made["metrics"]["theirs"]["AP@10"] == pytest.approx((1 / 2 + 2 / 3) / 2 / 2)
    assert made["metrics"]["theirs"]["Answered"] == 0.5
    assert "<th>AP@10</th><th>Answered</th>" in work.report.read_text()
    assert "Answered" in err


def test_a_runs_facts_keep_the_metrics_that_names_say(tmp_path):
    """Cards of exports show them: with another threshold MRR@10 is another measure."""
    qrels = "q1\td0\t1\nq1\td1\t2\n"
    files = {"docs.tsv": DOCS, "queries.test.tsv": "q1\tmarble falcon?\n", "qrels.test.tsv": qrels}
    source, folder, work = collection(tmp_path, files)
    make_index(source=source, work_dir=folder, kind="bm25")
    search(source, folder)

    def kept() -> dict[str, float]:
        return json.loads(work.run("bm25", "test").with_suffix(".json").read_text())["metrics"]

    evaluate(source, folder)
    usual = kept()
    assert usual["MRR@10"] == 1
    evaluate(source, folder, min_relevant_grade=3)
    assert kept() == usual
    evaluate(source, folder, measures=("NumRet",))
    assert kept() == usual | {"NumRet": 2.0}
