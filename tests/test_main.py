"""The command line, end to end on a small real collection, as a person would use it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval_jax.core import configuration
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.main import VERBS, disk_error, main, parse, plain
from retrieval_jax.verbs.table import EXAMPLES

METHODS = {
    "atomic",
    "naive",
    "semantic",
    "exact",
    "scann",
    "bm25",
    "fused",
    "planned",
    "unplanned",
    "lexical",
}
TRAINED = ["--gin.SPLIT='train'", "--gin.demo.generative=('atomic', 'naive', 'semantic')"]


@pytest.fixture(scope="module")
def demo(arguments: list[str], work: Workspace) -> Workspace:
    """The main job, done once for this module."""
    assert main(["demo", *arguments, *TRAINED]) == 0
    return work


def test_demo_makes_everything_and_learns(demo: Workspace):
    metrics = json.loads(demo.metrics.read_text())
    assert set(metrics) == METHODS
    for name in METHODS:
        assert len(demo.run(name, "train").read_text().splitlines()) > 0
        assert metrics[name]["Hits@1"] <= metrics[name]["Hits@10"]
    # Queries that were trained on, among 100 passages: chance is .01 and .10.
    for name in METHODS - {"scann", "bm25"}:
        assert metrics[name]["Hits@1"] > 0.5, name
    assert metrics["exact"] == pytest.approx(metrics["scann"], abs=0.02)
    for model in ("atomic", "naive", "semantic", "dual_encoder", "planned_query"):
        folder = demo.model(model)
        assert list(folder.glob("events.out.tfevents.*"))
        points = [json.loads(line) for line in (folder / "learning_curve.jsonl").read_text().splitlines()]
        assert points[-1]["step"] == 60
        assert any("dev/Hits@10" in point for point in points)
    page = demo.report.read_text()
    assert "small_docs" in page
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["']?http""", page)  # a single file


def test_where_scann_is_not_installed_exact_search_takes_its_place(
    demo: Workspace, arguments: list[str], cli, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "scann", None)  # as if it could not be found
    assert cli("demo", *arguments, *TRAINED)[0] == 0
    index = [
        "index",
        *arguments,
        f"--MODEL_DIR={demo.model('dual_encoder')}",
        "--gin.make_index.name='default'",
    ]
    status, made, told = cli(*index)
    assert (status, made["kind"]) == (0, "exact")
    assert "scann: not installed: the searcher is of the kind exact" in told
    asked = [
        [*index, "--gin.make_index.kind='scann'"],
        ["search", *arguments, "--SEARCHER=scann", "--QUERY=a table"],
        ["demo", *arguments, "--gin.demo.dense=('scann',)"],
    ]
    for command in asked:
        status, _, told = cli(*command)
        assert status == 2
        assert told.splitlines()[-1].startswith(
            "retrieval-jax: scann: not installed (it exists for Linux only): "
        )


def test_demo_again_makes_nothing_again(demo: Workspace, arguments: list[str], cli):
    def made() -> dict[Path, int]:
        kept = [
            demo.collection,
            demo.docids("naive"),
            demo.model("naive") / "checkpoints",
            demo.searcher("exact"),
        ]
        return {p: p.stat().st_mtime_ns for p in [*kept, demo.run("naive", "train")]}

    before = made()
    status, result, _ = cli("demo", *arguments, *TRAINED)
    assert status == 0
    assert made() == before
    assert result["metrics"] == json.loads(demo.metrics.read_text())
    assert result["models"]["naive"]["step"] == 60


def test_the_demo_sums_as_on_two_processors():
    """Before anything that sums is imported; NPROC may say otherwise."""
    script = (
        "import os, sys; from retrieval_jax import main as m\n"
        "m.run = lambda *_: print(*(os.environ[x] for x in ('NPROC', 'OPENBLAS_NUM_THREADS')),"
        " {'numpy', 'jax'} & {*sys.modules})\n"
        "m.main(['demo'])"
    )
    others = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    for given, said in (({}, "2 2 set()"), ({"NPROC": "8"}, "8 8 set()")):
        env = {name: value for name, value in others.items() if name != "NPROC"} | given
        done = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
        assert done.stdout.split("\n")[0] == said


