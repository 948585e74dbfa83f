"""The routes of the app, asked by httpx: their answers are those of the searchers themselves."""

import asyncio
import base64
import dataclasses

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from retrieval_jax.search.searcher import Searcher
from retrieval_jax.serving.app import all_of
from retrieval_jax.serving.batching import BatchSettings
from retrieval_jax.serving.settings import ServeSettings

pytestmark = pytest.mark.anyio
NAMES = ("bm25", "exact", "naive")
QUICK = ServeSettings(BatchSettings(sizes=(1, 4)), max_hits=20)
QUERY = "a progress bar for a table"


def pairs(candidates: list[dict]) -> list[tuple[str, float]]:
    return [(candidate["docid"], candidate["score"]) for candidate in candidates]


def assert_same(candidates: list[dict], ranked_list: list[tuple[str, float]]) -> None:
    """The same passages in the same order; scores of another batch size differ in the last digits."""
    assert [passage for passage, _ in pairs(candidates)] == [passage for passage, _ in ranked_list]
    np.testing.assert_allclose([s for _, s in pairs(candidates)], [s for _, s in ranked_list], rtol=1e-4)
    assert [candidate["rank"] for candidate in candidates] == [*range(1, len(ranked_list) + 1)]


@pytest.mark.parametrize("name", NAMES)
async def test_a_search_finds_what_the_searcher_finds(name, client, searchers, collection):
    response = await client.get(f"/v1/{name}/search", params={"query": QUERY, "hits": 7})
    assert response.status_code == 200
    body = response.json()
    (wanted,) = searchers[name].search([QUERY], 7)
    assert len(wanted) >= 5
    assert_same(body["candidates"], wanted)
    assert (body["api"], body["index"]) == ("v1", name)
    assert body["query"] == {"text": QUERY, "truncated": False}
    passages = collection.get(collection.find_rows([passage for passage, _ in wanted]).tolist())
    assert [c["doc"] for c in body["candidates"]] == [{"title": p.title, "text": p.text} for p in passages]
    bare = await client.get(f"/v1/{name}/search", params={"query": QUERY, "hits": 7, "docs": "false"})
    assert pairs(bare.json()["candidates"]) == pairs(body["candidates"])
    assert {candidate["doc"] for candidate in bare.json()["candidates"]} == {None}


async def test_a_lexical_searcher_is_served_and_explains(weighing, catalogue_of, client_of):
    asked = {"query": QUERY, "hits": 5, "explain": "true"}
    searcher = Searcher.open(weighing["lexical"])
    (wanted,) = searcher.search([QUERY], 5)
    assert len(wanted) == 5
    async with client_of(catalogue_of(folders={"lexical": weighing["lexical"]})) as client:
        body = (await client.get("/v1/lexical/search", params=asked)).json()
        few = (await client.get("/v1/lexical/search", params=asked | {"hits": 2})).json()
    assert_same(body["candidates"], wanted)
    assert [docid["passage"] for docid in body["explanation"]["docids"]] == [name for name, _ in wanted]
    assert few["explanation"] == body["explanation"] | {
        "certain": 2, "docids": body["explanation"]["docids"][:2]
    }  # fmt: skip


async def test_a_fused_searcher_is_served_with_what_its_parts_add(weighing, catalogue_of, client_of):
    asked = {"query": QUERY, "hits": 5, "explain": "true"}
    parts = {name: Searcher.open(weighing[name]).search([QUERY], 100)[0] for name in ("lexical", "planned")}
    ranks = {name: {p: rank for rank, (p, _) in enumerate(found, 1)} for name, found in parts.items()}
    async with client_of(catalogue_of(folders={"fused": weighing["fused"]})) as client:
        body = (await client.get("/v1/fused/search", params=asked)).json()
    docids = body["explanation"]["docids"]
    assert [docid["passage"] for docid in docids] == [one["docid"] for one in body["candidates"]]
    for docid, candidate in zip(docids, body["candidates"], strict=True):
        assert sum(part["adds"] for part in docid["parts"]) == pytest.approx(candidate["score"])
        found = {part["part"]: part["rank"] for part in docid["parts"]}
        assert found == {name: ranks[name].get(docid["passage"]) for name in parts}


