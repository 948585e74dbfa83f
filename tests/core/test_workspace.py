"""Where things lie: names, and sources of one name."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from reading import error_of

from retrieval_jax.checkpoints.checkpoints import Checkpoints
from retrieval_jax.checkpoints.weights import read_ocdbt
from retrieval_jax.core import paths, storage
from retrieval_jax.core.workspace import Workspace, source_path


def test_two_sources_of_one_name_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    work = Workspace.for_source("a/data", None)
    storage.build_once(work.collection, {}, lambda folder: {"source_path": source_path("a/data")})
    assert Workspace.for_source(f"{tmp_path}/a/data", None) == work
    message = error_of(lambda: Workspace.for_source("b/data", None))
    assert f"holds the collection of {tmp_path}/a/data, not of {tmp_path}/b/data" in message
    assert "--WORK_DIR=work/data_2" in message
    assert Workspace.for_source("b/data", "work/data") == work  # a name alone
    for folder in ("a/data", "b/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    assert Workspace.for_source("link/data", "work/data", imports=True) == work
    (tmp_path / "python_docs").mkdir()  # of a demo, in a folder called work
    assert Workspace.for_source("python_docs", "work/data") == work
    for source, imports in (("b/data", False), ("b/data", True), ("python_docs", True)):
        message = error_of(
            lambda source=source, imports=imports: Workspace.for_source(source, "work/data", imports)
        )
        assert f"holds the collection of {tmp_path}/a/data, not of {source_path(source)}: name" in message
    (tmp_path / "a/data").rename(tmp_path / "a/moved")
    assert Workspace.for_source("a/moved", "work/data", imports=True) == work


def test_the_embedded_collection_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever folder it was imported in; earlier versions noted a path below that one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for number, path in enumerate((source_path("python_docs"), "/elsewhere/python_docs")):
        work = Workspace(tmp_path / f"work_{number}")
        facts = {"source": "python_docs", "source_path": path}
        storage.build_once(work.collection, {}, lambda folder, facts=facts: facts)
        assert Workspace.for_source("python_docs", str(work.folder), imports=True) == work
        for imports in (False, True):
            refused = functools.partial(Workspace.for_source, "data", str(work.folder), imports)
            assert f"holds the collection of python_docs, not of {tmp_path}/data" in error_of(refused)


def test_a_source_that_has_changed_since_the_import_is_told_once(tmp_path: Path, capsys):
    source = tmp_path / "data"
    source.mkdir()
    files = [source / name for name in ("docs.tsv", "qrels.tsv", "gone.tsv")]
    for file in files:
        file.write_text("1\ta\n")
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    work = Workspace(tmp_path / "work")
    facts = {"source_path": source_path(str(source))}
    storage.build_once(work.collection, {"files": stats}, lambda folder: facts)
    Workspace.for_source(str(source), str(work.folder))
    files[1].write_text("1\tb\t1\n")
    files[2].unlink()  # of another machine
    Workspace.for_source(str(source), str(work.folder), imports=True)
    assert not capsys.readouterr().err
    for _ in range(2):
        Workspace.for_source(str(source), str(work.folder))
    told = capsys.readouterr().err
    assert told == f"{files[1]}: changed since the import: `retrieval-jax import` reads it again\n"


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "qrels", "a\n", "é", "a.unfinished"])
def test_a_name_that_is_no_files_name_is_refused(name: str):
    work = Workspace(Path("work"))
    named = (work.searcher, work.synthetic, work.negatives, work.model, work.docids, work.export)
    for place in (*named, lambda name: work.run(name, "test")):
        with pytest.raises(Exception, match="cannot be the name of an artefact"):
            place(name)


def test_a_name_may_have_dots():
    assert Workspace(Path("w")).run("bm25.v2", "test") == Path("w/runs/bm25.v2.test.trec")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Workspace.for_source("~/data", "~/w").folder == tmp_path / "w"
    assert paths.absolute("~/x") == tmp_path / "x"
    assert paths.as_path("~x") == Path("~x")


@pytest.mark.parametrize("name", ["a#b", "a%20b", "a|b", "a b", "~x", "é日本", "a]b"])
def test_checkpoints_below_odd_names_are_restored(tmp_path: Path, name: str):
    tree = {"w": jnp.arange(4.0)}
    saved = Checkpoints(tmp_path / name)
    saved.save(1, tree, tree)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    assert saved.restore_params(1, like)["w"].tolist() == [0, 1, 2, 3]
    saved.close()
    arrays = read_ocdbt(tmp_path / name / "checkpoints" / "1" / "params")
    assert arrays["w"].read().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["run[1]", "a\\b", "a*b", "a?b"])
def test_names_that_are_glob_patterns_are_refused_before_training(tmp_path: Path, name: str):
    assert "checkpoints cannot lie below a folder with" in error_of(lambda: Checkpoints(tmp_path / name))
