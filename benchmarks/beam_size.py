"""How many beams does a kind of docids need? MRR@10 and milliseconds a query by the size of the beam.

    python benchmarks/beam_size.py --collection ../shared/data/squad_dev --work /tmp/beam_size/squad_dev

A dual encoder is trained for the embeddings that semantic and residual-quantised docids are clustered from.
Then a tiny T5 is trained from random weights for each kind of docids, all for equally many minutes, and
answers the same test queries with more and more beams; atomic docids need none. The last column is the
ceiling, what scoring every docid finds, for as many queries as --exhaustive says: the beam grows until what
it found lies above all it dropped; where --most beams are not enough (for how many queries is in brackets),
every docid is scored. The column before it is the largest beam's figure on those same queries. Nothing is
chosen on test queries.

Prints a table, then one line of JSON. Each step before the searches is a command of `retrieval-jax`, with the
bindings --gin.NAME=VALUE that are given here; what is finished is kept in --work and not made again.
"""

import argparse
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import _quiet  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
from _verbs import parse, run
from rich.console import Console
from rich.table import Table

from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core import storage
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Query
from retrieval_jax.data.records import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.evaluation.metrics import compute_metrics
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.search.searcher import RankedList

KINDS = ("atomic", "naive", "naive_digits", "semantic", "semantic_2d", "rq_8x256")
BEAMS = (1, 5, 10, 20, 40, 100, 200)
GROWTH = 5
DOCIDS_AT_ONCE = 256  # their keys and values stay in the cache
SHOWN = 10  # passages of a query that count


def train(work: Workspace, here: list[str], kinds: Sequence[str], steps: int, minutes: float) -> dict:
    """Everything up to the trained models: name -> what training came to."""
    run("import", *here)
    limits = [f"--STEPS={steps}", f"--gin.train.max_minutes={minutes}", "--gin.train.eval_every=1000000"]
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


def searcher(work: Workspace, kind: str, beams: int, batch_size: int) -> GenerativeSearcher:
    """The trained retriever of a kind."""
    opened = load_model(work.model(kind))
    table = DocidTable.open(work.docids(kind))
    length = opened.description["input_length"]
    return GenerativeSearcher(
        opened.model, opened.params, table, opened.vocabulary, length, beams, batch_size
    )


def measure(searching: GenerativeSearcher, queries: Sequence[Query]) -> tuple[float, float]:
    """(MRR@10, milliseconds a query) without what compiling takes."""
    texts = [query.text for query in queries]
    searching.search(texts[: searching.batch_size], SHOWN)
    began = time.perf_counter()
    found = searching.search(texts, SHOWN)
    took = 1000 * (time.perf_counter() - began) / len(texts)
    qrels = {query.id: query.positives for query in queries}
    return compute_metrics(qrels, {q.id: r for q, r in zip(queries, found, strict=True)})["MRR@10"], took


def ceiling(work: Workspace, kind: str, queries: Sequence[Query], beams: int, most: int) -> dict:
    """What scoring every docid would find: MRR@10, and for how many queries every docid was scored.

    A query's beam grows, from `beams` to `most`, until its first ten passages lie above the search's bound;
    where they never do, every docid is scored.
    """
    found, left = {}, list(queries)
    while left and beams <= most:
        searching = searcher(work, kind, beams, 1)
        decode = jax.jit(functools.partial(searching.model.predict_batch_with_aux, beams=beams))
        uncertain = []
        for query in left:
            tokens = searching.vocabulary.batch([query.text], searching.input_length)
            rows, aux = decode(searching.params, {"encoder_input_tokens": tokens}, trie=searching.docids)
            ranking = searching.ranked_list(np.asarray(rows[0]), np.asarray(aux["scores"][0]).tolist())
            found[query.id] = ranking[:SHOWN]
            if ranking[:SHOWN][-1][1] <= float(aux["pruned_upper_bound"][0]):
                uncertain.append(query)
        log(f"{kind}, {beams:,} beams: {len(left) - len(uncertain)} of {len(left)} queries are certain")
        left, beams = uncertain, GROWTH * beams
    if left:
        log(f"{kind}: every docid for {len(left)} queries")
        searching = searcher(work, kind, 1, 1)
        found |= {query.id: rank_all(searching, query.text) for query in left}
    qrels = {query.id: query.positives for query in queries}
    return {"MRR@10": compute_metrics(qrels, found)["MRR@10"], "every_docid": len(left)}


