"""What other indexes of a docid table cost, each in a process of its own, so that its memory is its own.

    python benchmarks/_rivals.py TOKENS.npy [--static FOLDER --size V]

prints {"bytes": …, "seconds": …}: of a trie of Python dicts (bytes: by how much the process grows), or of
STATIC's index (github.com/youtube/static-constraint-decoding, checked out in a folder; bytes: its arrays).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MOST_SECONDS = 600


def dict_trie(tokens_NxL: np.ndarray) -> dict:
    """A dict of dicts: token -> what may follow."""
    trie: dict = {}
    for first in range(0, len(tokens_NxL), 1 << 14):
        for docid in tokens_NxL[first : first + (1 << 14)].tolist():
            node = trie
            for token in docid:
                if token == 0:
                    break
                node = node.setdefault(token, {})
    return trie


def measure(tokens_NxL: np.ndarray, *arguments: str) -> dict | str:
    """What this file prints when run, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        np.save(path, tokens_NxL)
        command = [sys.executable, __file__, str(path), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            return f"not done after {MOST_SECONDS} s"
    return json.loads(done.stdout) if done.returncode == 0 else (done.stderr.splitlines() or ["killed"])[-1]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokens")
    parser.add_argument("--static")
    parser.add_argument("--size", type=int)
    options = parser.parse_args()
    tokens_NxL = np.load(options.tokens)
    if options.static:
        sys.path.insert(0, options.static)
        from static_decoding.csr_utils import build_static_index

        from retrieval_jax.decoding.order import order

        started = time.perf_counter()
        sorted_NxL = tokens_NxL[order(tokens_NxL)[0]]  # as it wants them
        # Two dense layers, its default, take V² entries.
        index = build_static_index(sorted_NxL, options.size, 2 if options.size <= 4096 else 1)
        seconds = time.perf_counter() - started
        size = sum(array.nbytes for array in index if isinstance(array, np.ndarray))
    else:
        before, started = resident_bytes(), time.perf_counter()
        trie = dict_trie(tokens_NxL)
        seconds = time.perf_counter() - started
        size = resident_bytes() - before
        assert trie  # it is still there
    print(json.dumps({"bytes": size, "seconds": seconds}))


if __name__ == "__main__":
    main()
