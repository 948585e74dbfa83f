"""A connection's bounds: heads without end, clients that send or read nothing, what is not HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
import uvicorn

from retrieval_jax.serving import protocol
from retrieval_jax.serving.protocol import Protocol

pytestmark = pytest.mark.anyio
BODY = b"x" * (8 << 20)
LARGE = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope, receive, send) -> None:
    """Answers what was sent, or, at /large, more than the kernel holds for a reader."""
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body = BODY if scope["path"] == "/large" else body + message["body"]
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
    )
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def server() -> AsyncIterator[uvicorn.Server]:
    config = uvicorn.Config(app, port=0, http=Protocol, lifespan="off", ws="none", log_level="error")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    yield server
    await server.shutdown()


async def connect(server: uvicorn.Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())


async def response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def test_requests_are_answered_one_after_the_other_also_sent_together(server):
    reader, writer = await connect(server)
    for _ in range(2):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" * 3)
        for _ in range(3):
            assert await response(reader) == (200, b"abc")
    body = bytes(300_000)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert await response(reader) == (200, body)
    writer.close()


@pytest.mark.parametrize("what", [b"GET /?query=", b"GET / HTTP/1.1\r\nHost: x\r\nX: "])
async def test_a_head_without_end_is_refused(what, server):
    reader, writer = await connect(server)
    writer.write(what)
    for _ in range(16):
        writer.write(b"x" * (1 << 16))
        await asyncio.sleep(0)
    status, body = await response(reader)
    assert status == 431
    assert "send a POST" in json.loads(body)["error"]


async def test_what_is_no_http_is_refused(server):
    for what in (b"\xff\xfe\0\0\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET nowhere HTTP/9\r\n\r\n"):
        reader, writer = await connect(server)
        writer.write(what)
        status, body = await response(reader)
        assert status == 400
        assert json.loads(body)["error"]


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"]
)
async def test_who_does_not_finish_a_request_is_let_go(sent, server, monkeypatch):
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.1)
    reader, writer = await connect(server)
    writer.write(sent)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    assert not server.server_state.connections


def unsent(server: uvicorn.Server) -> int:
    return protocol.unsent(server.server_state)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Waits for a condition."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_who_does_not_read_is_let_go_and_who_reads_slowly_is_not(server, monkeypatch):
    monkeypatch.setattr(protocol, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 0.3)
    reader, writer = await connect(server)
    writer.write(LARGE)
    read = len(await reader.readuntil(b"\r\n\r\n")) * 0
    while read < len(BODY):
        read += len(await reader.read(1 << 20))
        await asyncio.sleep(0.05)
    assert read == len(BODY)
    _, writer = await connect(server)
    writer.write(LARGE)
    await until(lambda: unsent(server) > 1 << 20)
    await until(lambda: not server.server_state.slow)


@pytest.mark.parametrize("sent", ["GET /large", "GET /large with Connection: close"])
async def test_who_reads_nothing_has_no_connection_in_the_end(sent, server, monkeypatch):
    monkeypatch.setattr(protocol, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 0.3)
    _, writer = await connect(server)
    close = b"Connection: close\r\n" if "close" in sent else b""
    writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n" + close + b"\r\n")
    await until(lambda: server.server_state.connections)
    await until(lambda: not server.server_state.connections)


async def test_many_readers_get_large_answers_whole_though_more_than_may_be_unread(server, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_UNSENT", 4 << 20)
    readers = [await connect(server) for _ in range(6)]
    for _, writer in readers:
        writer.write(LARGE)
    await until(lambda: unsent(server) > 8 << 20)
    found = await asyncio.gather(*(response(reader) for reader, _ in readers))
    assert found == [(200, BODY)] * 6


async def test_who_stalls_is_let_go_soon_while_more_than_may_be_is_unread(server, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_UNSENT", 4 << 20)
    monkeypatch.setattr(protocol, "STALL_SECONDS", 0.1)
    stalled = [await connect(server) for _ in range(6)]
    for _, writer in stalled:
        writer.write(LARGE)
    await until(lambda: unsent(server) > 8 << 20)
    await until(lambda: unsent(server) <= 4 << 20)


async def test_the_next_request_of_a_connection_waits_until_the_answer_was_read(server):
    reader, writer = await connect(server)
    writer.write(LARGE * 3)
    await until(lambda: server.server_state.slow)
    writer.write(LARGE)
    await asyncio.sleep(0.2)
    assert server.server_state.total_requests == 0
    assert unsent(server) <= len(BODY)
    for _ in range(4):
        assert await response(reader) == (200, BODY)


async def test_a_line_between_requests_does_not_keep_a_connection(server, monkeypatch):
    reader, writer = await connect(server)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await response(reader))[0] == 200
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.1)
    writer.write(b"\r\n")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    await until(lambda: not server.server_state.connections)


async def test_what_a_read_brings_of_the_request_before_is_no_head(server, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_HEAD", 100)
    reader, writer = await connect(server)
    body = b"x" * 200
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200\r\n\r\n" + body + b"GET / HT")
    assert await response(reader) == (200, body)
    writer.write(b"TP/1.1\r\nHost: x\r\n\r\n")
    assert await response(reader) == (200, b"")


async def test_connections_have_a_bound(server, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 2)
    first = [await connect(server) for _ in range(2)]
    await asyncio.sleep(0.05)
    reader, _ = await connect(server)
    assert (await response(reader))[0] == 503
    reader, writer = first[0]
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await response(reader))[0] == 200


async def test_at_the_end_a_response_ends_its_connection(server):
    reader, writer = await connect(server)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await response(reader))[0] == 200
    server.server_state.draining = True
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"connection: close" in await reader.read()
