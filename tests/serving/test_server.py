"""A server in a process of its own, which is asked over loopback and gets signals."""

import asyncio
import json
import re
import shutil
import signal
import urllib.request
from pathlib import Path

import hypothesis
import pytest

from retrieval_jax.main import main

QUICK = hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[*hypothesis.HealthCheck],
)


def get(address: str) -> dict:
    with urllib.request.urlopen(address, timeout=10) as response:
        return json.load(response)


def test_whatever_the_documented_routes_are_sent_is_answered_as_documented(start):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import checks

    wanted = [
        checks.not_a_server_error,
        checks.response_schema_conformance,
        checks.content_type_conformance,
        checks.status_code_conformance,
    ]
    process, address = start("--gin.serve.searchers=('bm25', 'exact')", "--gin.serve.max_hits=20")
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:

        @QUICK
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            case.validate_response(case.call(), checks=wanted)

        check()
    assert get(f"{address}/ready") == {"status": "ok"}
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_it_ends_at_once_where_a_searcher_cannot_be_opened(start, served_work, tmp_path: Path):
    folder = shutil.copytree(served_work.searcher("bm25"), tmp_path / "last")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"kind": "nothing"}))
    with pytest.raises(AssertionError) as ended:
        start("--gin.serve.searchers=('bm25', 'naive')", f"--gin.serve.exports=({str(folder)!r},)")
    listening, error = str(ended.value).removeprefix("it ended with 2: ").splitlines()
    assert listening.startswith("listening: ")
    assert f"{folder}: no kind of searcher 'nothing': choose one of " in error


class Load:
    """Clients that ask one after the other, on connections that stay open, until one is told to close.

    Attributes:
      answers: of each client, the candidates of every answer.
      lost: requests that were sent and got no answer.
    """

    def __init__(self, address: str, clients: int):
        self.host, self.port = address.removeprefix("http://").split(":")
        self.answers: list[list[str]] = [[] for _ in range(clients)]
        self.lost = self.refused = 0
        self.clients = [asyncio.create_task(self._ask(number)) for number in range(clients)]

    async def _ask(self, number: int) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        open_ = True
        while open_:
            query = f"a%20progress%20bar%20{number}"
            writer.write(b"GET /v1/mine/search?query=%b HTTP/1.1\r\nHost: x\r\n\r\n" % query.encode())
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                body = await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))
            except (ConnectionError, asyncio.IncompleteReadError):
                self.lost += 1
                return
            self.refused += not head.startswith("http/1.1 200")
            self.answers[number].append(json.dumps(json.loads(body).get("candidates")))
            open_ = "connection: close" not in head

    async def more(self, count: int) -> list[str]:
        """Waits until each client has so many more answers; returns the last of them."""
        wanted = [len(answers) + count for answers in self.answers]
        async with asyncio.timeout(60):
            while any(len(a) < n for a, n in zip(self.answers, wanted, strict=True)):
                await asyncio.sleep(0.02)
        return [answers[n - 1] for answers, n in zip(self.answers, wanted, strict=True)]


def fingerprint(address: str) -> str:
    (searcher,) = get(f"{address}/v1/info")["searchers"]
    return searcher["fingerprint"]


@pytest.mark.anyio
async def test_under_load_a_changed_index_and_the_end_lose_no_request(
    start, bindings, served_work, tmp_path: Path
):
    folder, plain = tmp_path / "mine", tmp_path / "plain"
    shutil.copytree(served_work.searcher("bm25"), folder)
    index = ["index", *bindings, "--gin.make_index.language=None", "--gin.make_index.name='plain'", "--json"]
    assert await asyncio.to_thread(main, index) == 0
    shutil.move(served_work.searcher("plain"), plain)
    serve = ["--gin.serve.searchers=()", f"--gin.serve.exports=({str(folder)!r},)", "--gin.serve.cache_mb=0"]
    process, address = await asyncio.to_thread(start, *serve)
    first = await asyncio.to_thread(fingerprint, address)
    load = Load(address, 16)
    stemmed = {*await load.more(2)}
    folder.rename(tmp_path / "old")
    plain.rename(folder)
    process.send_signal(signal.SIGHUP)
    async with asyncio.timeout(60):
        while await asyncio.to_thread(fingerprint, address) == first:
            await asyncio.sleep(0.1)
    assert not {*await load.more(2)} & stemmed  # the second one was asked for after the change
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(asyncio.gather(*load.clients), 60)
    assert await asyncio.to_thread(process.wait, 60) == 0
    assert (load.lost, load.refused) == (0, 0)
    said = process.stderr.read()
    assert "1 of 1 searchers have changed" in said
    assert "progress" not in said  # no query is logged
    with pytest.raises(ConnectionError):
        await asyncio.open_connection(load.host, load.port)