async def test_a_planned_searcher_is_served_with_its_plan(weighing, catalogue_of, client_of):
    asked = {"query": QUERY, "hits": 5, "explain": "true"}
    searcher = Searcher.open(weighing["planned"])
    ranked_list = searcher.search([QUERY], 10)[0]
    wanted = searcher.explain(QUERY, ranked_list)
    async with client_of(catalogue_of(folders={"planned": weighing["planned"]})) as client:
        body = (await client.get("/v1/planned/search", params=asked)).json()
    assert_same(body["candidates"], ranked_list[:5])
    found, plan = body["explanation"]["docids"], body["explanation"]["plan"]
    assert [docid["plan_rank"] for docid in found] == [d["plan_rank"] for d in wanted["docids"][:5]]
    for docid, candidate in zip(found, body["candidates"], strict=True):
        sequential = sum(step["log_prob"] for step in docid["steps"])
        total = docid["lexical"] + plan["sequential_weight"] * sequential
        assert total == pytest.approx(candidate["score"], rel=1e-4, abs=1e-4)
    for name in ("passage", "followed", "tokens"):
        assert [one[name] for one in plan["first"]] == [one[name] for one in wanted["plan"]["first"]]
    assert (plan["sequential_weight"], plan["passages"]) == (0.5, 30)
    heaviest = [token["text"] for token in wanted["plan"]["tokens"]]
    assert [token["text"] for token in plan["tokens"]] == heaviest


@pytest.mark.parametrize("name", NAMES)
async def test_several_queries_at_once_are_answered_in_their_order(name, client, searchers):
    queries = [QUERY, "gradient", QUERY, "learning rate schedule", "table", "style of a column"]
    response = await client.post(f"/v1/{name}/search", json={"queries": queries, "hits": 5, "docs": False})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["query"]["text"] for result in results] == queries
    for result, wanted in zip(results, searchers[name].search(queries, 5), strict=True):
        assert_same(result["candidates"], wanted)


async def test_an_explanation_is_the_searchers_own(client, searchers):
    asked = {"query": QUERY, "hits": 10, "explain": "true"}
    body = (await client.get("/v1/naive/search", params=asked)).json()
    wanted = searchers["naive"].explain(QUERY, searchers["naive"].search([QUERY], 10)[0])
    steps = [[step["text"] for step in docid["steps"]] for docid in wanted["docids"]]
    found = body["explanation"]
    assert [[step["text"] for step in docid["steps"]] for docid in found["docids"]] == steps
    assert found["certain"] == wanted["certain"]
    scores = [sum(step["log_prob"] for step in docid["steps"]) for docid in found["docids"]]
    np.testing.assert_allclose(scores, [score for _, score in pairs(body["candidates"])], atol=1e-3)
    few = (await client.get("/v1/naive/search", params=asked | {"hits": 2})).json()["explanation"]
    assert few["docids"] == found["docids"][:2]
    assert few["certain"] == min(found["certain"], 2)
    body = (await client.get("/v1/bm25/search", params=asked)).json()
    assert body["explanation"] is None


async def test_ten_passages_are_found_unless_more_are_asked_for(client):
    for hits, count in (({}, 10), ({"hits": 20}, 20), ({"hits": 1}, 1)):
        response = await client.get("/v1/exact/search", params={"query": QUERY, **hits})
        assert len(response.json()["candidates"]) == count


async def test_where_fewer_than_ten_may_be_asked_for_so_many_are_found(client_of, catalogue_of):
    settings = dataclasses.replace(QUICK, max_hits=5)
    async with client_of(catalogue_of("bm25", settings=settings)) as client:
        body = (await client.get("/v1/bm25/search", params={"query": QUERY})).json()
        assert len(body["candidates"]) == 5
        (result,) = (await client.post("/v1/bm25/search", json={"queries": [QUERY]})).json()["results"]
        assert result["candidates"] == body["candidates"]
        refused = await client.get("/v1/bm25/search", params={"query": QUERY, "hits": 10})
        assert refused.status_code == 422
        assert refused.json()["error"] == "hits: 10 is more than 5: ask for fewer"


