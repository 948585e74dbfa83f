"""How do exact search, ScaNN and FAISS compare, in recall and speed?

    python benchmarks/vector_search.py FOLDER [--sizes 100k 1M] [--quick]

FOLDER is a collection in TSV layout, such as wordnet's 117,659 passages. No pretrained encoder is at hand, so
its passages and test queries become vectors by latent semantic analysis (768 singular vectors of a TF-IDF
matrix): real texts, whose vectors have a real spectrum and real neighbours. Of the 1M, the others are
mixtures of two of these. Every method gets the same queries in batches of 32 and the same threads, in a
process of its own, one after the other; build times are of one run, queries a second of the fastest of up to
five passes by the clock, and beside it by the time that their threads ran, which others on the machine
disturb less. FAISS takes part where it is installed (faiss-cpu). --quick takes 20,000 passages, 128
dimensions, and less than a minute. The last line is JSON: recall_at_100 and qps_over_exact by method and
size.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from _vector_rivals import measure
from _vectors import grow, latent_semantic_analysis, read
from rich.console import Console
from rich.table import Table

SIZES = {"100k": None, "1M": 1_000_000}  # vectors; None: the passages alone
BATCH, QUERIES, TUNING, SEED = 32, 512, 200, 0
OURS, FAISS = ("exact", "scann"), ("flat", "hnsw", "ivfpq")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collection", type=Path, help="a folder with docs.tsv.gz and queries.test.tsv.gz")
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=SIZES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--methods", nargs="+", default=[*OURS, *FAISS], choices=[*OURS, *FAISS])
    parser.add_argument("--seconds", type=float, default=4, help="of searching, for each row")
    parser.add_argument(
        "--most-seconds", type=float, default=300, help="of adding vectors to an index of FAISS's"
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=True)
    methods = [m for m in options.methods if m in OURS or importlib.util.find_spec("faiss")]
    if len(methods) < len(options.methods):
        console.print("faiss-cpu is not installed: its rows are left out")
    passages, queries = read(options.collection, "test")
    dimensions = 768
    if options.quick:
        passages, dimensions, options.sizes, options.seconds = passages[:20_000], 128, ["quick"], 0.5
        methods = [method for method in methods if method != "ivfpq"]
    began = time.monotonic()
    passages_NxE, queries_QxE = latent_semantic_analysis(passages, queries, dimensions, SEED)
    shuffled_QxE = np.random.default_rng(SEED).permutation(queries_QxE)
    queries_QxE, tuning_QxE = shuffled_QxE[:QUERIES], shuffled_QxE[QUERIES : QUERIES + TUNING]
    console.print(
        f"{len(passages_NxE):,} passages, {len(queries_QxE):,} queries × {dimensions}: "
        f"{time.monotonic() - began:.0f} s"
    )
    keys = ("recall_at_10", "recall_at_100", "qps", "qps_cpu", "qps_over_exact", "qps_over_exact_cpu")
    figures: dict[str, dict] = {key: {} for key in keys}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            count = SIZES.get(size) or len(passages_NxE)
            grow(passages_NxE, count, Path(folder) / "vectors.npy", SEED)
            np.save(Path(folder) / "queries.npy", queries_QxE)
            np.save(Path(folder) / "tuning.npy", tuning_QxE)
            table = Table(
                "method", "recall@10", "recall@100", "queries/s", "× exact", "× by CPU time", "built in s",
                "GB of files",
                title=f"{count:,} × {dimensions}, {options.threads} threads, batches of {BATCH}",
            )  # fmt: skip
            exact = None
            for method in ["exact", *(m for m in methods if m != "exact")]:
                found = measure(
                    method, Path(folder), threads=options.threads, batch=BATCH, seconds=options.seconds,
                    most_seconds=options.most_seconds,
                )  # fmt: skip
                if isinstance(found, str):
                    console.print(f"{method}: {found}")
                    table.add_row(method, found)
                    continue
                for name, row in found["rows"].items():
                    exact = exact or row
                    row |= {
                        f"qps_over_exact{way}": row[f"qps{way}"] / exact[f"qps{way}"] for way in ("", "_cpu")
                    }
                    table.add_row(
                        name, f"{row['recall_at_10']:.3f}", f"{row['recall_at_100']:.3f}",
                        f"{row['qps']:,.0f}", f"{row['qps_over_exact']:.1f}",
                        f"{row['qps_over_exact_cpu']:.1f}", f"{found['build_s']:.1f}",
                        f"{found['bytes'] / 1e9:.2f}",
                    )  # fmt: skip
                    for key, value in row.items():
                        figures[key].setdefault(name, {})[size] = round(value, 4)
                console.print(f"{size}: {method} done, {time.monotonic() - began:.0f} s")
            Console(width=130).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
