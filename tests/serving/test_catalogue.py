"""Searchers that are replaced while they are served."""

import json
import shutil

import pytest

from retrieval_jax.core import storage

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