async def test_a_passage_by_its_id_which_may_have_slashes(client, collection):
    wanted = collection.passage(3)
    response = await client.get(f"/v1/exact/doc/{wanted.id}")
    assert response.json()["doc"] == {"title": wanted.title, "text": wanted.text}
    assert response.json()["docid"] == wanted.id
    response = await client.get("/v1/exact/doc/a/b%2Fc")
    assert response.status_code == 404
    assert response.json()["error"].startswith("a/b/c: no such passage")


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({}, "query: Field required"),
        ({"query": "x", "hits": 0}, "hits: Input should be greater than or equal to 1"),
        ({"query": "x", "hits": -1}, "hits: Input should be greater than or equal to 1"),
        ({"query": "x", "hits": 10**9}, "hits: 1000000000 is more than 20: ask for fewer"),
        ({"query": "x", "hits": "many"}, "hits: Input should be a valid integer"),
    ],
)
async def test_a_value_that_is_not_allowed_is_refused_in_one_line(params, error, client):
    response = await client.get("/v1/bm25/search", params=params)
    assert response.status_code == 422
    assert response.json()["error"].startswith(error)


async def test_lists_have_a_bound(client):
    response = await client.post("/v1/bm25/search", json={"queries": ["x"] * 10_000})
    assert (response.status_code, response.json()) == (
        422,
        {"error": "queries: 10,000 are more than 32: send several requests"},
    )
    response = await client.post("/v1/embeddings", json={"input": ["x"] * 33})
    assert response.status_code == 422
    for body in ({"queries": []}, {"queries": ["x"], "hits": 21}, {"queries": [1] * 100_000}):
        assert (await client.post("/v1/bm25/search", json=body)).status_code == 422


async def test_a_response_has_a_bound(client_of, catalogue_of):
    async with client_of(catalogue_of("bm25", settings=ServeSettings(BatchSettings(sizes=(1,))))) as client:
        body = {"queries": ["x"] * 11, "hits": 1000}
        response = await client.post("/v1/bm25/search", json=body)
        assert (response.status_code, response.json()) == (
            422,
            {
                "error": "hits: 1,000 for 11 queries are more than 10,000 passages: ask for fewer, or send "
                "several requests"
            },
        )
        response = await client.post("/v1/bm25/search", json=body | {"queries": ["x"] * 10})
        assert response.status_code == 200
        assert (await client.get("/v1/info")).json()["limits"]["max_passages"] == 10_000


async def test_while_too_much_is_unread_no_more_is_searched_for(client_of, catalogue_of):
    catalogue = catalogue_of("bm25")
    async with client_of(catalogue) as client:
        catalogue.unsent = lambda: 65 << 20
        response = await client.get("/v1/bm25/search?query=x")
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert (await client.get("/health")).status_code == 200


async def test_other_sites_pages_may_post_and_see_when_to_ask_again(client_of, catalogue_of):
    settings = dataclasses.replace(QUICK, cors_origins=("https://example.org",))
    async with client_of(catalogue_of("bm25", settings=settings)) as client:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
        origin = {"Origin": "https://example.org"}
        response = await client.options("/v1/bm25/search", headers=origin | asks)
        assert response.status_code == 200
        assert "POST" in response.headers["access-control-allow-methods"]
        response = await client.get("/v1/nothing/search?query=x", headers=origin)
        assert response.headers["access-control-expose-headers"] == "Retry-After"
        assert response.headers["access-control-allow-origin"] == "https://example.org"


async def test_no_other_sites_page_may_read_answers_unless_told(client):
    origin = {"Origin": "https://example.org"}
    preflight = await client.options(
        "/v1/bm25/search", headers=origin | {"Access-Control-Request-Method": "POST"}
    )
    for response in (preflight, await client.get("/v1/bm25/search?query=x", headers=origin)):
        assert not [name for name in response.headers if name.startswith("access-control-")]
    assert preflight.status_code == 405


@pytest.mark.parametrize("told", [False, True])
async def test_queries_are_logged_only_where_that_is_wanted(told, client_of, catalogue_of, capsys):
    settings = dataclasses.replace(QUICK, log_queries=True) if told else QUICK
    async with client_of(catalogue_of("bm25", settings=settings)) as client:
        assert (await client.get("/v1/bm25/search?query=whoever+asked")).status_code == 200
        body = {"queries": ["whatever it was", "x"]}
        assert (await client.post("/v1/bm25/search", json=body)).status_code == 200
    said = "".join(capsys.readouterr())
    assert ("whoever asked" in said, "whatever it was" in said) == (told, told)


