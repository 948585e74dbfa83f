"""Clients that no server wants, beside four times the load that it can answer.

Against one searcher, all at once: requests at four times its rate of answers; slow readers of 1,000
passages; connections that send half a request; queries of 1 MB, of a million spaces, of broken UTF-8 and
NULs; lists of 10,000 queries; k of 0, -1 and 10⁹; bodies of 3 MB; what is not HTTP. Beside them one client
asks another searcher. Then the attack stops, and it is measured how long it takes until all is as before.
"""

import asyncio
import collections
import contextlib
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote_plus

from _load import request
from rich.console import Console
from rich.table import Table

FACTOR, SLOW, HALF_OPEN, WORKERS = 4, 20, 100, 8


def bad_requests(name: str) -> dict[str, bytes]:
    """What is sent over and over, by its name."""
    search = f"/v1/{name}/search"
    posts = {
        "1 MB query": {"queries": ["x y " * (1 << 18)]},
        "a million spaces": {"queries": [" " * 1_000_000]},
        "10,000 queries": {"queries": ["x"] * 10_000},
        "NULs": {"queries": ["\0" * 100, "a\0b"]},
        "k of 10⁹": {"queries": ["x"], "hits": 10**9},
        "3 MB body": {"queries": ["x" * (3 << 20)]},
        "32 queries": {"queries": [f"query {number}" for number in range(32)]},
    }
    gets = {f"k of {k}": f"{search}?query=x&hits={k}" for k in (0, -1, 10**9)}
    gets |= {
        "broken UTF-8": f"{search}?query=%ff%fe%80&hits=1",
        "1 MB address": f"{search}?query={'x' * (1 << 20)}",
    }
    broken = b'{"queries": ["\xff\xfe"]}'
    head = f"POST {search} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(broken)}\r\n\r\n"
    return {
        **{what: request("POST", search, body) for what, body in posts.items()},
        **{what: request("GET", path, None) for what, path in gets.items()},
        "broken UTF-8 in JSON": head.encode() + broken,
        "not HTTP": b"\xff\xfe\0\r\n\r\n",
    }


class Attack:
    """All that is sent, and what was answered."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.statuses: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.errors: dict[str, str] = {}

    async def ask(self, what: str, data: bytes) -> tuple[int, float]:
        """Sends a request on a connection of its own; status 0: it ended without an answer."""
        began = time.perf_counter()
        status, body = 0, b""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(30):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    writer.write(data)
                    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                    status = int(head.split()[1])
                    length = int(head.split("content-length: ")[1].split("\r\n")[0])
                    body = await reader.readexactly(length)
                finally:
                    writer.close()
        self.statuses[what][status] += 1
        if status >= 400 and what not in self.errors:
            self.errors[what] = json.loads(body)["error"][:100]
        return status, time.perf_counter() - began

    async def repeat(self, what: str, data: bytes, until: float) -> None:
        while time.monotonic() < until:
            await self.ask(what, data)
            await asyncio.sleep(0.02)

    async def flood(self, requests: Sequence[bytes], rate: float, until: float) -> None:
        """Sends so many a second, whether they are answered or not, or as many as this process can."""
        running, number, began = set(), 0, time.monotonic()
        while time.monotonic() < until:
            while number < rate * (time.monotonic() - began) and len(running) < 800:
                task = asyncio.create_task(self.ask("flood", requests[number % len(requests)]))
                running.add(task)
                task.add_done_callback(running.discard)
                number += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*running)

    async def never_read(self, name: str, until: float) -> None:
        """A slow reader."""
        with contextlib.suppress(ConnectionError):
            _, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 10)
            writer.write(request("GET", f"/v1/{name}/search?query=a&hits=1000", None) * 20)
            await asyncio.sleep(max(until - time.monotonic(), 0))
            writer.close()

    async def half_open(self, until: float) -> None:
        with contextlib.suppress(ConnectionError):
            _, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(b"POST /v1/x/search HTTP/1.1\r\nContent-Le")
            await asyncio.sleep(max(until - time.monotonic(), 0))
            writer.close()


def memory(process: subprocess.Popen) -> float:
    """Megabytes of memory that a process has in use."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def run(process: subprocess.Popen, address: str, name: str, queries: Sequence[str], seconds: float) -> dict:
    """Attacks a server for some seconds; returns what was answered, and the memory before and at most."""
    return asyncio.run(_run(process, address, name, queries, seconds))


async def _run(
    process: subprocess.Popen, address: str, name: str, queries: Sequence[str], seconds: float
) -> dict:
    host, port = address.split(":")
    attack = Attack(host, int(port))
    # Of different queries, as identical ones share one computation.
    texts = [f"{queries[number % len(queries)]} {number}" for number in range(20_000)]
    paths = [f"/v1/{name}/search?query={quote_plus(text)}" for text in texts]
    requests = [request("GET", path, None) for path in paths]
    quiet = sorted([(await attack.ask("before", requests[i % len(requests)]))[1] for i in range(20)])[10]
    rate = await _capacity(attack, requests)
    before, most, until = memory(process), 0.0, time.monotonic() + seconds
    tasks = [attack.flood(requests, FACTOR * rate, until)]
    tasks += [attack.repeat(what, data, until) for what, data in bad_requests(name).items()]
    tasks += [attack.never_read(name, until) for _ in range(SLOW)]
    tasks += [attack.half_open(until) for _ in range(HALF_OPEN)]
    tasks.append(
        attack.repeat("another searcher", request("GET", "/v1/bm25/search?query=a+table", None), until)
    )
    running = asyncio.gather(*tasks)
    while not running.done() and time.monotonic() < until:
        most = max(most, memory(process))
        await asyncio.sleep(0.1)
    stopped = time.monotonic()
    recovered = None
    while recovered is None and time.monotonic() - stopped < 30:
        status, took = await attack.ask("after", requests[0])
        if status == 200 and took < max(2 * quiet, quiet + 0.02):
            recovered = time.monotonic() - stopped
    await running
    assert process.poll() is None, "the server has ended"
    return {
        "searcher": name,
        "seconds": seconds,
        "capacity": round(rate, 1),
        "flood_over_capacity": round(sum(attack.statuses["flood"].values()) / seconds / rate, 2),
        "statuses": {
            what: {str(s): n for s, n in sorted(of.items())} for what, of in attack.statuses.items()
        },
        "errors": attack.errors,
        "mb_before": round(before),
        "mb_at_most": round(most),
        "recovered_seconds": None if recovered is None else round(recovered, 2),
    }


async def _capacity(attack: Attack, requests: Sequence[bytes], seconds: float = 3) -> float:
    """Answers a second that 32 clients get."""
    until, count = time.monotonic() + seconds, 0

    async def client(number: int) -> None:
        nonlocal count
        while time.monotonic() < until:
            await attack.ask("capacity", requests[(number + 32 * count) % len(requests)])
            count += 1

    await asyncio.gather(*(client(number) for number in range(32)))
    return count / seconds


def show(report: dict, console: Console) -> None:
    """Prints what was answered."""
    table = Table("what was sent", "answers by status", "the first error", title=f"{report['seconds']} s")
    for what, of in report["statuses"].items():
        counts = ", ".join(f"{status}: {count}" for status, count in of.items())
        table.add_row(what, counts, report["errors"].get(what, ""))
    console.print(table)
    console.print(
        f"{report['searcher']}: {report['capacity']} answers a second; {report['mb_before']} MB before,"
        f" {report['mb_at_most']} MB at most; as before {report['recovered_seconds']} s after the end."
    )
