"""The HTTP API: Pyserini's and Anserini's routes, OpenAI's embeddings, health, metrics and the page."""

import asyncio
import contextlib
import importlib.metadata
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path as FilePath
from typing import Annotated
from urllib.parse import parse_qsl

import jax
from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from retrieval_jax.core.progress import log
from retrieval_jax.data.vocabulary import valid_text
from retrieval_jax.serving import schemas
from retrieval_jax.serving.catalogue import Catalogue, SearchKey, SearchShape, Served
from retrieval_jax.serving.errors import Invalid, NotFound, NotReady, Overloaded, Refusal
from retrieval_jax.serving.gate import Gate, send_json
from retrieval_jax.serving.passages import quoted
from retrieval_jax.serving.protocol import MAX_UNSENT

PAGE = FilePath(__file__).with_name("page.html")
DESCRIPTION = "Search with every searcher of a collection: Pyserini's routes, OpenAI's embeddings."
DOCS_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; form-action 'none'; frame-ancestors 'none'; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net"
)
# Every route may answer so; FastAPI's own form of 422 is replaced by ours.
ERRORS = {
    status: {"model": schemas.Error, "description": what}
    for status, what in {
        400: "the body is no UTF-8",
        401: "the API key is missing or wrong",
        404: "there is no such searcher, passage or split",
        405: "the route has no such method",
        413: "the body is too large",
        422: "a value is not allowed",
        429: "too many queries wait: Retry-After says when to ask again",
        503: "not ready, or the deadline has passed",
    }.items()
}
Index = Annotated[str, Path(description="the name of a searcher, as /v1/info lists them")]


