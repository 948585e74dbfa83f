"""Do synthetic queries help where no one labelled any? MRR@10 with and without them.

    python benchmarks/doc2query.py --collection ../shared/data/squad_dev --work /tmp/doc2query/squad_dev

Some passages (a third, by a hash of their id) lose their labelled queries: their train queries are taken out,
and serve as dev queries; their test queries are the ones to answer (`test`), those of the other passages are
`covered`. On what is left, a doc2query T5 is trained from random weights and writes 10 queries for every
passage. Then generative retrievers with atomic docids are trained for equally many steps on the mixtures of
the paper's rows 2a and 3b (the passages' first tokens, without and with synthetic queries) and 2b and 3a
(chunks, without and with). BM25 is shown beside them, over the passages and over the passages with their
synthetic queries. Nothing is chosen on test queries.

Prints a table, then one line of JSON. Each step is a command of `retrieval-jax`; what is finished is kept in
--work and not made again.
"""

import argparse
import json
from pathlib import Path

from _verbs import run
from rich.console import Console
from rich.table import Table

from retrieval_jax.core import storage
from retrieval_jax.data.collection import Collection

HELD_OUT = 1 / 3
SHARES = {  # synthetic queries take their share from the passages; that of the labelled queries stays
    "2a": {"labelled": 0.3, "firstp": 0.7},
    "3b": {"labelled": 0.3, "firstp": 0.3, "d2q": 0.4},
    "2b": {"labelled": 0.3, "daq": 0.7},
    "3a": {"labelled": 0.3, "daq": 0.3, "d2q": 0.4},
}
METHODS = (*SHARES, "bm25", "bm25_doc2query")


def hold_out(whole: Collection, folder: Path) -> None:
    """Writes the collection (TSV layout) in which the held-out passages have no train query."""
    held = {i for i in whole.ids.to_pylist() if storage.hash_fraction(i) < HELD_OUT}

    def is_held(query) -> bool:
        return any(passage in held for passage in query.positives)

    train, test = [*whole.queries("train"), *whole.queries("dev")], whole.queries("test")
    splits = {
        "train": [q for q in train if not is_held(q)],
        "dev": [q for q in train if is_held(q)],
        "test": [q for q in test if is_held(q)],
        "covered": [q for q in test if not is_held(q)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "docs.tsv").open("w") as file:
        for p in whole.passages():
            print(p.id, " ".join(p.title.split()), " ".join(p.text.split()), sep="\t", file=file)
    for split, queries in splits.items():
        with (folder / f"queries.{split}.tsv").open("w") as file:
            for q in queries:
                print(q.id, " ".join(q.text.split()), sep="\t", file=file)
        with (folder / f"qrels.{split}.tsv").open("w") as file:
            for q in queries:
                for passage, grade in q.positives.items():
                    print(q.id, passage, grade, sep="\t", file=file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", required=True, help="a folder in BEIR or TSV layout")
    parser.add_argument("--work", required=True, type=Path, help="where everything goes")
    parser.add_argument("--generator_steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=800, help="of each retriever")
    parser.add_argument(
        "--filter_k", type=int, default=10, help="round-trip filter by BM25's first k; 0: none"
    )
    args = parser.parse_args()

    whole = args.work / "whole"
    run("import", f"--gin.COLLECTION={args.collection!r}", f"--gin.WORK_DIR={str(whole)!r}")
    source, work = args.work / "held_out", args.work / "work"
    if not (work / "collection").exists():
        hold_out(Collection(whole / "collection"), source)
    here = [f"--gin.COLLECTION={str(source)!r}", f"--gin.WORK_DIR={str(work)!r}"]
    run("import", *here)
    run("docids", *here, "--gin.DOCIDS='atomic'")
    run("index", *here)

    trained = {
        "doc2query": run("train", *here, "--gin_file=runs/doc2query.gin", f"--STEPS={args.generator_steps}")
    }
    filters = [
        f"--gin.generate_queries.filter_k={args.filter_k}",
        "--gin.generate_queries.filter_searcher='bm25'",
    ]
    made = run("generate-queries", *here, *(filters if args.filter_k else []))

    for name, shares in SHARES.items():
        model = str(work / "models" / name)
        settings = [f"--gin.MODEL_DIR={model!r}", f"--STEPS={args.steps}", "--gin.SYNTHETIC='doc2query'"]
        drops = dict.fromkeys(shares, 0.1)
        trained[name] = run(
            "train", *here, "--gin_file=runs/atomic.gin", *settings,
            f"--gin.DataConfig.mixture={shares}", f"--gin.DataConfig.token_dropout={drops}",
        )  # fmt: skip
        run(
            "index",
            *here,
            f"--gin.MODEL_DIR={model!r}",
            "--gin.make_index.kind='generative'",
            f"--gin.make_index.name={name!r}",
        )
    run("index", *here, "--gin.make_index.name='bm25_doc2query'", "--gin.make_index.expansion='doc2query'")

    results: dict[str, dict] = {}
    for split in ("test", "covered"):
        for name in METHODS:
            run("search", *here, f"--gin.SEARCHER={name!r}", f"--gin.SPLIT={split!r}")
        results[split] = run("evaluate", *here, f"--gin.SPLIT={split!r}")["metrics"]

    table = Table("method", "MRR@10", "Hits@10", "covered MRR@10", "Hits@10", title=args.collection)
    for name in METHODS:
        figures = [results[s][name][m] for s in ("test", "covered") for m in ("MRR@10", "Hits@10")]
        described = " + ".join(SHARES[name]) if name in SHARES else ""
        table.add_row(f"{name} {described}".strip(), *(f"{x:.3f}" for x in figures))
    Console(width=100).print(table)
    print(json.dumps({"generated": made, "trained": trained, "metrics": results}))


if __name__ == "__main__":
    main()
