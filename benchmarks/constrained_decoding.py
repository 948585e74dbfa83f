"""What does the docid constraint cost, and what would others' ways cost? On simulated docids of every kind.

    python benchmarks/constrained_decoding.py [--quick] [--only hf|cost|size|base] [--docids N]
        [--sizes N … --kinds KIND …] [--static FOLDER] [--vocabulary FILE]

- size: seconds to build the trie and its bytes a docid, beside a trie of Python dicts and STATIC's index
  (with --static, a checkout of github.com/youtube/static-constraint-decoding);
- cost: the search's own work at every position, beside that of the same search without a constraint (the best
  of all beams × outputs), both given the same logits. The network is in neither; whole searches with a small
  network are timed beside them;
- hf: whole searches beside Hugging Face's `generate` with `prefix_allowed_tokens_fn` over a dict trie, with
  the same weights; how many of the same docids come out, rank by rank. Needs torch and transformers. It is
  run as it is, and with ended beams kept among the others, as here, with one thread and with all; the search
  on one device and with a device for each core; the speedup is of the fastest over the fastest. Beside them
  what the decoder's matrix products take alone, by XLA or PyTorch;
- base (where asked for, on an accelerator): T5 1.1 Base, batches of 64, milliseconds a query for each kind,
  and the share of them that all is but the network: softmax, children, top-k.

With --sizes nothing but what grows with the docids is measured, each size and kind in a process of its own:
bytes a docid, seconds and the most memory of building the trie, and the ratio of the search's steps at batch
8. For 138,364,198 passages (MS MARCO v2) bytes and memory follow from the largest size, and are marked so.

What is compared is run in turn, medians are taken, and compiling is in no time. Prints tables, then one line
of JSON; null is what was not run. A kind's ratio is the largest over the batch sizes. --quick measures two
kinds, and batches of 8 alone.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import _docids
import _rivals
import jax
import numpy as np
from _cost import (
    BASE,
    BEAMS,
    WHOLE_BATCH,
    measure_atomic,
    measure_base,
    measure_cost,
    medians,
    network,
    placed_products,
    placed_search,
    random_queries,
    step_products,
)
from rich.console import Console
from rich.table import Table

from retrieval_jax.core.progress import log
from retrieval_jax.data.vocabulary import EOS, round_up
from retrieval_jax.decoding.trie import Trie, build_trie
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config

MS_MARCO, HF_DOCIDS, QUICK_DOCIDS = 8_841_823, 1_000_000, 20_000
MS_MARCO_V2 = 138_364_198
QUICK_KINDS = ("semantic", "rq_8x256")
CLOSE = 1e-4  # scores that rounding may swap


# --- size ---


def measure_size(docids: _docids.Docids, static: str | None) -> tuple[Trie, dict, dict]:
    """(the trie, {"bytes", "seconds"}, the rivals' or why there are none): bytes a docid."""
    started = time.perf_counter()
    trie, row_N = build_trie(docids.tokens_NxL)
    seconds = time.perf_counter() - started
    distinct = int((row_N == np.arange(len(row_N))).sum())
    size = sum(array.nbytes for array in jax.tree.leaves(trie)) / distinct

    tokens_NxL, rivals = docids.tokens_NxL, {}
    count, length = tokens_NxL.shape
    some = min(count, 1_000_000, 8_000_000 // length)
    rivals["dict"] = _per_docid(_rivals.measure(tokens_NxL[:some]), some)
    if static:
        some = min(count, 110_000_000 // length)  # it takes up to 65 bytes a token while it builds
        # Its vocabulary is the codes, the same at every position.
        shift_L = docids.codes * np.arange(length, dtype=np.int32)
        codes_NxL = np.where(tokens_NxL[:some] > EOS, tokens_NxL[:some] - shift_L, tokens_NxL[:some])
        size_of_codes = docids.codes + 2 if docids.codes else docids.output_size
        rivals["static"] = _per_docid(
            _rivals.measure(codes_NxL.astype(np.uint16), "--static", static, "--size", str(size_of_codes)),
            some,
        )
    return trie, {"bytes": size, "seconds": seconds}, rivals


def _per_docid(measured: dict | str, count: int) -> dict | str:
    if isinstance(measured, str):
        return measured
    return {"bytes": measured["bytes"] / count, "seconds": measured["seconds"], "docids": count}


# --- Hugging Face ---


def measure_hf(docids: _docids.Docids, config: T5Config, repetitions: int) -> dict:
    """Milliseconds a query: ours (on one device, or one for each core), generate (two ways, each with as many
    threads as is best); how many of its docids are ours, rank by rank; what matrix products alone take.
    """
    import _hugging_face

    tokens_NxL = docids.tokens_NxL
    rival = _hugging_face.random_network(config)
    params, (trie, _) = _hugging_face.params_of(rival), build_trie(tokens_NxL)
    model, queries, dicts = GenerativeRetriever(config), random_queries(), _rivals.dict_trie(tokens_NxL)
    sizes = (1, math.gcd(WHOLE_BATCH, jax.device_count()))
    meshes = [make_mesh(devices=jax.devices()[:size]) for size in sizes]
    searches = [placed_search(model, params, trie, mesh) for mesh in meshes]
    ways = [
        _hugging_face.searcher(rival, dicts, tokens_NxL.shape[1], BEAMS, put_aside)
        for put_aside in (True, False)
    ]
    rows_BxK, scores_BxK = searches[-1](queries)
    ours_BxKxL = tokens_NxL[np.asarray(rows_BxK)]
    agree = []
    for way in ways:
        theirs_BxKxL, their_scores_BxK = way(queries, 1)
        same_BxK = (ours_BxKxL == theirs_BxKxL).all(-1)
        found_BxK = (ours_BxKxL[:, None] == theirs_BxKxL[:, :, None]).all(-1).any(-1)
        close_BxK = np.abs(np.asarray(scores_BxK) - their_scores_BxK) < CLOSE
        agree.append(int((same_BxK | found_BxK & close_BxK).sum()))
    # On a busy machine, or for a small network, PyTorch is faster with one thread.
    threads = (1, os.cpu_count())
    runs = [functools.partial(search, queries) for search in searches]
    runs += [functools.partial(way, queries, n) for way in ways for n in threads]
    times = np.reshape(medians(runs, repetitions, 1, pause=0.3), (-1, 2)).min(1)  # each its two ways to run
    products = step_products(params)
    by_torch = _hugging_face.multiply(products)
    runs = [placed_products(products, mesh) for mesh in meshes]
    runs += [functools.partial(by_torch, n) for n in threads]
    step = min(medians([run], 20 * repetitions)[0] for run in runs)  # again and again: at their fastest
    # A search takes all but the root's, where a query has one beam.
    least = step * (tokens_NxL.shape[1] - 1) / WHOLE_BATCH
    return {
        "milliseconds": [float(time) / WHOLE_BATCH for time in times],
        "agree": agree,
        "products": f"{least:.2f}"
        if docids.output_size < _docids.T5_SIZE
        else "",  # the search cuts the wide one
    }


def own_vocabulary(docids: _docids.Docids) -> _docids.Docids:
    """The same docids, their tokens renumbered without gaps."""
    used = np.union1d(np.unique(docids.tokens_NxL), [0, EOS])
    tokens_NxL = np.searchsorted(used, docids.tokens_NxL).astype(np.uint16)
    return _docids.Docids(tokens_NxL, round_up(len(used), 128))


# --- the program ---


def run_hf(count: int, vocabulary: Path | None, repetitions: int, console: Console) -> dict:
    """generate's time over ours, by case; empty where there is nothing to compare with."""
    speedup = {}
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        console.print("hf: left out: install torch and transformers")
        return speedup
    table = Table(
        "softmax",
        "network",
        "products alone",
        "this search",
        "generate",
        "same docids",
        "ended beams stay",
        "same docids",
        "speedup",
        title=f"Milliseconds a query: {count:,} naive docids, batches of {WHOLE_BATCH}, {BEAMS} beams",
    )
    docids = _docids.naive(count, vocabulary)
    own = own_vocabulary(docids)
    cases = {
        "naive_32k": (docids, network(docids.output_size)),
        "docid_vocabulary": (own, network(own.output_size)),
        "docid_vocabulary_smallest": (own, network(own.output_size, width=16, layers=1)),
    }
    ours, generate = {}, {}
    for case, (made, config) in cases.items():
        measured = measure_hf(made, config, repetitions)
        (ours[case], *theirs), all_of_them = measured["milliseconds"], WHOLE_BATCH * BEAMS
        generate[case] = min(theirs)
        speedup[case] = generate[case] / ours[case]
        cells = [
            cell
            for time, agree in zip(theirs, measured["agree"], strict=True)
            for cell in (f"{time:.1f}", f"{agree} of {all_of_them}")
        ]
        size = f"{config.emb_dim} wide, {config.num_encoder_layers} + {config.num_decoder_layers} layers"
        times = measured["products"], f"{ours[case]:.2f}"
        table.add_row(f"{made.output_size:,} ({case})", size, *times, *cells, f"{speedup[case]:.1f}")
    console.print(table)
    # What T5's `generate` has no smaller softmax for.
    speedup["docid_vocabulary_over_32k"] = generate["naive_32k"] / ours["docid_vocabulary"]
    return speedup


def run_kinds(options: argparse.Namespace, count: int, repetitions: int, console: Console) -> dict:
    """Sizes and costs, kind by kind, so that one table is in memory."""
    batches = (WHOLE_BATCH,) if options.quick else (WHOLE_BATCH, 64)
    sizes = Table("docids", "longest", "bytes a docid", "seconds", title=f"Building, {count:,} docids")
    for name in ("dicts", "STATIC"):
        sizes.add_column(f"{name}: bytes")
        sizes.add_column("seconds" if name == "STATIC" else "s a million")
    costs = Table("docids", "softmax", title=f"All steps, {BEAMS} beams: ms, unconstrained ms, ratio")
    for name in (*(f"batch {batch_size}" for batch_size in batches), "whole search"):
        costs.add_column(name)
    makers = _docids.kinds(options.vocabulary)
    chosen = options.kinds or ("atomic", *(QUICK_KINDS if options.quick else makers))

    def add_cost(kind: str, output_size: int, times: dict) -> None:
        figures["constraint_cost"][kind] = max(a / b for key, (a, b) in times.items() if key != "whole")
        in_order = (times[key] for key in (*batches, "whole") if key in times)
        costs.add_row(kind, f"{output_size:,}", *(f"{a:.1f} {b:.1f} {a / b:.2f}" for a, b in in_order))

    kinds = ("atomic", *makers)
    figures = {key: dict.fromkeys(kinds) for key in ("constraint_cost", "bytes_per_docid", "build_seconds")}
    if options.only == "base":
        figures["base"] = {}
    if options.only in (None, "cost") and "atomic" in chosen:
        output_size = round_up(count + 1, 128)
        times = measure_atomic(count, output_size, batches, repetitions)
        add_cost("atomic", output_size, times)
    for kind, make in makers.items():
        if options.only == "hf" or kind not in chosen:
            continue
        log(f"{kind}: {count:,} docids")
        docids = make(count)
        if options.only in ("cost", "base"):
            trie, _ = build_trie(docids.tokens_NxL)
        else:
            trie, ours, rivals = measure_size(docids, options.static)
            figures["bytes_per_docid"][kind], figures["build_seconds"][kind] = ours["bytes"], ours["seconds"]
            sizes.add_row(kind, *_size_cells(docids, ours, rivals))
        output_size = docids.output_size
        del docids  # the tables of millions are not needed beside the logits
        if options.only == "base":
            config = dataclasses.replace(BASE, output_size=output_size, separate_target_embedding=True)
            base = figures["base"][kind] = measure_base(trie, config, repetitions)
            console.print(
                f"{kind}: {base['ms_per_query']:.2f} ms a query, {base['constraint_share']:.1%} of it"
            )
        elif options.only != "size":
            add_cost(kind, output_size, measure_cost(trie, output_size, batches, repetitions))
    for table in (sizes, costs):
        if table.row_count:
            console.print(table)
    return figures


def _size_cells(docids: _docids.Docids, ours: dict, rivals: dict) -> list[str]:
    cells = [str(docids.tokens_NxL.shape[1]), f"{ours['bytes']:.1f}", f"{ours['seconds']:.2f}"]
    for name, scale in (("dict", 1e6), ("static", None)):
        rival = rivals.get(name, "-")
        if isinstance(rival, str):
            cells += [rival, "-"]
        else:
            of = f" ({rival['docids']:,} docids)" if rival["docids"] < len(docids.tokens_NxL) else ""
            seconds = rival["seconds"] * (scale / rival["docids"] if scale else 1)
            cells += [f"{rival['bytes']:.1f}{of}", f"{seconds:.2f}"]
    return cells


def run_sizes(options: argparse.Namespace, console: Console) -> list[dict]:
    """What _building.py says of each kind and size."""
    table = Table(
        "docids", "passages", "bytes a docid", "GiB", "seconds", "building takes GiB", "steps' ratio"
    )
    rows = []
    for kind in options.kinds or ("naive_digits", "semantic", "rq_8x256"):
        measured = []
        for count in sorted(options.sizes):
            command = [sys.executable, str(Path(__file__).with_name("_building.py")), kind, str(count)]
            command += ["--steps", str(WHOLE_BATCH)]
            command += ["--vocabulary", str(options.vocabulary)] if options.vocabulary else []
            log(f"{kind}: {count:,} docids")
            made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured.append({"kind": kind, "docids": count} | json.loads(made.stdout))
        if measured[-1]["docids"] < MS_MARCO_V2:
            computed = {key: measured[-1][key] for key in ("kind", "bytes", "peak", "table")}
            measured.append(computed | {"docids": MS_MARCO_V2})
        for row in measured:
            size, peak = (f"{row['docids'] * row[key] / 2**30:.2f}" for key in ("bytes", "peak"))
            seconds, ratio = (f"{row[key]:.2f}" if key in row else "computed" for key in ("seconds", "steps"))
            table.add_row(kind, f"{row['docids']:,}", f"{row['bytes']:.1f}", size, seconds, peak, ratio)
        rows += measured
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few docids and repetitions: within a minute")
    parser.add_argument("--only", choices=("hf", "cost", "size", "base"))
    parser.add_argument("--kinds", nargs="+", help="those to measure; all")
    parser.add_argument("--docids", type=int, help="as many for every part")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of docids; nothing else is measured")
    parser.add_argument("--static", metavar="FOLDER", help="a checkout of youtube/static-constraint-decoding")
    parser.add_argument(
        "--vocabulary", type=Path, help="a SentencePiece model: cuts naive docids into its pieces"
    )
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # all else than hf uses the first
    repetitions = 3 if options.quick else 7
    count, hf_count = (
        options.docids or (QUICK_DOCIDS if options.quick else n) for n in (MS_MARCO, HF_DOCIDS)
    )
    console = Console(width=190)
    if options.sizes:
        return print(json.dumps({"sizes": run_sizes(options, console)}))
    console.print(f"on {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    figures = {"hf_speedup": dict.fromkeys(("naive_32k", "docid_vocabulary"))}
    if options.only in (None, "hf"):
        figures["hf_speedup"] |= run_hf(hf_count, options.vocabulary, 1 if options.quick else 5, console)
    figures |= run_kinds(options, count, repetitions, console)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
