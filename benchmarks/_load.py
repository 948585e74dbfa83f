"""A light client of HTTP servers, in a process of its own: many connections ask when they were answered.

    python benchmarks/_load.py '{"addresses": ["host:80"], "requests": "FILE", "clients": 8, "seconds": 5}'

FILE has a request a line, as JSON: [method, path, body or null]; the addresses have the clients in turn. The
last line printed is JSON: answers a second, seconds of the median and of the 99th percentile, how many there
were of each status, and the seconds of CPU that an answer took here and in the servers, whose processes
"pids" may name.
"""

import asyncio
import collections
import itertools
import json
import os
import sys
import time
from pathlib import Path

import uvloop


class Client(asyncio.Protocol):
    """A connection."""

    def __init__(self, load: "Load"):
        self.load, self.data, self.wanted = load, b"", None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.began = time.perf_counter()
        self.transport.write(next(self.load.requests))

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.wanted is None:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.data[:end].lower()
            start = head.index(b"content-length:") + 15
            stop = head.find(b"\r", start)
            self.wanted = end + 4 + int(head[start : stop if stop > 0 else end])
        if len(self.data) >= self.wanted:
            self.load.answered(time.perf_counter() - self.began, self.data[9:12].decode())
            self.data, self.wanted = b"", None
            if self.load.running:
                self.ask()
            else:
                self.transport.close()


class Load:
    """All clients."""

    def __init__(self, requests: list[bytes]):
        self.requests = itertools.cycle(requests)
        self.seconds: list[float] = []
        self.statuses: collections.Counter = collections.Counter()
        self.running = True

    def answered(self, seconds: float, status: str) -> None:
        self.seconds.append(seconds)
        self.statuses[status] += 1

    async def run(self, addresses: list[str], clients: int, seconds: float, servers: list[int]) -> dict:
        loop = asyncio.get_running_loop()
        for _, address in zip(range(clients), itertools.cycle(addresses)):
            host, _, port = address.rpartition(":")
            await loop.create_connection(lambda: Client(self), host, int(port))
        await asyncio.sleep(min(seconds / 4, 1))  # until batches have their size
        self.seconds.clear()
        self.statuses.clear()
        began, used = time.perf_counter(), [time.process_time(), sum(map(cpu_seconds, servers))]
        await asyncio.sleep(seconds)
        taken, found = time.perf_counter() - began, sorted(self.seconds)
        used = [time.process_time() - used[0], sum(map(cpu_seconds, servers)) - used[1]]
        self.running = False
        return {
            "rate": len(found) / taken,
            "p50": found[len(found) // 2] if found else None,
            "p99": found[int(len(found) * 0.99)] if found else None,
            "statuses": dict(self.statuses),
            "cpu": used[0] / max(len(found), 1),
            "server_cpu": used[1] / max(len(found), 1),
        }


def cpu_seconds(process: int) -> float:
    """The time that all threads of a process have run so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def request(method: str, path: str, body: object) -> bytes:
    """A request of HTTP 1.1."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    data = json.dumps(body).encode()
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def main() -> None:
    options = json.loads(sys.argv[1])
    with open(options["requests"]) as file:
        requests = [request(*json.loads(line)) for line in file]
    running = Load(requests).run(
        options["addresses"], options["clients"], options["seconds"], options.get("pids", [])
    )
    print(json.dumps(uvloop.run(running)))


if __name__ == "__main__":
    main()