def test_each_verb_alone_tells_what_it_made(demo: Workspace, arguments: list[str], cli):
    model = f"--gin.MODEL_DIR='{demo.model('atomic')}'"
    # The network of runs/demo.gin, whose model is there.
    atomic = ["--gin_file=gin_configs/runs/atomic.gin", "--gin.T5Config.num_encoder_layers=0"]
    for verb, extra, keys in (
        ("import", [], {"collection", "name", "passages", "queries"}),
        ("docids", ["--gin.DOCIDS='atomic'"], {"docids", "kind", "passages", "length"}),
        ("train", [*atomic, model], {"model", "step", "minutes"}),
        ("index", [model], {"searcher", "kind", "parameters"}),
        ("search", ["--gin.SEARCHER='atomic'"], {"run", "queries", "queries_per_second", "single_query_ms"}),
        ("evaluate", [], {"report", "metrics_file", "significance_file", "metrics"}),
    ):
        status, result, err = cli(verb, *arguments, *extra)
        assert status == 0, (verb, err)
        assert keys <= set(result), verb


def test_a_question_is_answered_with_passages(demo: Workspace, arguments: list[str], cli):
    question = "--gin.QUERY='Adam optimizer with weight decay'"
    status, result, _ = cli("search", *arguments, "--gin.SEARCHER='bm25'", question, "--gin.K=3")
    assert status == 0
    assert [p["rank"] for p in result["passages"]] == [1, 2, 3]
    assert all(p["text"] for p in result["passages"])


