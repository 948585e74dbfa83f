"""`demo` without a model to train; with models, it is tested in tests/test_main.py."""

import json
import shlex
import shutil
from pathlib import Path

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.verbs.demo import next_command


def test_without_models_it_measures_bm25_alone(source: Path, tmp_path: Path, cli):
    settings = {"COLLECTION": str(source), "WORK_DIR": str(tmp_path / "work")}
    settings |= {
        "demo.generative": (),
        "demo.dense": (),
        "demo.planned": False,
        "import_collection.vocab_size": 1000,
    }
    argv = ["demo", *(f"--gin.{name}={value!r}" for name, value in settings.items())]
    status, result, err = cli(*argv)
    assert status == 0, err
    assert [line[:3] for line in err.splitlines() if line[1:3] == "/5"] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert "the trainings take" not in err
    assert result["models"] == {}
    assert list(result["metrics"]) == ["bm25"]
    command, where = result["next"].split("   # ")
    assert shlex.split(command) == ["retrieval-jax", "serve", str(source), f"--WORK_DIR={tmp_path / 'work'}"]
    assert where == "then open http://127.0.0.1:8000/"
    assert result["metrics"]["bm25"]["Hits@10"] > 0.5
    work = Workspace(tmp_path / "work")
    assert not (work.folder / "models").exists()
    made = work.collection.stat().st_mtime_ns, work.searcher("bm25").stat().st_mtime_ns
    assert cli(*argv)[1]["metrics"] == result["metrics"]
    assert made == (work.collection.stat().st_mtime_ns, work.searcher("bm25").stat().st_mtime_ns)


def test_without_train_queries_models_learn_from_the_passages(source: Path, tmp_path: Path, arguments, cli):
    folder, work = tmp_path / "unlabelled", tmp_path / "work"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.train.tsv"))
    small = [argument for argument in arguments[2:] if "STEPS" not in argument]
    argv = [
        "demo",
        *(f"--gin.COLLECTION={str(folder)!r}", f"--gin.WORK_DIR={str(work)!r}", *small),
        *("--gin.demo.generative=('atomic',)", "--gin.demo.dense=('exact',)", "--gin.demo.fused=()"),
        "--gin.train.steps_factor=2.0",
    ]
    status, result, err = cli(*argv)
    assert status == 0, err
    assert "labelled: no examples, so left out of the mixture" in err  # of atomic docids
    assert "no train queries: the collection makes its own: sentence 0.4, daq 0.4, title 0.2" in err
    lines = err.splitlines()
    (told,) = [number for number, line in enumerate(lines) if "the trainings take about" in line]
    assert "dual_encoder " in lines[told]
    assert "(100 steps)" in lines[told]  # 2·√100 are fewer than the least
    assert "planned_query " in lines[told]
    assert "(40 steps)" in lines[told]
    assert told < lines.index(next(line for line in lines if "100 steps of 32 examples" in line))
    for name, model in result["models"].items():
        assert model["step"] == {"planned_query": 40, "planned_0": 0}.get(name, 100)
        assert "cut" not in model
    assert result["models"]["atomic"]["left_chance"]
    assert result["metrics"]["atomic"]["Hits@10"] > 0.3
    assert result["metrics"]["exact"]["Hits@10"] > 0.3
    assert result["metrics"]["planned"]["Hits@10"] > 0.3
    columns = json.loads((work / "models/atomic/settings.json").read_text())
    assert columns["train.docids_from_passages"] is True

    status, longer, err = cli(*argv, "--STEPS=102", "--gin.train.keep_best=None")
    assert status == 0, err
    assert longer["models"]["dual_encoder"]["step"] == 102
    averaged = json.loads((work / "models/planned_0/began_with.json").read_text())
    assert averaged.keys() == {"dual_encoder", "planned_query", "docids"}
    assert longer["metrics"]["planned"] != result["metrics"]["planned"]  # an average of the new weights

    status, result, err = cli(*argv, "--gin.train.max_minutes=0", "--STEPS=103")
    assert status == 0, err
    note = "†: cut by the clock (train.max_minutes): exact at step 102 of 103, atomic at step 102 of 103"
    assert note in " ".join(err.split())
    page = (work / "report.html").read_text()
    assert note in page
    assert "planned at dual_encoder at step 102 of 103, planned_query at step 102 of 103" in page
    for name in ("exact", "atomic", "planned"):
        assert f"{name}† " in err
        assert f"<th>{name}†</th>" in page
    assert "<th>bm25</th>" in page


def test_the_command_that_opens_the_page_names_what_is_not_the_default():
    command = next_command("python_docs", None)
    assert command == "retrieval-jax serve   # then open http://127.0.0.1:8000/"
    command = next_command("my docs", "work/it")
    assert command.startswith("retrieval-jax serve 'my docs' --WORK_DIR=work/it   #")
