"""What the app sends is of the forms that it documents."""

import pytest

from retrieval_jax.serving import schemas

pytestmark = pytest.mark.anyio


async def test_responses_are_of_their_documented_form(client):
    search = {"params": {"query": "a table", "explain": "true"}}
    for form, response in (
        (schemas.SearchResponse, await client.get("/v1/naive/search", **search)),
        (schemas.SearchesResponse, await client.post("/v1/bm25/search", json={"queries": ["a", "table"]})),
        (schemas.EmbeddingsResponse, await client.post("/v1/embeddings", json={"input": ["a", "b"]})),
        (schemas.QueriesResponse, await client.get("/v1/queries")),
        (schemas.InfoResponse, await client.get("/v1/info")),
        (schemas.Error, await client.get("/v1/nowhere/search?query=x")),
    ):
        body = response.json()
        assert form.model_validate(body).model_dump(exclude_unset=True) == body
