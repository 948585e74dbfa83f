"""A server in a process of its own, which is asked over loopback and gets signals."""

import json
import os
import signal
import time
import urllib.request


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
