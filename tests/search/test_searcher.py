"""The registry of searchers: a kind from outside the package is indexed, searched, evaluated and reported."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from reading import python_of

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.search import searcher as registry
from retrieval_jax.search.searcher import Searcher, register_searcher, searcher_class, searcher_kinds

(EXAMPLE,) = python_of("retrieval_jax/search/README.md")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The gin file that imports the toy; its module lies outside the package."""
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    (tmp_path / "toy_searcher_module.py").write_text(EXAMPLE)
    (tmp_path / "toy.gin").write_text("import toy_searcher_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield f"--gin_file={tmp_path / 'toy.gin'}"
    sys.modules.pop("toy_searcher_module", None)  # each test imports, and so registers, it again


def test_a_kind_from_outside_is_indexed_searched_and_reported(
    toy: str, work: Workspace, collection: Collection, arguments, cli, tmp_path: Path
):
    folder = tmp_path / "work"
    shutil.copytree(work.collection, folder / "collection")
    here = [arguments[0], f"--gin.WORK_DIR='{folder}'"]
    status, made, err = cli("index", toy, *here, "--gin.make_index.kind='overlap'")
    assert status == 0, err
    assert made == {"searcher": str(folder / "searchers/overlap"), "kind": "overlap", "parameters": None}
    manifest = json.loads((folder / "searchers/overlap/manifest.json").read_text())
    assert manifest["words"] == sum(len(p.full_text.split()) for p in collection.passages())

    assert cli("search", toy, *here, "--gin.SEARCHER='overlap'", "--gin.K=10")[0] == 0
    run = [line.split() for line in (folder / "runs/overlap.test.trec").read_text().splitlines()]
    words = {passage.id: set(passage.full_text.split()) for passage in collection.passages()}
    for query in collection.queries("test"):
        overlaps = [len(found & set(query.text.split())) for found in words.values()]
        best = sorted(range(len(overlaps)), key=lambda row: -overlaps[row])[:10]
        ids = [passage for key, _, passage, *_ in run if key == query.id]
        assert ids == [list(words)[row] for row in best]

    status, made, err = cli("evaluate", *here)  # which needs not know the kind
    assert status == 0, err
    assert made["metrics"].keys() == {"overlap"}
    page = (folder / "report.html").read_text()
    assert "<tr><th>overlap</th><td>word overlap</td>" in page
    ((found,),) = Searcher.open(folder / "searchers/overlap").search(
        [" ".join(set().union(*words.values()))], 1
    )
    assert found[1] == max(map(len, words.values()))


def test_a_searcher_that_keeps_nothing_need_not_say_so(toy: str, work: Workspace, arguments, cli, tmp_path):
    module = tmp_path / "toy_searcher_module.py"
    code, count = re.subn(
        r"\n    def write\(.*?(?=\n\n)", "\n    def write(cls, folder, inputs): ...", EXAMPLE, flags=re.DOTALL
    )
    assert count == 1
    module.write_text(code)
    folder = tmp_path / "work"
    shutil.copytree(work.collection, folder / "collection")
    here = [arguments[0], f"--gin.WORK_DIR='{folder}'", "--gin.make_index.kind='overlap'"]
    status, made, err = cli("index", toy, *here)
    assert status == 0, err
    assert made["kind"] == "overlap"


def test_an_unregistered_kind_is_named(
    toy: str, work: Workspace, arguments, cli, tmp_path: Path, monkeypatch
):
    folder = tmp_path / "work"
    shutil.copytree(work.collection, folder / "collection")
    here = [arguments[0], f"--gin.WORK_DIR='{folder}'"]
    status, _, err = cli("index", *here, "--gin.make_index.kind='overlaps'")
    assert status == 2
    assert (
        "make_index.kind: no kind of searcher 'overlaps': choose one of generative, scann, exact, bm25" in err
    )
    assert cli("index", toy, *here, "--gin.make_index.kind='overlap'")[0] == 0
    monkeypatch.setattr(registry, "_CLASSES", {})
    with pytest.raises(
        UserError, match=r"searchers/overlap: no kind of searcher 'overlap': .*import the module"
    ):
        Searcher.open(folder / "searchers/overlap")


def test_a_kind_needs_a_name_of_its_own_and_all_methods():
    assert searcher_kinds()[:4] == ["generative", "scann", "exact", "bm25"]
    with pytest.raises(TypeError, match="Half: a searcher needs family, write, open"):

        @register_searcher
        class Half(Searcher):
            kind = "half"

            def search(self, queries, k):
                return []

    bm25 = searcher_class("bm25")
    assert register_searcher(bm25) is bm25
    with pytest.raises(ValueError, match=r"BM25Searcher is the searcher 'bm25'"):
        register_searcher(type("Other", (bm25,), {}))


@pytest.mark.parametrize(
    ("kind", "unwanted"),
    [
        ("bm25", ("tensorflow", "scann", "flax", "retrieval_jax.search.dense")),
        ("exact", ("tensorflow", "scann", "bm25s")),
        ("generative", ("tensorflow", "scann", "bm25s", "retrieval_jax.search.dense")),
        ("fused", ("tensorflow", "scann", "bm25s", "retrieval_jax.search.dense")),
    ],
)
def test_only_the_kinds_own_libraries_are_imported(kind: str, unwanted: tuple[str, ...], python):
    script = (
        "import sys\nfrom retrieval_jax.search.searcher import searcher_class\n"
        "searcher_class(sys.argv[1])\nprint(sorted(set(sys.argv[2:]) & sys.modules.keys()))"
    )
    result = python(script, kind, *unwanted)
    assert result.stdout == "[]\n", result.stderr
