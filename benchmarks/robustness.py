"""What makes a dual encoder robust to other wordings? nDCG@10 of varied test queries, with a paired test.

    python benchmarks/robustness.py ../shared/data/squad_dev --work /tmp/robustness --steps 600

On one collection (a folder, or python_docs) dual encoders are trained from random weights: on the queries as
they are; on queries of which half have a typo (DataConfig.typos); and on queries as they are whose scores
their copies with typos learn (DualEncoder.self_teaching_weight). These two differ in more than the loss: the
copies have a typo in every query, and a step encodes each query twice. Beside them: BM25, and the first
encoder asked with three wordings of each query, whose ranked lists are fused with equal weights. Nothing is
chosen by these figures. All of them answer the test queries and their variations.

A cell is the mean nDCG@10; ▲▼ mark what differs from the first encoder on the same queries (paired
randomisation test, Holm over the methods and kinds of the table, p <= .05). Prints a table, then one line of
JSON. What is finished is kept in --work and not made again.
"""

import argparse
import json
from pathlib import Path

import _quiet  # noqa: F401
from _measure import values_of_queries
from _verbs import parse
from rich.console import Console
from rich.table import Table

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.evaluation import significance
from retrieval_jax.evaluation.method_table import mark
from retrieval_jax.main import run

KINDS = ("typo", "no_stop_words", "drop_words", "shuffle")
COPIES = ["DataConfig.typos=1.0", "DataConfig.typo_copies=True", "DualEncoder.self_teaching_weight=1.0"]
TRAININGS = {"plain": [], "typos": ["DataConfig.typos=0.5"], "self_taught": COPIES}  # name -> settings
FUSED = ("plain", "plain~no_stop_words", "plain~drop_words")


def make_searchers(here: list[str], work: Workspace) -> list[str]:
    """Everything up to the searchers; gives their names."""
    run("import", [], here)
    run("index", [], here)
    for name, settings in TRAININGS.items():
        model = f"MODEL_DIR={work.model(name)}"
        run("train", ["runs/dual_encoder.gin"], [*here, model, *settings])
        run("index", [], [*here, model, "make_index.kind='exact'", f"make_index.name={name!r}"])
    fused = ["kind='fused'", "name='fused'", f"parts={FUSED!r}", "fusion='min_max'", "weights=(1, 1, 1)"]
    run("index", [], [*here, *(f"make_index.{setting}" for setting in fused)])
    return ["bm25", *TRAININGS, "fused"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collection", nargs="?", default="python_docs")
    parser.add_argument("--work", required=True, type=Path, help="the work folder")
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--quick", action="store_true", help="300 passages, 30 steps: ends within a minute")
    args, bindings = parse(parser)
    if args.quick:
        args.collection, args.steps = "python_docs", 30
        bindings = ["import_collection.docs_size=300", "import_collection.vocab_size=2000", *bindings]
        bindings = ["T5Config.num_encoder_layers=0", *bindings]
        bindings = ["import_collection.docs_packages=('optax', 'rich')", *bindings]
    work = Workspace(args.work)
    here = [f"COLLECTION={args.collection}", f"WORK_DIR={args.work}", f"STEPS={args.steps}", *bindings]
    names = make_searchers(here, work)
    run("vary", [], [*here, f"vary.kinds={KINDS!r}"])
    for name in names:
        run("search", [], [*here, f"SEARCHER={name}", "SPLIT=test~all"])
    splits = {"as they are": "test", **{kind: f"test~{kind}" for kind in KINDS}}
    values = {label: values_of_queries(work, names, split=split) for label, split in splits.items()}
    systems = {
        (label, name): of[name] - of["plain"]
        for label, of in values.items()
        for name in names
        if name != "plain"
    }
    zero = 0 * values["as they are"]["plain"]
    found = significance.compare(zero, systems)
    table = Table("queries", *names)
    results = {}
    for label, of in values.items():
        cells = []
        for name in names:
            difference = found.get((label, name))
            cells.append(f"{mark(difference)}{of[name].mean():.3f}")
            results.setdefault(label, {})[name] = {"nDCG@10": float(of[name].mean())}
            if difference is not None:
                results[label][name] |= {"difference": difference.mean, "p": difference.p_holm}
        table.add_row(label, *cells)
    Console(width=130).print(table)
    print(json.dumps({"robustness": {"collection": Path(args.collection).name, "ndcg": results}}))


if __name__ == "__main__":
    main()
