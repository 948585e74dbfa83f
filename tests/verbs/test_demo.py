"""`demo` without a model to train; with models, it is tested in tests/test_main.py."""

import shlex
from pathlib import Path

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.verbs.demo import next_command


def test_without_models_it_measures_bm25_alone(source: Path, tmp_path: Path, cli):
    settings = {"COLLECTION": str(source), "WORK_DIR": str(tmp_path / "work")}
    settings |= {"demo.generative": (), "demo.dense": (), "import_collection.vocab_size": 1000}
    argv = ["demo", *(f"--gin.{name}={value!r}" for name, value in settings.items())]
    status, result, err = cli(*argv)
    assert status == 0, err
    assert [line[:3] for line in err.splitlines() if line[1:3] == "/5"] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
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


def test_the_command_that_opens_the_page_names_what_is_not_the_default():
    command = next_command("python_docs", None)
    assert command == "retrieval-jax serve   # then open http://127.0.0.1:8000/"
    command = next_command("my docs", "work/it")
    assert command.startswith("retrieval-jax serve 'my docs' --WORK_DIR=work/it   #")