def create_app(catalogue: Catalogue) -> FastAPI:
    """Makes the ASGI app of a catalogue.

    When it starts, it opens the searchers in the background; when it ends, it answers what it has taken.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(catalogue.open_first())
        yield
        await catalogue.close()
        opening.cancel()

    app = FastAPI(
        title="retrieval_jax",
        description=DESCRIPTION,
        version=importlib.metadata.version("retrieval_jax"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # /metrics has what is measured
    )
    for kind in (Refusal, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)
    search = _add_search(app, catalogue)
    _add_embeddings(app, catalogue)
    _add_collection(app, catalogue)
    _add_operations(app, catalogue)
    # Exception handlers that are added after this have no effect, and middlewares are refused.
    app.middleware_stack = _front(app, search, catalogue)
    return app


def _front(app: FastAPI, search: APIRoute, catalogue: Catalogue) -> ASGIApp:
    """Puts the gate before all routes.

    A search skips FastAPI's middlewares and router, which take longer than a small search.
    """
    others, is_search, settings = app.build_middleware_stack(), search.path_regex.match, catalogue.settings

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        found = is_search(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
        if found is None:
            return await others(scope, receive, send)
        scope["route"], scope["path_params"] = search, found.groupdict()
        return await search.app(scope, receive, send)

    front = Gate(route, settings, catalogue.metrics)
    if not settings.cors_origins:
        return front
    return CORSMiddleware(
        front,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["X-API-Key", "Authorization"],
        expose_headers=["Retry-After"],
    )


async def error_response(request: Request | None, error: Exception) -> JSONResponse:
    """Returns the response to a request that an exception ended: one line, and its status."""
    match error:
        case Refusal():
            headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
            return JSONResponse({"error": str(error)}, error.status, headers)
        case RequestValidationError():
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
            return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)
        case HTTPException():
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": "an error of the server's own: its log has it"}, 500)


def _add_operations(app: FastAPI, catalogue: Catalogue) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page to search with."""
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """The page of Swagger, whose scripts come from elsewhere: they may talk to this server alone."""
        page = get_swagger_ui_html(openapi_url="openapi.json", title=app.title, swagger_favicon_url="data:,")
        page.headers["Content-Security-Policy"] = DOCS_POLICY
        return page

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=schemas.Health, tags=["operation"])
    async def health() -> dict:
        """Answers at once, while the process runs."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", response_model=schemas.Health, tags=["operation"])
    async def ready() -> dict:
        """Answers 200 when every searcher is open and compiled for all its shapes, until the server ends."""
        if catalogue.closing:
            raise NotReady("the server is ending: ask another one")
        if not catalogue.ready:
            raise NotReady(f"being opened: {', '.join(catalogue.missing)}: ask again")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(catalogue.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/info", response_model=schemas.InfoResponse, tags=["operation"])
    async def info() -> dict:
        """What is served, and with which limits."""
        settings = catalogue.settings
        names = ("max_hits", "max_queries", "max_passages", "max_query_chars", "max_payload_bytes")
        return {
            "searchers": [served.info() for served in catalogue.all()],
            "opening": catalogue.missing,
            "versions": {
                "retrieval_jax": importlib.metadata.version("retrieval_jax"),
                "jax": jax.__version__,
                "backend": jax.default_backend(),
            },
            "limits": {name: getattr(settings, name) for name in names}
            | {"max_waiting": settings.batching.max_waiting},
        }


def _add_search(app: FastAPI, catalogue: Catalogue) -> APIRoute:
    """Adds the routes of searches; returns that of a single one, whose `app` answers without FastAPI."""

    @app.get("/v1/{index}/search", response_model=schemas.SearchResponse, tags=["search"])
    async def search(index: Index, parameters: Annotated[schemas.SearchParameters, Query()]) -> bytes:
        """Finds the best passages for a query."""
        began, wanted = time.perf_counter(), parameters
        (answer,) = await answers(catalogue, index, [wanted.query], wanted.hits, wanted.docs, wanted.explain)
        return b"".join([b'{"api":"v1","index":%b,' % as_json(index), *answer, took(began)])

    route = app.router.routes[-1]
    route.app = _without_fastapi(search)

    @app.post("/v1/{index}/search", response_model=schemas.SearchesResponse, tags=["search"])
    async def searches(index: Index, body: schemas.SearchRequest) -> Response:
        """Finds the best passages for several queries."""
        began = time.perf_counter()
        found = await answers(catalogue, index, body.queries, body.hits, body.docs, body.explain)
        results = b"},{".join(map(b"".join, found))
        body = b'{"api":"v1","index":%b,"results":[{%b}]%b' % (as_json(index), results, took(began))
        return Response(body, media_type="application/json")

    return route


def _without_fastapi(search: Callable[[str, schemas.SearchParameters], Awaitable[bytes]]) -> ASGIApp:
    """Makes the ASGI app of a search's route.

    The parameters are read as FastAPI reads them, by the same model. UTF-8 that is not quoted is read, too.
    """

    async def found(scope: Scope) -> bytes:
        given = parse_qsl(scope["query_string"].decode("utf-8", "replace"), keep_blank_values=True)
        try:
            parameters = schemas.SearchParameters.model_validate(dict(given))
        except ValidationError as error:
            errors = [{**one, "loc": ("query", *one["loc"])} for one in error.errors()]
            raise RequestValidationError(errors) from None
        return await search(scope["path_params"]["index"], parameters)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await found(scope)
        except Exception as error:
            response = await error_response(None, error)
            await response(scope, receive, send)
            if response.status_code == 500:
                raise  # uvicorn logs it
        else:
            await send_json(send, 200, body)

    return answer


async def answers(
    catalogue: Catalogue, index: str, queries: Sequence[str], hits: int | None, docs: bool, explain: bool
) -> list[list[bytes]]:
    """Searches for queries.

    Args:
      catalogue: the searchers.
      index: the name of one.
      queries: the queries' texts.
      hits: passages to find for each; None: see `schemas.HITS`.
      docs: whether the passages' texts are wanted.
      explain: whether to explain how they were found.

    Returns:
      For each query the pieces of an object of JSON, without its braces: see `schemas.Answer`.

    Raises:
      Refusal: the request is not allowed, or cannot be answered now.
    """
    settings = catalogue.settings
    served = catalogue.get(index)
    if len(queries) > settings.max_queries:
        raise Invalid(
            f"queries: {len(queries):,} are more than {settings.max_queries}: send several requests"
        )
    hits = min(schemas.HITS, settings.max_hits) if hits is None else hits
    if hits > settings.max_hits:
        raise Invalid(f"hits: {hits} is more than {settings.max_hits}: ask for fewer")
    if len(queries) * hits > settings.max_passages:
        raise Invalid(
            f"hits: {hits:,} for {len(queries)} queries are more than {settings.max_passages:,} passages: "
            "ask for fewer, or send several requests"
        )
    if (unsent := catalogue.unsent()) > MAX_UNSENT:
        raise Overloaded(f"{unsent >> 20} MB of answers are not read yet: read them, and ask again")
    texts = [valid_text(query[: settings.max_query_chars]) for query in queries]
    shape = SearchShape(settings.depth(hits), explain)
    began = time.perf_counter()
    keys = [SearchKey(text, docs) for text in texts]
    with served.under_way(len(queries) * shape.depth):
        found = await all_of(served.batcher.submit(shape, keys))
    if settings.log_queries:
        for text in texts:
            log(f"{index}: {hits} hits in {1000 * (time.perf_counter() - began):.1f} ms for {text!r}")
    return [
        [
            b'"query":{"text":%b,"truncated":%b},"candidates":['
            % (as_json(text), b"true" if len(query) > settings.max_query_chars else truncated),
            *candidates[: 2 * hits],
            b"}]" if candidates else b"]",
            b',"explanation":%b' % cut(explanation, hits) if explain else b"",
        ]
        for query, text, (truncated, explanation, *candidates) in zip(queries, texts, found, strict=True)
    ]


def _add_embeddings(app: FastAPI, catalogue: Catalogue) -> None:
    settings = catalogue.settings

    @app.post("/v1/embeddings", response_model=schemas.EmbeddingsResponse, tags=["embeddings"])
    async def embeddings(body: schemas.EmbeddingsRequest) -> Response:
        """Encodes texts as queries by a dual encoder, in OpenAI's form."""
        served = _with_encoder(catalogue, body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not 1 <= len(texts) <= settings.max_queries:
            raise Invalid(f"input: {len(texts):,} texts: send 1 to {settings.max_queries} at a time")
        read = [valid_text(text[: settings.max_query_chars]) for text in texts]
        form = served.vector_form(body.encoding_format, body.dimensions)
        found = await all_of(served.embedder.submit(form, read))
        data = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%b,"truncated":%b}'
            % (number, vector, b"true" if len(text) > settings.max_query_chars else truncated)
            for number, (text, (vector, _, truncated)) in enumerate(zip(texts, found, strict=True))
        )
        tokens = sum(int(count) for _, count, _ in found)
        usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
        return Response(
            b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, as_json(served.name), usage),
            media_type="application/json",
        )


