"""Searchers that are replaced while they are served."""

import json
import shutil

import pytest

from retrieval_jax.core import paths, storage
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.serving import catalogue as catalogue_module
from retrieval_jax.serving.batching import BatchSettings
from retrieval_jax.serving.catalogue import Catalogue
from retrieval_jax.serving.errors import Overloaded
from retrieval_jax.serving.settings import ServeSettings
from retrieval_jax.verbs.export import export
from retrieval_jax.verbs.importing import import_collection
from retrieval_jax.verbs.index import make_index

pytestmark = pytest.mark.anyio


def touched(folder, **facts: object) -> None:
    """Gives a searcher another manifest, as `index` does."""
    path = folder / storage.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


async def test_what_has_changed_is_opened_again_and_what_cannot_be_opened_stays(
    client_of, catalogue_of, served_work, tmp_path
):
    folder = shutil.copytree(served_work.searcher("bm25"), tmp_path / "bm25")
    catalogue = catalogue_of(folders={"mine": folder, "bm25": served_work.searcher("bm25")})
    async with client_of(catalogue) as client:
        asked = {"params": {"query": "a table"}}
        first = (await client.get("/v1/mine/search", **asked)).json()["candidates"]
        assert await catalogue.open_changed() == {}
        old = catalogue.get("mine")
        touched(folder, note=1)
        assert await catalogue.open_changed() == {"mine": None}
        assert catalogue.get("mine") is not old
        assert (await client.get("/v1/mine/search", **asked)).json()["candidates"] == first
        touched(folder, language="nothing")
        touched(folder, kind="nothing")
        (failure,) = (await catalogue.open_changed()).values()
        assert "no kind of searcher 'nothing'" in failure
        assert (await client.get("/v1/mine/search", **asked)).json()["candidates"] == first
        assert (await client.get("/ready")).status_code == 200


async def test_judged_queries_that_have_changed_are_shown(client_of, catalogue_of, tmp_path):
    """The searcher, which reads none, is the same; so are its answers."""
    source, work = tmp_path / "letters", tmp_path / "work"
    source.mkdir()
    (source / "docs.tsv").write_text("".join(f"d{n}\t\tabout number {n}\n" for n in range(30)))
    (source / "qrels.test.tsv").write_text("q1\td1\t1\n")

    def import_with(text: str) -> None:
        (source / "queries.test.tsv").write_text(f"q1\t{text}\n")
        import_collection(str(source), work_dir=str(work), vocab_size=100)

    async def shown(client) -> list[str]:
        return [query["text"] for query in (await client.get("/v1/queries")).json()["queries"]]

    import_with("one?")
    make_index(source=str(source), work_dir=str(work), kind="bm25")
    quick = ServeSettings(BatchSettings(sizes=(1,)), max_hits=10)  # few shapes
    catalogue = Catalogue({"bm25": work / "searchers/bm25"}, work / "collection", quick)
    async with client_of(catalogue) as client:
        assert await shown(client) == ["one?"]
        import_with("which is the first?")
        assert await catalogue.open_changed() == {}
        assert await shown(client) == ["which is the first?"]
        found = (await client.get("/v1/bm25/search", params={"query": "number 7"})).json()["candidates"]
    assert (found[0]["docid"], found[0]["doc"]["text"]) == ("d7", "about number 7")


@pytest.mark.parametrize("name", ["naive", "exact"])
async def test_an_exported_searcher_with_a_model_is_served(
    name, served_work, searchers, client_of, catalogue_of, tmp_path
):
    export("unused", work_dir=str(served_work.folder), name=name, output=str(tmp_path / "exported"))
    async with client_of(catalogue_of(folders={name: tmp_path / "exported"})) as client:
        body = (await client.get(f"/v1/{name}/search", params={"query": "a table"})).json()
    wanted = searchers[name].search(["a table"], 10)[0]
    assert [one["docid"] for one in body["candidates"]] == [passage for passage, _ in wanted]


async def test_whatever_goes_wrong_while_the_first_is_opened_is_said_and_no_other_is_opened(
    catalogue_of, served_work, tmp_path, monkeypatch, capsys
):
    folders = {
        name: shutil.copytree(served_work.searcher("bm25"), tmp_path / name) for name in ("first", "second")
    }
    catalogue = catalogue_of(folders=folders)
    opened = Searcher.open

    def out_of_memory(folder, make_partitioner=None):
        if folder.name == "first":
            raise MemoryError("no memory left\nfor 3 GB")
        return opened(folder, make_partitioner)

    monkeypatch.setattr(Searcher, "open", out_of_memory)
    await catalogue.open_first()
    assert catalogue.failure == "first: MemoryError: no memory left"
    assert catalogue.missing == ["first", "second"]
    assert "out_of_memory" in capsys.readouterr().err  # the traceback
    failed = {"first": "first: MemoryError: no memory left", "second": None}
    assert await catalogue.open_changed() == failed  # a reload goes on with the others
    monkeypatch.undo()
    assert await catalogue.open_changed() == {"first": None}
    assert catalogue.ready
    await catalogue.close()


@pytest.mark.parametrize("stale", [False, True])
async def test_what_cannot_be_opened_is_found_before_the_others_are_opened(
    stale, catalogue_of, served_work, tmp_path, monkeypatch
):
    """A kind that nothing registers, and a model that was trained again."""
    folder = shutil.copytree(served_work.searcher("naive"), tmp_path / "last")
    manifest = storage.read_manifest(folder, "index")
    touched(folder, model=str(paths.join(served_work.searcher("naive"), manifest["model"])))
    if stale:
        touched(folder, recipe=manifest["recipe"] | {"checksum": "that of another training"})
    else:
        touched(folder, kind="nothing")
    opened = []
    monkeypatch.setattr(Searcher, "open", lambda folder, make_partitioner=None: opened.append(folder))
    catalogue = catalogue_of(folders={"bm25": served_work.searcher("bm25"), "last": folder})
    await catalogue.open_first()
    assert opened == []
    expected = "not the model (of step 7) that" if stale else f"{folder}: no kind of searcher 'nothing'"
    assert expected in catalogue.failure
    assert "\n" not in catalogue.failure


async def test_at_the_end_no_further_searcher_is_opened(catalogue_of, served_work):
    folder = served_work.searcher("bm25")
    catalogue = catalogue_of(folders={"first": folder, "second": folder})
    catalogue.closing = True
    assert await catalogue.open_changed() == {}
    assert catalogue.all() == []


async def test_the_passages_that_are_under_way_have_a_bound(client_of, catalogue_of, monkeypatch):
    monkeypatch.setattr(catalogue_module, "MAX_UNDER_WAY", 100)
    catalogue = catalogue_of("bm25")
    async with client_of(catalogue) as client:
        served = catalogue.get("bm25")
        with served.under_way(1000):  # alone, a request may ask for more
            with pytest.raises(Overloaded, match="1,000 passages are being looked for already, of 100"):
                served.under_way(1).__enter__()
            response = await client.get("/v1/bm25/search?query=x")
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert served.passages == 0
        assert (await client.get("/v1/bm25/search?query=x")).status_code == 200
        assert served.passages == 0
