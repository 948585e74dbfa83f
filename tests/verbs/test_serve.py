"""The verb `serve`: which searchers it serves, and what it refuses before it listens."""

import shutil

import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.verbs.serve import served_folders


def test_all_finished_searchers_or_those_that_are_named(work, arguments, cli, tmp_path):
    assert cli("index", *arguments)[0] == 0
    (work.folder / "searchers" / "unfinished").mkdir(exist_ok=True)
    folder = work.searcher("bm25")
    assert served_folders(work, None, ())["bm25"] == folder
    assert "unfinished" not in served_folders(work, None, ())
    exported = shutil.copytree(folder, tmp_path / "exported")
    assert served_folders(work, ["bm25"], [str(exported)]) == {"bm25": folder, "exported": exported}
    with pytest.raises(UserError, match="another searcher is called exported"):
        served_folders(work, [], [str(exported), str(exported)])
    with pytest.raises(UserError, match="nothing finished here"):
        served_folders(work, ["unfinished"], ())
    with pytest.raises(UserError, match="no searcher to serve"):
        served_folders(work, (), ())


def test_what_it_refuses_in_one_line(arguments, cli):
    for setting, error in (
        ("batch_sizes=(8, 1)", "serve.batch_sizes: they must ascend"),
        ("batch_sizes=()", "serve.batch_sizes: they must ascend"),
        ("searchers=('nothing',)", "nothing finished here"),
        ("port=70000", "serve.port"),
        ("max_waiting=31", "serve.max_queries: 32 queries of a request never find room where 31 may wait"),
        ("max_payload_mb=65", "serve.max_payload_mb: 65 MB are more than the 64 MB"),
    ):
        status, _, err = cli("serve", *arguments, f"--gin.serve.{setting}")
        assert status == 2
        assert error in err
