"""Does a fused searcher find more than the best of its parts? nDCG@10 of test queries, with a paired test.

    python benchmarks/fusion.py ../shared/data/squad_dev ../shared/data/tldr --work /tmp/fusion --minutes 8

For each collection (a folder, or python_docs) a dual encoder is trained from random weights, unless --work
has it already. BM25 and the dual encoder's exact search are fused with what `index` chooses on dev queries,
and BM25's passages are re-ranked; test queries are never read before the searchers are finished. The
difference is that of the means to the part that is best on these test queries, with its 95% confidence
interval, and p the paired randomisation test's after Holm's correction (evaluation/significance.py). --kinds
adds generative retrievers of such docids to the parts, and --unstemmed BM25 without stemmer and stop words.
ms is the median over single queries, queries/s the throughput in batches of 32.

Prints a table, then one line of JSON. Each step is a command of `retrieval-jax`, with the bindings
--gin.NAME=VALUE that are given here; what is finished is kept in --work and not made again.
"""

import argparse
import json
from pathlib import Path

import _quiet  # noqa: F401
import numpy as np
from _measure import values_of_queries
from _verbs import parse, run
from rich.console import Console
from rich.table import Table

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.evaluation import significance

FUSED = {"fused": "None", "reranked": "'rerank'"}  # name -> make_index.fusion


def make_searchers(
    here: list[str], work: Workspace, minutes: float, kinds: list[str], unstemmed: bool
) -> dict[str, dict]:
    """Everything up to the runs of the test queries: name of a searcher -> what `index` told."""
    run("import", *here)
    limits = [f"--gin.train.max_minutes={minutes}"]
    model = f"--MODEL_DIR={work.model('dual_encoder')}"
    run("train", *here, "--gin_file=runs/dual_encoder.gin", model, *limits)
    made = {"bm25": run("index", *here)}
    if unstemmed:
        plain = ["--gin.make_index.language=None", "--gin.make_index.name='bm25_unstemmed'"]
        made["bm25_unstemmed"] = run("index", *here, *plain)
    made["exact"] = run("index", *here, model, "--gin.make_index.kind='exact'")
    for kind in kinds:
        file, docids = "runs/atomic.gin" if kind == "atomic" else "runs/naive.gin", f"--DOCIDS={kind}"
        embeddings = f"--EMBEDDINGS={work.model('dual_encoder')}"
        run("docids", *here, docids, *([] if kind in ("atomic", "naive", "naive_digits") else [embeddings]))
        run("train", *here, f"--gin_file={file}", docids, *limits)
        made[kind] = run("index", *here, f"--MODEL_DIR={work.model(kind)}")
    parts = tuple(made)
    for name, method in FUSED.items():
        fused = ["kind='fused'", f"name={name!r}", f"parts={parts!r}", f"fusion={method}"]
        made[name] = run("index", *here, *(f"--gin.make_index.{setting}" for setting in fused))
    for name in made:
        made[name] |= run("search", *here, f"--SEARCHER={name}", "--SPLIT=test")
    return made


def compare(made: dict[str, dict], values: dict[str, np.ndarray]) -> dict[str, dict]:
    """The figures of each searcher; of the fused ones also the difference to the best of the others."""
    alone = max((name for name in made if name not in FUSED), key=lambda name: values[name].mean())
    differences = significance.compare(values[alone], {name: values[name] for name in FUSED})
    figures = {}
    for name, facts in made.items():
        figures[name] = {"nDCG@10": float(values[name].mean())}
        figures[name] |= {key: facts[key] for key in ("queries_per_second", "single_query_ms")}
        if name in differences:
            figures[name] |= {
                "fused_by": facts["fused_by"],
                "dev": facts.get("fitted", {}).get("nDCG@10"),
                "over": alone,
                "difference": differences[name].mean,
                "interval": [differences[name].low, differences[name].high],
                "p": differences[name].p_holm,
            }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collections", nargs="*", default=["python_docs"])
    parser.add_argument("--work", required=True, type=Path, help="the work folders go here")
    parser.add_argument("--minutes", type=float, default=8, help="of training a model, at most")
    parser.add_argument("--kinds", nargs="*", default=[], help="docids of generative retrievers to fuse, too")
    parser.add_argument("--unstemmed", action="store_true", help="BM25 of words as they are is a part, too")
    parser.add_argument(
        "--quick", action="store_true", help="300 passages, 60 steps: ends within a minute or two"
    )
    args, bindings = parse(parser)
    if args.quick:
        args.collections = ["python_docs"]
        bindings = ["STEPS=60", "import_collection.docs_size=300", *bindings]
        bindings += ["import_collection.docs_packages=('optax', 'rich')", "import_collection.vocab_size=2000"]
    results = {}
    for source in args.collections:
        work = Workspace(args.work / Path(source).name)
        here = [f"--gin.COLLECTION={source!r}", f"--gin.WORK_DIR={str(work.folder)!r}"]
        here += [f"--gin.{binding}" for binding in bindings]
        made = make_searchers(here, work, args.minutes, args.kinds, args.unstemmed)
        results[work.folder.name] = compare(made, values_of_queries(work, made))

    headings = ("searcher", "nDCG@10", "difference", "95%", "p", "ms", "queries/s", "method, weights, depth")
    table = Table("collection", *headings)
    for name, figures in results.items():
        for searcher, figure in figures.items():
            fused = figure.get("fused_by")
            chosen = (
                [fused["method"], *(f"{w:g}" for w in fused["weights"]), str(fused["depth"])] if fused else []
            )
            compared = [""] * 3
            if fused:
                interval = " to ".join(f"{end:+.3f}" for end in figure["interval"])
                compared = [f"{figure['difference']:+.3f}", interval, f"{figure['p']:.1e}"]
            times = [f"{figure['single_query_ms']:.2f}", f"{figure['queries_per_second']:,.0f}"]
            row = [name, searcher, f"{figure['nDCG@10']:.3f}", *compared, *times]
            table.add_row(*row, " ".join(chosen))
    Console(width=130).print(table)
    print(json.dumps({"fusion": results}))


if __name__ == "__main__":
    main()