async def test_an_error_of_a_searcher_is_500_in_one_line_for_other_sites_pages_too(
    client_of, catalogue_of, monkeypatch
):
    def failing(queries: list[str], hits: int) -> None:
        raise ValueError("a searcher's own error, on\ntwo lines")

    catalogue = catalogue_of(
        "bm25", settings=dataclasses.replace(QUICK, cors_origins=("https://example.org",))
    )
    async with client_of(catalogue) as client:
        monkeypatch.setattr(catalogue.get("bm25").searcher, "search", failing)
        origin, labels = {"Origin": "https://example.org"}, {"route": "/v1/{index}/search", "status": "500"}
        asked = [
            client.get("/v1/bm25/search?query=x", headers=origin),
            client.post("/v1/bm25/search", json={"queries": ["x", "y"]}, headers=origin),
        ]
        for count, request in enumerate(asked, start=1):
            response = await request
            assert (response.status_code, response.headers["content-type"]) == (500, "application/json")
            assert response.json() == {"error": "an error of the server's own: its log has it"}
            assert response.headers["access-control-allow-origin"] == "https://example.org"
            page = (await client.get("/metrics")).text
            samples = (one for family in text_string_to_metric_families(page) for one in family.samples)
            assert [one.value for one in samples if one.labels == labels and one.name.endswith("_total")] == [
                count
            ]


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
async def test_a_method_that_a_search_does_not_have_is_405(method, client):
    response = await client.request(method, "/v1/bm25/search?query=x")
    assert (response.status_code, response.headers["allow"]) == (405, "GET")


async def test_an_error_is_raised_when_all_results_are_there():
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(3)]
    futures[0].set_result((b"",))
    for number in (1, 2):
        futures[number].set_exception(ValueError(str(number)))
    with pytest.raises(ValueError, match="1"):
        await all_of(futures)


async def test_names_that_are_not_there(client):
    response = await client.get("/v1/scann/search", params={"query": "x"})
    assert (response.status_code, response.json()["error"]) == (
        404,
        "no searcher of this name: choose one of bm25, exact, naive",
    )
    for path in ("/v1/queries?split=nope", "/nowhere", "/v1/scann/doc/x"):
        response = await client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]
    assert (await client.delete("/v1/bm25/search")).status_code == 405


@pytest.mark.parametrize("text", ["", " " * 1_000_000, "\0", "a\0b", "\U0001f600", "ü" * 9000, "%ff%fe"])
async def test_any_text_is_a_query(text, client):
    for name in NAMES:
        response = await client.post(f"/v1/{name}/search", json={"queries": [text]})
        assert response.status_code == 200
        if name == "bm25":
            assert response.json()["results"][0]["query"]["truncated"] == (len(text) > 8192)


async def test_a_query_that_is_longer_than_its_model_reads_is_said_to_be_truncated(client, searchers):
    for name in ("exact", "naive"):
        for words, truncated in ((3, False), (200, True)):
            response = await client.get(f"/v1/{name}/search", params={"query": "a " * words})
            assert response.json()["query"]["truncated"] == truncated, (name, words)
            assert searchers[name].truncates("a " * words) == truncated


async def test_what_is_no_utf8_is_read_as_u_fffd_in_a_path_and_refused_in_json(client, searchers):
    body = (await client.get("/v1/exact/search?query=a%ff%00bar")).json()
    assert body["query"]["text"] == "a\ufffd\0bar"
    assert_same(body["candidates"], searchers["exact"].search(["a\ufffd\0bar"], 10)[0])
    json_type = {"content-type": "application/json"}
    halves = await client.post("/v1/exact/search", content=rb'{"queries": ["\ud83d"]}', headers=json_type)
    assert halves.json()["results"][0]["query"]["text"] == "\ufffd"
    for content in (b'{"queries": ["\xff"]}', b'{"queries": ["x', b"\0", b"", b"[" * 100_000):
        response = await client.post("/v1/exact/search", content=content, headers=json_type)
        assert response.status_code in (400, 422)
        assert response.json()["error"]


