"""The verb `sweep`: folders and ir_datasets, methods that train, what fails, and what is there already."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from reading import write

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.verbs import sweep as sweep_verb

WORDS = ["marble", "falcon", "thunder", "candle", "meadow", "lantern"]
SMALL = {
    "docs.tsv": "".join(f"d{i}\t\t{word} text\n" for i, word in enumerate(WORDS)),
    "queries.dev.tsv": "q1\tmarble?\nq2\tcandle?\n",
    "qrels.dev.tsv": "q1\td0\t1\nq2\td0\t1\nq2\td3\t2\n",
}


@pytest.fixture
def registered(tmp_path: Path):
    """A dataset of ir_datasets that exists on this machine alone."""
    ir_datasets = pytest.importorskip("ir_datasets")
    files = {"docs.tsv": "d1\tfirst text\nd2\tsecond text\n", "queries.tsv": "q1\tfirst?\n"}
    folder = write(tmp_path / "local", files | {"qrels": "q1 0 d1 1\n"})

    def local(name: str):
        return ir_datasets.util.LocalDownload(str(folder / name))

    docs = ir_datasets.formats.TsvDocs(local("docs.tsv"))
    queries = ir_datasets.formats.TsvQueries(local("queries.tsv"))
    qrels = ir_datasets.formats.TrecQrels(local("qrels"), {})
    dataset = ir_datasets.datasets.base.Dataset(docs, queries, qrels)
    ir_datasets.registry.register("tiny-sweep", dataset)
    yield "ir_datasets:tiny-sweep"
    del ir_datasets.registry._registered["tiny-sweep"]


def test_methods_on_collections(source: Path, tmp_path: Path, cli):
    """One trains where there are train queries; a model's folder is for all; a failure is a line of a row."""
    (tmp_path / "tiny.gin").write_text(
        "include 'runs/dual_encoder.gin'\nSTEPS = 1\nDataConfig.mixture = {'labelled': 1.0}\n"
        "DataConfig.unlabelled = None\nT5Config.num_encoder_layers = 0\nDualEncoder.vector_dim = 16\n"
        "make_index.kind = 'exact'\ntrain.batch_size = 8\n"
        "T5Config.emb_dim = 16\nDataConfig.passage_length = 16\n"
    )
    small = str(write(tmp_path / "small", SMALL))
    sources = [str(source), small, str(tmp_path / "missing")]
    work = tmp_path / "sweep"
    here = [f"--WORK_DIR={work}", "--gin.import_collection.vocab_size=500"]

    def sweep(*methods: str) -> tuple[int, dict | None, str, dict]:
        answer = cli("sweep", *sources, *here, f"--gin.sweep.methods={methods!r}")
        return *answer, json.loads((work / "sweep.json").read_text())

    status, _, err, facts = sweep("bm25", str(tmp_path / "tiny.gin"))
    assert (status, facts["methods"], facts["baseline"]) == (2, ["bm25", "tiny"], "bm25")
    assert "2 of 3 collections failed (small, missing): mend" in err.splitlines()[-1]
    assert "Traceback" not in err
    of = facts["collections"]
    assert [(one["split"], one["queries"]) for one in of.values()] == [("test", 10), ("dev", 2), ("", 0)]
    assert [line.split(":")[0] for line in of["small"]["errors"]] == ["tiny"]
    assert of["small"]["values"].keys() == {"bm25"}
    assert "no task has both a weight and examples" in of["small"]["errors"][0]
    assert of["missing"]["errors"] == [
        f"import: {tmp_path / 'missing'}: there is no such folder: check the path"
    ]
    assert facts["mean_of"] == [source.name]
    for name, one in [*of.items()][:2]:  # what `evaluate` says
        metrics = json.loads((work / name / "metrics.json").read_text())
        assert one["values"] == pytest.approx({key: m["nDCG@10"] for key, m in metrics.items()})
    assert of["small"]["values"]["bm25"] == pytest.approx((1 + 2 / (2 + 1 / 1.584962500721156)) / 2)

    # The same again, with that model for all: nothing is trained, indexed or searched twice.
    made_once = [path for path in work.glob("*/*/*") if path.suffix not in (".json", ".tsv")]
    made_once = [path for path in made_once if not path.name.startswith("qrels")]
    kept = {path: path.stat().st_mtime_ns for path in made_once}
    write(tmp_path / "missing", SMALL)
    model = shutil.copytree(Workspace(work / source.name).model("tiny"), tmp_path / "given")
    status, made, err, facts = sweep("bm25", str(model))
    assert status == 0, err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    of = facts["collections"]
    assert all(one["values"].keys() == {"bm25", "given"} and not one["errors"] for one in of.values())
    mean = sum(one["values"]["given"] for one in of.values()) / 3
    assert made["mean"]["given"] == facts["mean"]["given"] == pytest.approx(mean)
    assert (made["table"], made["report"]) == (str(work / "sweep.json"), str(work / "sweep.html"))
    assert f'<a href="{source.name}/report.html">' in (work / "sweep.html").read_text()
    assert (work / "sweep.md").read_text().count("\n| ") == 4


