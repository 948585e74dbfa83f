"""Searchers that others have registered: the server asks of them no more than `Searcher` does."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from retrieval_jax.core import storage
from retrieval_jax.search import searcher as registry
from retrieval_jax.search.searcher import Searcher, register_searcher

pytestmark = pytest.mark.anyio


class Other(Searcher):
    """Finds the same passages for every query, and explains in its own form."""

    kind = family = "other"

    def search(self, queries, k):
        scores = -np.arange(k, dtype=np.float32) / 8
        return [[(f"p{row}", score) for row, score in enumerate(scores)] for _ in queries]

    def explain(self, query, ranked_list):
        return {"why": query, "of": len(ranked_list)}

    @classmethod
    def write(cls, folder, inputs):
        raise NotImplementedError

    @classmethod
    def open(cls, folder, make_partitioner=None):
        return cls()


class Slow(Other):
    """Searches until it is let go."""

    kind = family = "slow"

    def __init__(self):
        self.begun, self.let_go = threading.Event(), threading.Event()
        self.let_go.set()  # it is warmed first

    def search(self, queries, k):
        self.begun.set()
        assert self.let_go.wait(60)
        return super().search(queries, k)


@pytest.fixture
def folder_of(tmp_path, monkeypatch) -> Callable[[type[Searcher]], Path]:
    """Registers a searcher for one test; gives its folder."""
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))

    def make(searcher: type[Searcher]) -> Path:
        register_searcher(searcher)
        storage.write_manifest(tmp_path / searcher.kind, {"kind": searcher.kind, "recipe": {}})
        return tmp_path / searcher.kind

    return make


class OneByOne(Other):
    """Takes longer for a batch than for its queries one by one, and keeps the sizes of batches."""

    kind = family = "one by one"
    sizes: ClassVar[list[int]] = []

    def search(self, queries, k):
        self.sizes.append(len(queries))
        time.sleep(0.05 * len(queries) ** 1.5)
        return super().search(queries, k)


async def test_batches_are_small_where_large_ones_save_no_time(folder_of, catalogue_of, client_of):
    async with client_of(catalogue_of(folders={"slow": folder_of(OneByOne)})) as client:
        assert max(OneByOne.sizes) == 4  # it was warmed for all sizes
        OneByOne.sizes.clear()
        body = {"queries": list("abcdef"), "hits": 3}
        assert (await client.post("/v1/slow/search", json=body)).status_code == 200
    assert OneByOne.sizes == [1] * 6


async def test_scores_may_be_numpys(folder_of, catalogue_of, client_of):
    async with client_of(catalogue_of(folders={"other": folder_of(Other)})) as client:
        body = json.loads((await client.get("/v1/other/search?query=x&hits=3")).content)
    assert [(one["docid"], one["score"]) for one in body["candidates"]] == [
        ("p0", 0.0),
        ("p1", -0.125),
        ("p2", -0.25),
    ]


@pytest.mark.parametrize(
    "why",
    [
        {"why": "so"},
        {"docids": 7, "certain": None},
        {"docids": [{"passage": "p0"}] * 9},
        {"docids": [1] * 9, "certain": "surely"},
    ],
)
async def test_an_explanation_of_another_form_is_passed_on(
    why, folder_of, catalogue_of, client_of, monkeypatch
):
    monkeypatch.setattr(Other, "explain", lambda self, query, ranked_list: why)
    async with client_of(catalogue_of(folders={"other": folder_of(Other)})) as client:
        response = await client.get("/v1/other/search?query=x&hits=3&explain=true")
    assert response.status_code == 200
    assert len(response.json()["candidates"]) == 3
    assert response.json()["explanation"] == why


async def test_a_slow_searcher_does_not_hold_up_a_fast_one(folder_of, catalogue_of, client_of):
    catalogue = catalogue_of(folders={"slow": folder_of(Slow), "fast": folder_of(Other)})
    async with client_of(catalogue) as client:
        slow = catalogue.get("slow").searcher
        slow.begun.clear()
        slow.let_go.clear()
        try:
            waiting = asyncio.create_task(client.get("/v1/slow/search?query=x"))
            assert await asyncio.to_thread(slow.begun.wait, 30)
            async with asyncio.timeout(30):
                assert (await client.get("/v1/fast/search?query=x")).status_code == 200
            assert not waiting.done()
        finally:
            slow.let_go.set()
        assert (await waiting).status_code == 200
