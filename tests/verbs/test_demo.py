"""`demo` without a model to train; with models, it is tested in tests/test_main.py."""

from pathlib import Path

from retrieval_jax.core.workspace import Workspace


def test_without_models_it_measures_bm25_alone(source: Path, tmp_path: Path, cli):
    settings = {"COLLECTION": str(source), "WORK_DIR": str(tmp_path / "work")}
    settings |= {"demo.generative": (), "demo.dense": (), "import_collection.vocab_size": 1000}
    argv = ["demo", *(f"--gin.{name}={value!r}" for name, value in settings.items())]
    status, result, err = cli(*argv)
    assert status == 0, err
    assert [line[:3] for line in err.splitlines() if line[1:3] == "/5"] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert result["models"] == {}
    assert list(result["metrics"]) == ["bm25"]
    assert result["metrics"]["bm25"]["Hits@10"] > 0.5
    work = Workspace(tmp_path / "work")
    assert not (work.folder / "models").exists()
    made = work.collection.stat().st_mtime_ns, work.searcher("bm25").stat().st_mtime_ns
    assert cli(*argv)[1]["metrics"] == result["metrics"]
    assert made == (work.collection.stat().st_mtime_ns, work.searcher("bm25").stat().st_mtime_ns)