def test_a_dataset_of_ir_datasets_is_a_collection(registered: str, tmp_path: Path, cli):
    status, made, err = cli("sweep", registered, f"--WORK_DIR={tmp_path / 'work'}")
    assert status == 0, err
    assert (made["values"], made["mean"]) == ({"ir_datasets_tiny-sweep": {"bm25": 1.0}}, {"bm25": 1.0})


def test_a_collection_that_cannot_be_opened_is_a_row_that_says_so(tmp_path: Path, cli, monkeypatch):
    sources = [str(write(tmp_path / name, SMALL)) for name in ("bad", "good")]
    split_of = sweep_verb._split_of

    def broken(collection, split: str) -> str:
        if collection.folder.parent.name == "bad":
            raise OSError("the disk is gone")
        return split_of(collection, split)

    monkeypatch.setattr(sweep_verb, "_split_of", broken)
    work = tmp_path / "work"
    status, _, err = cli("sweep", *sources, f"--WORK_DIR={work}")
    assert status == 2
    assert "1 of 2 collections failed (bad)" in err.splitlines()[-1]
    of = json.loads((work / "sweep.json").read_text())["collections"]
    assert of["bad"]["errors"] == ["import: OSError: the disk is gone"]
    assert (of["good"]["errors"], of["good"]["values"].keys()) == ([], {"bm25"})


def test_names_that_are_others_too(tmp_path: Path, cli, monkeypatch):
    """A folder called as a kind, a collection called as the mean, one whose name an address cannot have."""
    test = {name.replace(".dev.", ".test."): text for name, text in SMALL.items()}
    names = ("mean", "a#b 50%")
    sources = [str(write(tmp_path / name, SMALL if name == "mean" else test)) for name in names]
    (tmp_path / "bm25").mkdir()
    monkeypatch.chdir(tmp_path)
    status, made, err = cli("sweep", *sources, f"--WORK_DIR={tmp_path / 'work'}")
    assert status == 0, err
    assert [*made["values"]] == [*names]
    page = (tmp_path / "work" / "sweep.html").read_text()
    links = re.findall('href="(.*?)"', page)
    assert len(links) == 2
    assert all((tmp_path / "work" / unquote(link)).is_file() for link in links)
    assert "The queries are dev of mean; test of " in page

    # A variation that is asked for stays one where another split is answered.
    assert cli("sweep", sources[0], "--SPLIT=test~typo", f"--WORK_DIR={tmp_path / 'work'}")[0] == 2
    (one,) = json.loads((tmp_path / "work" / "sweep.json").read_text())["collections"].values()
    assert one["split"] == "dev~typo"
    assert "dev~typo: nothing finished here: make it with `retrieval-jax vary`" in one["errors"][0]


def test_bad_settings_are_one_line_before_anything_is_made(tmp_path: Path, cli):
    first, second = (write(tmp_path / name / "small", SMALL) for name in "ab")
    (tmp_path / "bad.gin").write_text("train.stepz = 1\n")
    here = f"--WORK_DIR={tmp_path / 'work'}"
    for arguments, message in {
        (): "sweep.collections: none: retrieval-jax sweep path/to/one path/to/another",
        (first, second): f"{second}: another one lies in {tmp_path / 'work' / 'small'}, too: rename one",
        (first, "--gin.sweep.methods=('bm52',)"): "'bm52': neither bm25, nor a gin file",
        (first, "--gin.sweep.methods=('a/x.gin', 'b/x.gin')"): "two are called x: rename a file or a folder",
        (first, f"--gin.sweep.methods=('bm25', '{tmp_path}/bad.gin')"): "bad.gin:1: ",
        (first, "--SPLIT=test~all"): "sweep.split: test~all: several splits, for `search` alone: name one",
        (first, "--gin.sweep.measure='NumRet'"): "sweep.measure: NumRet is no mean of the queries' values",
        (first, "--gin.sweep.baseline='x'"): "sweep.baseline: no run 'x': there are bm25",
    }.items():
        status, _, err = cli("sweep", *map(str, arguments), here)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
    assert not (tmp_path / "work").exists()
