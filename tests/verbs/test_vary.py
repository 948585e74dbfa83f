"""The verb `vary`: splits of varied queries, which are searched for and evaluated as any other split."""

import json
from pathlib import Path

import pytest

from retrieval_jax.data.collection import Collection
from retrieval_jax.data.variations import KINDS, names, vary
from retrieval_jax.search.searcher import Searcher


def test_variations_are_splits(own, tmp_path: Path, cli):
    work = tmp_path / "work"
    for verb in ("import", "index"):
        assert cli(verb, *own)[0] == 0
    for verb, message in (
        ("search", "variations: none of split 'test': make them with `retrieval-jax vary --SPLIT=test`"),
        ("evaluate", "evaluate.split: test~all: several splits, for `search` alone: name one, as test"),
    ):
        status, _, err = cli(verb, *own, "--SPLIT=test~all")
        assert status == 2
        assert message in err
    status, made, _ = cli("vary", *own)
    assert status == 0
    queries = Collection(work / "collection").queries("test")
    assert made["splits"].keys() == {f"test~{kind}" for kind in KINDS}
    for kind in KINDS:
        file = work / "variations" / f"test~{kind}" / "queries.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines == [{"_id": q.id, "text": vary(q.text, kind, q.id)} for q in queries]
        changed = sum(line["text"] != q.text for line, q in zip(lines, queries, strict=True))
        assert made["splits"][f"test~{kind}"] == {"queries": len(queries), "changed": changed}
    assert made["splits"]["test~typo"]["changed"] == len(queries)

    # They are not made again, and one that is changes its runs.
    before = {path: path.stat().st_mtime_ns for path in (work / "variations").glob("*/*")}
    assert cli("vary", *own)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert cli("search", *own, "--SPLIT=test~typo")[0] == 0
    searcher = Searcher.open(work / "searchers" / "bm25")
    found = searcher.search([vary(q.text, "typo", q.id) for q in queries], 100)
    run = [line.split() for line in (work / "runs" / "bm25.test~typo.trec").read_text().splitlines()]
    assert [(row[0], row[2]) for row in run] == [
        (q.id, passage) for q, ranked in zip(queries, found, strict=True) for passage, _ in ranked
    ]
    for split in ("test", "test~shuffle"):
        assert cli("search", *own, f"--SPLIT={split}")[0] == 0
    of = {}
    for split in ("test", "test~typo", "test~shuffle"):
        status, made, err = cli("evaluate", *own, f"--SPLIT={split}")
        assert (status, "left out" in err) == (0, False)
        of[split] = made["metrics"]["bm25"]

    # All at once; and the report of the split tells what the variations do.
    status, made, err = cli("search", *own, "--SPLIT=test~all")
    assert (status, made["runs"].keys()) == (0, {"test", *(f"test~{kind}" for kind in KINDS)})
    assert made["runs"]["test~typo"]["run"] == str(work / "runs" / "bm25.test~typo.trec")
    status, made, _ = cli("evaluate", *own)
    facts = json.loads((work / "robustness.json").read_text())
    assert (status, made["robustness_file"]) == (0, str(work / "robustness.json"))
    assert (facts["split"], facts["measure"], facts["queries"]) == ("test", "nDCG@10", len(queries))
    effects = facts["methods"]["bm25"]
    assert effects.keys() == {*KINDS}
    assert effects["typo"]["clean"] == pytest.approx(of["test"]["nDCG@10"])
    assert effects["typo"]["value"] == pytest.approx(of["test~typo"]["nDCG@10"])
    assert effects["typo"]["relative_loss"] > effects["shuffle"]["relative_loss"] == 0
    assert effects["shuffle"]["overlap@10"] == effects["shuffle"]["difference"]["p"] == 1
    page = (work / "report.html").read_text()
    assert "<h2>Other wordings of the queries</h2>" in page
    assert all(f"<th>{kind}</th>" in page for kind in KINDS)

    assert of["test~typo"]["nDCG@10"] < of["test"]["nDCG@10"] == of["test~shuffle"]["nDCG@10"]

    assert cli("vary", *own, "--SEED=1", "--gin.vary.kinds=('typo',)")[0] == 0
    status, _, err = cli("evaluate", *own, "--SPLIT=test~typo")
    assert status == 2
    assert "bm25.test~typo.trec: left out, the queries of test~typo were made again since" in err
    assert cli("search", *own, "--SPLIT=test~typo")[0] == 0
    assert cli("evaluate", *own, "--SPLIT=test~typo")[0] == 0

    # A run of another K, and variations of an earlier collection, are left out.
    assert cli("search", *own, "--SPLIT=test~typo", "--K=5")[0] == 0
    status, _, err = cli("evaluate", *own)
    assert status == 0
    assert "bm25.test~typo: left out, a run of K=5, and that of test is of K=100: search with that" in err
    kinds = json.loads((work / "robustness.json").read_text())["methods"]["bm25"]
    assert kinds.keys() == {*KINDS} - {"typo"}
    with (tmp_path / "small_docs" / "docs.tsv").open("a") as file:
        file.write("new\ta title\tone more passage\n")
    for verb in ("import", "index", "search"):
        assert cli(verb, *own)[0] == 0
    status, _, err = cli("evaluate", *own)
    assert status == 0
    assert "test~swap: left out: " in err
    assert not (work / "robustness.json").exists()


def test_a_file_of_paraphrases_is_one_more_kind(own, tmp_path: Path, cli):
    assert cli("import", *own)[0] == 0
    queries = Collection(tmp_path / "work" / "collection").queries("dev")
    file = tmp_path / "paraphrase.tsv"
    file.write_text("".join(f"{q.id}\tplease: {q.text}\n" for q in queries))
    arguments = [*own, "--SPLIT=dev", "--gin.vary.kinds=()", f"--gin.vary.file='{file}'"]
    status, made, _ = cli("vary", *arguments)
    assert (status, made) == (0, {"splits": {"dev~paraphrase": {"queries": 10, "changed": 10}}})
    path = tmp_path / "work" / "variations" / "dev~paraphrase" / "queries.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"_id": q.id, "text": f"please: {q.text}"} for q in queries]
    file.write_text("nobody\tx\n" + "".join(f"{q.id}\t{q.text}\n" for q in queries))
    _, made, err = cli("vary", *arguments)
    assert made["splits"]["dev~paraphrase"]["changed"] == 0
    assert "paraphrase.tsv: 1 of 11 ids are of no query of the split, as 'nobody'" in err
    file.write_text("".join(f"{q.id}\t{' ' if q is queries[3] else q.text}\n" for q in queries))
    status, _, err = cli("vary", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert f"no text for 1 of 10 queries, as {queries[3].id!r}" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("paraphrase.tsv", "nobody\tx\n", "paraphrase.tsv: no text for 10 of 10 queries, as '"),
        ("typo.tsv", "q\tx\n", "typo.tsv: typo is the name of another kind: give the file another name"),
        ("all.tsv", "q\tx\n", "all.tsv: all is the name of another kind"),
        ("none.tsv", None, "none.tsv: no such file: give the path of one"),
        ("a b.tsv", "q\tx\n", "'a b': cannot be the name of an artefact"),
    ],
)
def test_a_bad_file_is_one_line(name, text, message, work, arguments, tmp_path: Path, cli):
    if text:
        (tmp_path / name).write_text(text)
    file = f"--gin.vary.file='{tmp_path / name}'"
    status, _, err = cli("vary", *arguments, "--gin.vary.kinds=()", file)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert not names(work)
