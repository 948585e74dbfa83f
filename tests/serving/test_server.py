"""A server in a process of its own, which is asked over loopback and gets signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def start(bindings, served_work) -> Iterator[Callable[..., tuple[subprocess.Popen, str]]]:
    """Starts `retrieval-jax serve` of some searchers; gives the process and its address when it is ready."""
    running = []

    def begin(*arguments: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "retrieval_jax.main", "serve", *bindings, "--gin.serve.port=0"]
        process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
        running.append(process)
        for line in process.stderr:
            if match := re.search(r"ready: (http://\S+)", line):
                return process, match[1]
        raise AssertionError(f"it ended with {process.wait()}")

    yield begin
    for process in running:
        process.kill()
        process.wait()


def get(address: str) -> dict:
    with urllib.request.urlopen(address, timeout=10) as response:
        return json.load(response)


def test_it_says_where_it_is_and_ends_with_0(start):
    process, address = start("--gin.serve.searchers=('bm25',)")
    assert address.startswith("http://127.0.0.1:")
    assert get(f"{address}/v1/bm25/search?query=table")["candidates"]
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert time.monotonic() - began < 8
    assert os.environ.get("RETRIEVAL_JAX_API_KEY") is None