async def test_embeddings_are_the_vectors_that_queries_are_searched_by(client, searchers):
    texts, encoder = ["a table", "learning rate"], searchers["exact"].encoder
    response = await client.post("/v1/embeddings", json={"input": texts, "model": "exact"})
    body = response.json()
    np.testing.assert_allclose([one["embedding"] for one in body["data"]], encoder(texts), atol=1e-5)
    assert [one["index"] for one in body["data"]] == [0, 1]
    tokens = sum(len(encoder.vocabulary.encode(text)) + 1 for text in texts)
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    single = (await client.post("/v1/embeddings", json={"input": texts[1]})).json()
    assert single["model"] == "exact"
    np.testing.assert_allclose(single["data"][0]["embedding"], body["data"][1]["embedding"], atol=1e-5)
    coded = (await client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"})).json()
    vectors = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in coded["data"]]
    np.testing.assert_allclose(vectors, encoder(texts), atol=1e-5)
    asked = {"input": texts, "dimensions": 3}  # of unit length again, as the model's vectors are
    short = [one["embedding"] for one in (await client.post("/v1/embeddings", json=asked)).json()["data"]]
    first = encoder(texts)[:, :3]
    np.testing.assert_allclose(short, first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-5)
    response = await client.post("/v1/embeddings", json={"input": texts, "dimensions": 9})
    error = "dimensions: 9, and exact's vectors have 8: ask for fewer"
    assert (response.status_code, response.json()["error"]) == (422, error)
    response = await client.post("/v1/embeddings", json={"input": texts, "model": "naive"})
    assert (response.status_code, response.json()["error"]) == (
        404,
        "naive: has no dual encoder: name another searcher as the model",
    )


async def test_texts_of_which_only_the_beginning_is_encoded_are_said_so(client, searchers):
    encoder = searchers["exact"].encoder
    fitting, asked = "a " * 3, ["a " * 3, "a " * 200, " " * 9000, "a"]
    while len(encoder.vocabulary.encode(fitting + "a ")) < encoder.length:  # with the end, it is full
        fitting += "a "
    body = (await client.post("/v1/embeddings", json={"input": [*asked, fitting, fitting + "a "]})).json()
    assert [one["truncated"] for one in body["data"]] == [False, True, True, False, False, True]
    read = (await client.post("/v1/embeddings", json={"input": fitting})).json()
    assert read["usage"]["prompt_tokens"] == encoder.length
    np.testing.assert_allclose(read["data"][0]["embedding"], body["data"][5]["embedding"], atol=1e-5)


async def test_judged_queries_by_pages(client, collection):
    wanted = collection.queries("test")
    body = (await client.get("/v1/queries?split=test&offset=2&limit=3")).json()
    assert (body["total"], body["offset"], body["splits"]) == (10, 2, collection.query_counts)
    assert body["queries"] == [{"id": q.id, "text": q.text, "relevant": q.positives} for q in wanted[2:5]]
    assert (await client.get("/v1/queries?split=test&offset=99")).json()["queries"] == []


async def test_health_info_and_documentation(client, collection):
    assert (await client.get("/health")).json() == {"status": "ok"}
    for path in ("/health", "/ready"):
        assert (await client.head(path)).status_code == 200
    info = (await client.get("/v1/info")).json()
    assert [one["name"] for one in info["searchers"]] == [*NAMES]
    of = {one["name"]: one for one in info["searchers"]}
    assert (of["naive"]["kind"], of["naive"]["beams"], of["bm25"]["parameters"]) == ("generative", 10, None)
    assert of["exact"]["dimensions"] == 8
    assert {one["passages"] for one in info["searchers"]} == {collection.passage_count}
    assert info["limits"]["max_hits"] == 20
    docs = await client.get("/docs")
    assert docs.status_code == 200
    assert "connect-src 'self'" in docs.headers["content-security-policy"]
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v1/{index}/search", "/v1/{index}/doc/{docid}", "/v1/embeddings", "/v1/queries"} <= paths.keys()


async def test_before_the_searchers_are_open_it_says_so(client_of, catalogue_of):
    async with client_of(catalogue_of("naive"), ready=False) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.head("/ready")).status_code == 503
        for path in ("/ready", "/v1/naive/search?query=x"):
            response = await client.get(path)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "being opened" in response.json()["error"]