@pytest.mark.parametrize("searcher", sorted(METHODS))
def test_searching_does_not_import_tensorflow(demo: Workspace, arguments: list[str], searcher: str):
    """In a new process: what a person waits for when searching a model that exists."""
    argv = ["search", *arguments, f"--gin.SEARCHER='{searcher}'", "--gin.QUERY='a progress bar'"]
    script = (
        "import sys; from retrieval_jax.main import main; "
        f"status = main({argv!r}); assert 'tensorflow' not in sys.modules; sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "rank: 1" in result.stdout


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from retrieval_jax.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'gin', 'tensorflow', 'rich', 'seqio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "train.batch_size = 128" in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_the_command_line_takes(verb: str):
    for line in EXAMPLES[verb]:
        program, *argv = shlex.split(line, comments=True)
        named, files, bindings, _ = parse(argv)
        assert (program, named) == ("retrieval-jax", verb)
        assert all((configuration.gin_folder() / file).is_file() for file in files)
        names = {binding.split("=")[0] for binding in bindings}
        assert {name for name in names if name.isupper()} <= {*configuration.macros(), "COLLECTION"}


def test_arguments():
    verb, files, bindings, as_json = parse(
        ["train", "--gin_file=a.gin", "--gin.X='y'", "--json", "--gin.f.z=1"]
    )
    assert (verb, files, bindings, as_json) == ("train", ["a.gin"], ["X='y'", "f.z=1"], True)
    bare = ["demo", "a/b c", "--K=3", "--QUERY=why = how?", "--gin.train.steps=4"]
    assert parse(bare)[2] == ["K=3", "QUERY=why = how?", "train.steps=4", "COLLECTION=a/b c"]
    verbs = (
        "demo import docids cache preflight train convert generate-queries mine score index search evaluate"
    )
    assert set(VERBS) == {*verbs.split(), "vary", "sets", "ripor", "pag", "sweep", "export", "serve"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["import", "--gin.COLLECTION='/no/such/folder'"], ["/no/such/folder", "check the path"]),
        (["import", "--gin.COLECTION='x'"], ["COLECTION", "COLLECTION?"]),
        (["import", "--gin.import_collection.source=path"], ["import_collection.source", "quotes"]),
        (["import", "--COLLECTION=/no/such folder"], ["/no/such folder", "check the path"]),
        (["import", "/no/such/folder"], ["/no/such/folder", "check the path"]),
        (["import", "--COLECTION=x"], ["COLECTION", "COLLECTION?"]),
        (["import", "--gin.import_collection.vocab=3"], ["vocab", "--help"]),
        (["import", "--gin.imprt.vocab=3"], ["imprt", "--help"]),
        (["train", "--gin_file=runs/nothing.gin"], ["runs/nothing.gin", "runs/naive.gin"]),
        (["import", "--gin.VOCABULARY='/no/vocabulary'"], ["/no/vocabulary", "VOCABULARY"]),
        (["docids", "--gin.WORK_DIR='/no/such/work'"], ["/no/such/work/collection", "retrieval-jax import"]),
        (["docids", "--gin.DOCIDS='magic'"], ["magic", "atomic, naive"]),
        (
            ["docids", "--gin.DOCIDS='semantic'", "--gin.EMBEDDINGS='/no/v.npy'"],
            ["/no/v.npy", "name one of these"],
        ),
        (["train", "--gin.DOCIDS=None"], ["docids", "DOCIDS"]),
        (
            ["train", "--gin.MODEL_DIR='new_model'", "--gin.DataConfig.token_dropout={'labelled_humn': 0.1}"],
            ["labelled_humn: no train query is labelled 'humn'"],
        ),
        (
            [
                "train",
                "--gin.MODEL_DIR='new_model'",
                "--gin.DataConfig.mixture={'daq': 1, 'labelled_llm': 1}",
            ],
            ["labelled_llm: no train query is labelled 'llm'"],
        ),
        (["train", "--gin.nave/train.steps=3"], ["nothing enters the scope 'nave'", "naive"]),
        (["index", "--gin.MODEL_DIR='/no/model'"], ["/no/model/model.json", "retrieval-jax train"]),
        (["search", "--gin.SEARCHER='nobody'"], ["searchers/nobody", "retrieval-jax index"]),
        (["search", "--gin.SPLIT='exam'"], ["exam", "dev, test, train"]),
        (["evaluate", "--gin.SPLIT='exam'"], ["exam", "retrieval-jax search"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(demo: Workspace, arguments: list[str], cli, argv, words):
    before = sorted(demo.folder.rglob("*"))
    given = {a.split("=")[0] for a in argv}
    status, result, err = cli(argv[0], *(a for a in arguments if a.split("=")[0] not in given), *argv[1:])
    assert (status, result) == (2, None)
    lines = [line for line in err.splitlines() if line.startswith("retrieval-jax:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0]
    assert sorted(demo.folder.rglob("*")) == before  # nothing half-written
    assert not Path("new_model").exists()


def test_a_scope_of_demo_is_told_where_nothing_enters_it(demo: Workspace, arguments: list[str], cli):
    scoped = ["--gin.naive/train.steps=3", "--gin.train.batch_size=32"]
    status, _, err = cli("evaluate", *arguments, "--SPLIT=train", *scoped)
    assert status == 0
    assert "naive/train.steps: without effect here: only `demo`, `ripor` and `pag` enter scopes" in err
    assert "train.batch_size" not in err


def test_a_broken_source_leaves_nothing_behind(tmp_path: Path, source: Path, cli):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    with (broken / "qrels.train.tsv").open("a") as qrels:
        qrels.write("q\tno.such.passage\t1\n")
    status, _, err = cli("import", f"--gin.COLLECTION='{broken}'", f"--gin.WORK_DIR='{tmp_path / 'work'}'")
    assert status == 2
    assert "qrels.train.tsv:81" in err
    assert not list((tmp_path / "work").iterdir())


def test_another_collections_model_is_refused(demo: Workspace, tmp_path: Path, source: Path, arguments, cli):
    other = tmp_path / "other"
    other.mkdir()
    for file in source.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    with (other / "docs.tsv").open("a") as docs:
        docs.write("one.more\ttitle\ttext\n")
    rest = [a for a in arguments if "COLLECTION" not in a and "WORK_DIR" not in a]
    here = [f"--gin.COLLECTION='{other}'", f"--gin.WORK_DIR='{tmp_path / 'work'}'", *rest]
    assert cli("import", *here)[0] == 0
    status, _, err = cli("index", *here, f"--gin.MODEL_DIR='{demo.model('atomic')}'")
    assert status == 2
    assert "another collection" in err
    assert str(demo.model("atomic")) in err


def test_passages_that_came_later_are_found_by_the_model_of_before(
    demo: Workspace, tmp_path, source, arguments, cli
):
    grown = tmp_path / "grown"
    grown.mkdir()
    for file in source.iterdir():
        (grown / file.name).write_bytes(file.read_bytes())
    lines = (grown / "docs.tsv").read_text().splitlines(keepends=True)
    gone = lines.pop(0).split("\t")[0]
    new = "one.more\tprogress\tA progress bar that shows how long a task still takes.\n"
    (grown / "docs.tsv").write_text("".join([new, *lines]))
    for file in grown.glob("qrels.*.tsv"):
        kept = [line for line in file.read_text().splitlines(keepends=True) if f"\t{gone}\t" not in line]
        file.write_text("".join(kept))
    rest = [a for a in arguments if "COLLECTION" not in a and "WORK_DIR" not in a]
    here = [f"--gin.COLLECTION='{grown}'", f"--gin.WORK_DIR='{tmp_path / 'work'}'", *rest]
    model = f"--gin.MODEL_DIR='{demo.model('semantic')}'"
    assert cli("import", *here)[0] == 0
    kind = ["--gin.DOCIDS='semantic'", f"--gin.EMBEDDINGS='{demo.model('dual_encoder')}'"]
    assert cli("docids", *here, *kind)[0] == 0  # new ones for all: not what the model learned
    assert cli("index", *here, model)[0] == 2
    status, made, _ = cli("docids", *here, *kind, f"--gin.EXTENDS='{demo.docids('semantic')}'")
    assert status == 0
    assert made["extension"] == {"kept": len(lines), "added": 1, "removed": 1}
    assert cli("index", *here, model, "--gin.make_index.beams=200")[0] == 0
    query = ["--gin.SEARCHER='semantic'", "--gin.QUERY='a progress bar'", "--gin.K=200"]
    status, found, _ = cli("search", *here, *query)
    assert status == 0
    passages = [passage["id"] for passage in found["passages"]]
    assert len(passages) == len(set(passages)) == len(lines) + 1
    assert "one.more" in passages
    assert gone not in passages


def test_docids_changed_after_the_index_are_refused(demo: Workspace, arguments: list[str], cli):
    other = ["--gin.DOCIDS='semantic'", "--gin.semantic.leaf_size=7"]
    query = ["--gin.SEARCHER='semantic'", "--gin.QUERY='a progress bar'"]
    assert cli("docids", *arguments, *other)[0] == 0
    status, _, err = cli("search", *arguments, *query)
    assert status == 2
    assert "not the docids that" in err
    assert "`retrieval-jax index`" in err
    assert cli("docids", *arguments, "--gin.DOCIDS='semantic'")[0] == 0  # as they were
    assert cli("search", *arguments, *query)[0] == 0


def test_fewer_passages_than_asked_for_are_told(demo: Workspace, arguments: list[str], cli):
    """Ten beams (see `arguments`) find ten passages."""
    status, made, err = cli("search", *arguments, "--gin.SEARCHER='naive'", "--gin.SPLIT='dev'", "--gin.K=20")
    assert status == 0
    assert made["fewer_than_k"] == made["queries"] == 10
    assert "naive: fewer than 20 passages for 10 of 10 queries" in err


def test_an_approximate_search_tells_its_recall(demo: Workspace, arguments: list[str], cli):
    name = "--gin.make_index.name='approximate'"
    model = f"--gin.MODEL_DIR='{demo.model('atomic')}'"
    assert cli("index", *arguments, model, name, "--gin.make_index.recall_target=0.9")[0] == 0
    status, made, _ = cli(
        "search", *arguments, "--gin.SEARCHER='approximate'", "--gin.SPLIT='dev'", "--gin.K=9"
    )
    assert status == 0
    assert made["recall"] == 1.0  # on a processor it is exact


def test_a_full_disk_is_one_line_whoever_tells_it(monkeypatch: pytest.MonkeyPatch, capsys):
    def fills(*_: object) -> None:
        try:
            Path("/dev/full").write_bytes(b"x")  # the kernel's own ENOSPC
        except OSError as error:
            raise ValueError("a library's words") from error

    monkeypatch.setattr("retrieval_jax.main.run", fills)
    assert main(["import"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "cannot be used (No space left on device): free some space" in told


def test_a_read_only_file_is_named_and_other_errors_are_not_of_the_disk():
    line = disk_error(OSError(30, "Read-only file system", "/a/b"))
    assert line.startswith("/a/b: cannot be used (Read-only file system): check its permissions")
    assert "free some space" in disk_error(RuntimeError("RESOURCE_EXHAUSTED: No space left on device"))
    assert disk_error(ValueError("shape")) is None
    assert disk_error(FileNotFoundError(2, "No such file", "x")) is None


def test_plain_shows_a_list_of_texts_in_a_line_and_of_records_as_paragraphs():
    assert plain({"slow": ["a", "b"], "fits": True}) == "slow: a; b\nfits: True"
    assert plain({"passages": [{"id": "x", "score": 0.5}]}) == "\nid: x\nscore: 0.500"