def _with_encoder(catalogue: Catalogue, name: str | None) -> Served:
    if name is not None:
        served = catalogue.get(name)
    elif not (served := next((one for one in catalogue.all() if one.embedder), None)):
        if catalogue.missing:
            raise NotReady(f"being opened: {', '.join(catalogue.missing)}: ask again")
        raise NotFound("no searcher here has a dual encoder: serve one of kind exact or scann")
    if not served.embedder:
        raise NotFound(f"{name}: has no dual encoder: name another searcher as the model")
    return served


def _add_collection(app: FastAPI, catalogue: Catalogue) -> None:
    @app.get("/v1/{index}/doc/{docid:path}", response_model=schemas.DocResponse, tags=["search"])
    def doc(index: Index, docid: Annotated[str, Path(description="may contain slashes")]) -> Response:
        """The text of a passage."""
        texts = catalogue.get(index).texts
        if texts is None:
            raise NotFound(f"{index}: its passages' texts are not at this server: serve their work folder")
        (text,) = texts.json([docid])
        if text == b"null":
            raise NotFound(f"{docid}: no such passage in {texts.collection.name}")
        head = b'{"api":"v1","index":%b,"docid":%b,"doc":' % (as_json(index), as_json(docid))
        return Response(head + text + b"}", media_type="application/json")

    @app.get("/v1/queries", response_model=schemas.QueriesResponse, tags=["search"])
    def queries(
        split: Annotated[str | None, Query(description="a split; none: the first one")] = None,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> dict:
        """Judged queries of the collection, with their relevant passages."""
        texts = catalogue.texts
        counts = texts.collection.query_counts if texts else {}
        split = split or next(iter(counts), None)
        if split not in counts:
            raise NotFound(
                f"split: no judged queries of it here: choose one of {', '.join(counts) or 'none'}"
            )
        found = texts.queries(split, offset, limit)
        return {
            "split": split,
            "splits": counts,
            "total": counts[split],
            "offset": offset,
            "queries": [{"id": q.id, "text": q.text, "relevant": q.positives} for q in found],
        }


async def all_of(futures: Sequence[asyncio.Future]) -> list[tuple[bytes, ...]]:
    """Waits for all results, or raises the first error: then of none."""
    if len(futures) == 1:
        return [await futures[0]]
    found = await asyncio.gather(*futures, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def cut(explanation: bytes, hits: int) -> bytes:
    """Cuts an explanation, as JSON, to the passages of the response.

    A kind of searcher that explains in another form is passed on as it is.
    """
    match json.loads(explanation):
        case {"docids": list(docids), "certain": int() | None as certain} as why if len(docids) > hits:
            least = None if certain is None else min(certain, hits)
            return json.dumps(why | {"docids": docids[:hits], "certain": least}).encode()
    return explanation


def as_json(text: str) -> bytes:
    """Returns a text as JSON, in ASCII."""
    return quoted(text).encode()


def took(began: float) -> bytes:
    """Returns the end of a response: the time since `began`."""
    return b',"took_ms":%.3f}' % (1000 * (time.perf_counter() - began))
