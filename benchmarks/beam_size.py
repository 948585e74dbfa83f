"""How many beams does a model need, and what does the beam lose? MRR@10 and milliseconds a query, by beams.

    python benchmarks/beam_size.py --collection ../shared/data/squad_dev --work /tmp/beam_size/squad_dev
    python benchmarks/beam_size.py --work /tmp/beam_size/squad_dev --models rq_8x256 ripor_1

Models that are in --work already are named by --models. Without it, models are trained: a dual encoder for
the embeddings that semantic and residual-quantised docids are clustered from, then a tiny T5 from random
weights for each of --kinds of docids, all for equally many minutes.

Each model answers the same test queries with more and more beams; atomic docids need none. The last column is
what scoring every docid finds, for as many queries as --exhaustive says; the column before it is the largest
beam's figure on those same queries. Both are measured by log-probabilities and by logits, whatever the model
was trained for (`GenerativeRetriever.score`): --scores names those to measure. Nothing is chosen on test
queries.

Prints a table, then one line of JSON. Each step before the searches is a command of `retrieval-jax`, with the
bindings --gin.NAME=VALUE that are given here; what is finished is kept in --work and not made again. --quick
trains naive docids for a few steps, and searches for 32 queries.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import _quiet  # noqa: F401
import numpy as np
from _verbs import parse, run
from rich.console import Console
from rich.table import Table

from retrieval_jax.checkpoints.model_folder import LoadedModel, load_model
from retrieval_jax.core import storage
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.docids.search_strategies import STRATEGIES
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.evaluation.metrics import compute_metrics
from retrieval_jax.models.generative import SCORE_KINDS, GenerativeRetriever
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.search.searcher import RankedList

KINDS = ("atomic", "naive", "naive_digits", "semantic", "semantic_2d", "rq_8x256")
BEAMS = (1, 5, 10, 20, 40, 100, 200)
QUICK = {"kinds": ["naive"], "beams": [1, 10, 40], "steps": 40, "queries": 32, "exhaustive": 8}
BATCH_SIZE = 16
SHOWN = 10  # passages of a query that count


def train(work: Workspace, here: list[str], kinds: Sequence[str], steps: int, minutes: float) -> None:
    """Everything up to the trained models, each named by its kind of docids."""
    run("import", *here)
    limits = [f"--STEPS={steps}", f"--gin.train.max_minutes={minutes}", "--gin.train.eval_every=1000000"]
    encoder = repr(str(work.model("dual_encoder")))
    vectors = []
    if any(kind.startswith(("semantic", "rq")) for kind in kinds):
        run("train", *here, "--gin_file=runs/dual_encoder.gin", f"--gin.MODEL_DIR={encoder}", *limits)
        vectors = [f"--gin.EMBEDDINGS={encoder}"]
    for kind in kinds:
        run("docids", *here, f"--gin.DOCIDS={kind!r}", *vectors)
        file = "runs/atomic.gin" if kind == "atomic" else "runs/naive.gin"
        run("train", *here, f"--gin_file={file}", f"--gin.DOCIDS={kind!r}", *limits)


def searcher(opened: LoadedModel, table: DocidTable, score: str, beams: int) -> GenerativeSearcher:
    """A searcher with a trained model, by one of SCORE_KINDS."""
    model, length = GenerativeRetriever(opened.model.config, score=score), opened.description["input_length"]
    return GenerativeSearcher(
        model, opened.params, table, opened.vocabulary, length, beams=beams, batch_size=BATCH_SIZE
    )


def measure(searching: GenerativeSearcher, queries: Sequence[Query]) -> dict:
    """MRR@10, and milliseconds a query without what compiling takes."""
    texts = [query.text for query in queries]
    searching.search(texts[:BATCH_SIZE], SHOWN)
    began = time.perf_counter()
    found = searching.search(texts, SHOWN)
    return {"MRR@10": mrr(queries, found), "ms": 1000 * (time.perf_counter() - began) / len(texts)}


def measure_all(searching: GenerativeSearcher, queries: Sequence[Query]) -> dict:
    """The same where every docid is scored: there is no search, each docid is read to its end."""
    ids, found = searching.table.passage_ids.to_pylist(), []
    first = [query.text for query in queries[:BATCH_SIZE]]
    searching.score(first, [ids] * len(first))  # compiles
    began = time.perf_counter()
    for first in range(0, len(queries), BATCH_SIZE):
        texts = [query.text for query in queries[first : first + BATCH_SIZE]]
        for scores in np.array(searching.score(texts, [ids] * len(texts))):
            best = np.argsort(-scores, kind="stable")[:SHOWN].tolist()
            found.append([(ids[row], float(scores[row])) for row in best])
    return {"MRR@10": mrr(queries, found), "ms": 1000 * (time.perf_counter() - began) / len(queries)}


def mrr(queries: Sequence[Query], found: Sequence[RankedList]) -> float:
    """The mean reciprocal rank of the first positive among ten."""
    qrels = {query.id: query.positives for query in queries}
    return compute_metrics(qrels, {q.id: r for q, r in zip(queries, found, strict=True)})["MRR@10"]


def measure_model(
    opened: LoadedModel,
    table: DocidTable,
    score: str,
    *,
    queries: Sequence[Query],
    some: int,
    beams: list[int],
) -> dict:
    """A row of the table: by beams, and what scoring every docid finds for the first `some` queries."""
    figures, largest = {"by_beams": {}}, max(beams)
    for count in beams if STRATEGIES[table.search].prunes else [largest]:
        figures["by_beams"][count] = measure(searcher(opened, table, score, count), queries)
    searching = searcher(opened, table, score, largest)
    figures["largest_on_some"] = measure(searching, queries[:some])
    figures["all_docids"] = measure_all(searching, queries[:some])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", help="to train on: a folder in BEIR or TSV layout, or a name")
    parser.add_argument("--work", required=True, type=Path, help="where everything goes")
    parser.add_argument(
        "--models", nargs="+", help="generative models in --work, by the names of their folders"
    )
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="of docids, whose models are trained")
    parser.add_argument("--scores", nargs="+", default=SCORE_KINDS, choices=SCORE_KINDS)
    parser.add_argument("--beams", nargs="+", type=int, default=BEAMS)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--minutes", type=float, default=5, help="of training a model, at most")
    parser.add_argument("--queries", type=int, default=512, help="test queries, chosen by a hash of their id")
    parser.add_argument(
        "--exhaustive", type=int, default=128, help="of them, for which all docids are scored"
    )
    parser.add_argument("--quick", action="store_true", help="little of everything")
    args, bindings = parse(parser)
    if args.quick:
        vars(args).update(QUICK)
    work = Workspace(args.work)
    here = [f"--gin.COLLECTION={args.collection!r}", f"--gin.WORK_DIR={str(args.work)!r}"]
    here += [f"--gin.{binding}" for binding in bindings]
    if not args.models:
        if not args.collection:
            parser.error("--collection or --models: nothing to search with")
        train(work, here, args.kinds, args.steps, args.minutes)

    collection = Collection(work.collection)
    queries = sorted(collection.queries("test"), key=lambda q: storage.hash_fraction(q.id))[: args.queries]
    some = len(queries[: args.exhaustive])
    results: dict[str, dict] = {}
    columns = ["model", "step", "score", *(f"{b} beams" for b in args.beams), f"{some} queries", "all docids"]
    shown = Table(*columns, title=f"{collection.name}: MRR@10 (milliseconds a query)")
    for name in args.models or args.kinds:
        opened = load_model(work.model(name))
        table = DocidTable.open(work.docids(opened.description["docids"]))
        results[name] = {"step": opened.step}
        for score in args.scores:
            log(f"{name}: {score}")
            figures = results[name][score] = measure_model(
                opened, table, score, queries=queries, some=some, beams=args.beams
            )
            cells = [figures["by_beams"].get(beams) for beams in args.beams]
            cells += [figures["largest_on_some"], figures["all_docids"]]
            cells = [f"{c['MRR@10']:.3f} ({c['ms']:.0f})" if c else "" for c in cells]
            shown.add_row(name, f"{opened.step:,}", score, *cells)
    Console(width=160).print(shown)
    print(json.dumps({"collection": collection.name, "queries": len(queries), "models": results}))


if __name__ == "__main__":
    main()
