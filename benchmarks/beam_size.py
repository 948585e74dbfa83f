"""How many beams does a kind of docids need? MRR@10 and milliseconds a query by the size of the beam.

    python benchmarks/beam_size.py --collection ../shared/data/squad_dev --work /tmp/beam_size/squad_dev

A dual encoder is trained for the embeddings that semantic and residual-quantised docids are clustered from.
Then a tiny T5 is trained from random weights for each kind of docids, all for equally many minutes, and
answers the same test queries with more and more beams; atomic docids need none. The last column is the
ceiling: every docid is scored (the beam holds them all), for as many queries as --exhaustive says; the column
before it is the largest beam's figure on those same queries. Nothing is chosen on test queries.

Prints a table, then one line of JSON. Each step before the searches is a command of `retrieval-jax`; what is
finished is kept in --work and not made again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from _verbs import run
from rich.console import Console
from rich.table import Table

from retrieval_jax import storage
from retrieval_jax.data.collection import Query
from retrieval_jax.data.records import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.evaluation.metrics import score
from retrieval_jax.progress import quiet_libraries, say
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.training.model_folder import open_model
from retrieval_jax.work import Work

KINDS = ("atomic", "naive", "naive_digits", "semantic", "semantic_2d", "rq_8x256")
BEAMS = (1, 5, 10, 20, 40, 100, 200)


def train(work: Work, here: list[str], kinds: Sequence[str], steps: int, minutes: float) -> dict:
    """Everything up to the trained models: name -> what training came to."""
    run("import", *here)
    limits = [f"--gin.STEPS={steps}", f"--gin.train.max_minutes={minutes}", "--gin.train.eval_every=1000000"]
    encoder = repr(str(work.model("dual_encoder")))
    trained = {
        "dual_encoder": run(
            "train", *here, "--gin_file=runs/dual_encoder.gin", f"--gin.MODEL_DIR={encoder}", *limits
        )
    }
    for kind in kinds:
        run("docids", *here, f"--gin.DOCIDS={kind!r}", f"--gin.EMBEDDINGS={encoder}")
        file = "runs/atomic.gin" if kind == "atomic" else "runs/naive.gin"
        trained[kind] = run("train", *here, f"--gin_file={file}", f"--gin.DOCIDS={kind!r}", *limits)
    return trained


def searcher(work: Work, kind: str, beams: int, batch_size: int) -> GenerativeSearcher:
    """The trained retriever of a kind."""
    opened = open_model(work.model(kind))
    table = DocidTable.open(work.docids(kind))
    length = opened.description["input_length"]
    return GenerativeSearcher(
        opened.model, opened.params, table, opened.vocabulary, length, beams, batch_size
    )


def measure(searching: GenerativeSearcher, queries: Sequence[Query]) -> tuple[float, float]:
    """(MRR@10, milliseconds a query) without what compiling takes."""
    texts = [query.text for query in queries]
    searching.search(texts[: searching.batch_size], 10)
    began = time.perf_counter()
    found = searching.search(texts, 10)
    took = 1000 * (time.perf_counter() - began) / len(texts)
    qrels = {query.id: query.positives for query in queries}
    return score(qrels, {q.id: r for q, r in zip(queries, found, strict=True)})["MRR@10"], took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", required=True, help="a folder in BEIR or TSV layout")
    parser.add_argument("--work", required=True, type=Path, help="where everything goes")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--beams", nargs="+", type=int, default=BEAMS)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--minutes", type=float, default=5, help="of training a model, at most")
    parser.add_argument("--queries", type=int, default=512, help="test queries, chosen by a hash of their id")
    parser.add_argument(
        "--exhaustive", type=int, default=128, help="of them, for which all docids are scored"
    )
    args = parser.parse_args()
    quiet_libraries()
    work = Work(args.work)
    here = [f"--gin.COLLECTION={args.collection!r}", f"--gin.WORK_DIR={str(args.work)!r}"]
    trained = train(work, here, args.kinds, args.steps, args.minutes)

    collection = Collection(work.collection)
    queries = sorted(collection.queries("test"), key=lambda q: storage.hash_fraction(q.id))[: args.queries]
    some = queries[: args.exhaustive]
    largest = max(args.beams)
    results: dict[str, dict] = {}
    for kind in args.kinds:
        figures = results[kind] = {"steps": trained[kind]["step"], "by_beams": {}}
        for beams in [largest] if kind == "atomic" else args.beams:
            mrr, took = measure(searcher(work, kind, beams, 16), queries)
            figures["by_beams"][beams] = {"MRR@10": mrr, "ms": took}
            say(f"{kind}, {beams} beams: MRR@10 {mrr:.3f}, {took:.1f} ms")
        figures["largest_on_some"], _ = measure(searcher(work, kind, largest, 16), some)
        figures["all_docids"], took = measure(searcher(work, kind, collection.passage_count, 1), some)
        say(f"{kind}, all docids: MRR@10 {figures['all_docids']:.3f}, {took:.0f} ms")

    columns = ["docids", "steps", *(f"{b} beams" for b in args.beams), f"{len(some)} queries", "all docids"]
    table = Table(*columns, title=f"{collection.name}: MRR@10 (milliseconds a query)")
    for kind, figures in results.items():
        cells = [figures["by_beams"].get(beams) for beams in args.beams]
        shown = [f"{c['MRR@10']:.3f} ({c['ms']:.0f})" if c else "" for c in cells]
        last = (f"{figures[key]:.3f}" for key in ("largest_on_some", "all_docids"))
        table.add_row(kind, f"{figures['steps']:,}", *shown, *last)
    Console(width=150).print(table)
    print(json.dumps({"collection": collection.name, "queries": len(queries), "kinds": results}))


if __name__ == "__main__":
    main()
