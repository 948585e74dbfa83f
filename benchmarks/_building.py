"""What building the trie of simulated docids takes, in a process of its own, so that its memory is its own.

    python benchmarks/_building.py KIND DOCIDS

prints {"bytes": of the trie a docid, "seconds": of building it, "peak": the most bytes a docid that building
took beside the table, "table": those of the table, "steps": see --steps}. --steps N measures the search, too:
the time of all steps at batch N over that of the same search without a trie.
"""

import argparse
import json
import re
import time
from pathlib import Path

import _quiet  # noqa: F401
import jax
import numpy as np
from _cost import measure_steps
from _docids import kinds

from retrieval_jax.decoding.trie import build_trie


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since `forget_peak`."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("docids", type=int)
    parser.add_argument("--vocabulary", type=Path)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    docids = kinds(options.vocabulary)[options.kind](options.docids)
    forget_peak()
    before, began = memory("VmRSS"), time.perf_counter()
    trie, row_N = build_trie(docids.tokens_NxL)
    seconds, peak = time.perf_counter() - began, memory("VmHWM") - before
    distinct = int((row_N == np.arange(len(row_N), dtype=np.int32)).sum())
    told = {
        "bytes": sum(array.nbytes for array in jax.tree.leaves(trie)) / distinct,
        "seconds": seconds,
        "peak": peak / distinct,
        "table": docids.tokens_NxL.nbytes / distinct,
        "length": docids.tokens_NxL.shape[1],
    }
    if options.steps:
        output_size = docids.output_size
        del docids, row_N
        ours, *theirs = measure_steps(jax.device_put(trie), output_size, options.steps, repetitions=5)
        told["steps"] = ours / min(theirs)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