def rank_all(searching: GenerativeSearcher, query: str) -> RankedList:
    """The ten passages of highest log-probability of all; no search, each docid is read to its end."""
    inputs_1xS = searching.vocabulary.batch([query], searching.input_length)
    tokens_NxL = np.asarray(searching.table.tokens_NxL, np.int32)
    N, L = tokens_NxL.shape
    tokens_CxKxL = np.pad(tokens_NxL, ((0, -N % DOCIDS_AT_ONCE), (0, 0))).reshape(-1, DOCIDS_AT_ONCE, L)
    scores = log_probabilities(searching.model, searching.params, inputs_1xS, tokens_CxKxL)
    score_N = np.asarray(scores).reshape(-1)[:N]
    best = np.argsort(-score_N, kind="stable")[:SHOWN]
    return [(searching.table.passage_ids[row].as_py(), score_N[row].item()) for row in best.tolist()]


@functools.partial(jax.jit, static_argnames="model")
def log_probabilities(model: GenerativeRetriever, params: dict, inputs_1xS, tokens_CxKxL) -> jax.Array:
    """Of docids (padded with 0), K at once: sums of their tokens' log-probabilities, C×K."""
    apply = functools.partial(model.decode_module.apply, model.decode_variables(params))
    _, K, L = tokens_CxKxL.shape
    cross_kv, empty = apply(inputs_1xS, K, L, method="prefill")

    def read(tokens_KxL: jax.Array) -> jax.Array:
        newest_K, total_K, cache = jnp.zeros(K, jnp.int32), jnp.zeros(K), empty
        for position, token_K in enumerate(tokens_KxL.T):
            x_1xKxE, cache = apply(
                newest_K[None], position, cache, cross_kv, inputs_1xS, method="decode_step"
            )
            logits_KxV = apply(x_1xKxE, method="logits")[0]
            chosen_K = jnp.take_along_axis(logits_KxV, token_K[:, None], axis=1)[:, 0]
            total_K += jnp.where(token_K > 0, chosen_K - jax.nn.logsumexp(logits_KxV, axis=1), 0.0)
            newest_K = token_K
        return total_K

    return jax.lax.map(read, tokens_CxKxL)


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
    parser.add_argument("--most", type=int, default=5_000, help="beams of the ceiling's search, at most")
    args, bindings = parse(parser)
    work = Workspace(args.work)
    here = [f"--gin.COLLECTION={args.collection!r}", f"--gin.WORK_DIR={str(args.work)!r}"]
    here += [f"--gin.{binding}" for binding in bindings]
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
            log(f"{kind}, {beams} beams: MRR@10 {mrr:.3f}, {took:.1f} ms")
        figures["largest_on_some"], _ = measure(searcher(work, kind, largest, 16), some)
        if kind == "atomic":  # whose search scores every docid
            scored = {"MRR@10": figures["largest_on_some"], "every_docid": len(some)}
        else:
            scored = ceiling(work, kind, some, largest, min(args.most, collection.passage_count))
        figures["all_docids"] = scored
        log(f"{kind}, all docids: MRR@10 {scored['MRR@10']:.3f}")

    columns = ["docids", "steps", *(f"{b} beams" for b in args.beams), f"{len(some)} queries", "all docids"]
    table = Table(*columns, title=f"{collection.name}: MRR@10 (milliseconds a query)")
    for kind, figures in results.items():
        cells = [figures["by_beams"].get(beams) for beams in args.beams]
        shown = [f"{c['MRR@10']:.3f} ({c['ms']:.0f})" if c else "" for c in cells]
        scored = figures["all_docids"]
        last = (f"{figures['largest_on_some']:.3f}", f"{scored['MRR@10']:.3f} ({scored['every_docid']})")
        table.add_row(kind, f"{figures['steps']:,}", *shown, *last)
    Console(width=150).print(table)
    print(json.dumps({"collection": collection.name, "queries": len(queries), "kinds": results}))


if __name__ == "__main__":
    main()
