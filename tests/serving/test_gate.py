"""What is refused before a route sees it: requests without the key, and bodies that are too large."""

import dataclasses

import pytest
from prometheus_client.parser import text_string_to_metric_families

from retrieval_jax.serving.settings import ServeSettings

pytestmark = pytest.mark.anyio
SETTINGS = ServeSettings(max_payload_bytes=1000, max_hits=10)


async def test_with_a_key_all_but_health_page_and_documentation_need_it(client_of, catalogue_of):
    settings = dataclasses.replace(SETTINGS, api_key="sesame, ö")
    async with client_of(catalogue_of("bm25", settings=settings)) as client:
        for path in ("/v1/info", "/v1/bm25/search?query=x", "/metrics", "/nowhere"):
            for headers in (
                {},
                {"X-API-Key": "wrong"},
                {"X-API-Key": ""},
                {"Authorization": "Basic sesame"},
                {"Authorization": "Bearer"},
            ):
                response = await client.get(path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"].startswith("the API key is missing or wrong")
                assert response.headers["www-authenticate"] == "Bearer"
        key = "sesame, ö".encode()
        for headers in ({"X-API-Key": key}, {"Authorization": b"bearer " + key}):
            response = await client.get("/v1/bm25/search?query=x", headers=headers)
            assert response.status_code == 200
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200


async def test_a_body_that_is_too_large_is_refused_with_or_without_a_stated_length(client_of, catalogue_of):
    async def chunks():
        for _ in range(20):
            yield b" " * 100

    async with client_of(catalogue_of("bm25", settings=SETTINGS)) as client:
        json_type = {"content-type": "application/json"}
        small = b'{"queries": ["x"]}'.ljust(1000)
        assert (await client.post("/v1/bm25/search", content=small, headers=json_type)).status_code == 200
        for content in (small + b" ", chunks()):
            response = await client.post("/v1/bm25/search", content=content, headers=json_type)
            assert (response.status_code, response.json()) == (
                413,
                {"error": "the body is larger than 1,000 bytes: send less at a time"},
            )
            assert response.headers["connection"] == "close"


async def test_requests_are_counted_by_route_and_status_alone(client_of, catalogue_of):
    async with client_of(catalogue_of("bm25", settings=SETTINGS)) as client:
        for path in ("bm25/search?query=a", "bm25/search?query=b", "bm25/search", "x/search?query=a"):
            await client.get(f"/v1/{path}")
        for path in ("a", "b"):
            await client.get(f"/{path}")
        page = (await client.get("/metrics")).text
    counted = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "retrieval_jax_requests_total"
    }
    del counted["/ready", "200"]
    counted.pop(("/ready", "503"), None)
    route = "/v1/{index}/search"
    assert counted == {(route, "200"): 2, (route, "422"): 1, (route, "404"): 1, ("other", "404"): 2}
