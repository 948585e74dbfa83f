"""The verb `search`: a searcher answers the queries of a split (a run), or one question."""

import functools
from collections.abc import Callable

import gin

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import variations
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.trec import write_qrels
from retrieval_jax.evaluation import runs
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.search.batched import BATCH_SIZE, search_queries, search_texts, single_query_ms
from retrieval_jax.search.manifest import searcher_manifest
from retrieval_jax.search.searcher import Searcher


@gin.configurable
def search(
    source: str,
    work_dir: str | None = None,
    name: str = "bm25",
    split: str = "test",
    k: Positive = 100,
    query: str | None = None,
) -> dict:
    """Writes runs/NAME.SPLIT.trec, or answers one query.

    Beside the run lies NAME.SPLIT.json, which tells two times apart: "queries_per_second" is the throughput
    in batches of 32 queries, "single_query_ms" the latency, the median over single queries (of variations it
    is not measured).
    For a generative searcher it also has "certain": the share of the queries whose first passage is proven to
    be the one that scoring every docid would rank first, and which these are.
    With a SPLIT of test~all, the queries and all variations of them that `vary` made are searched for.
    In several processes (multihost.*) each holds its part of the vectors, and what they find is merged.

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      name: the searcher, one of searchers/.
      split: the queries to search for; also a variation that `vary` made, as test~typo, or test~all.
      k: passages to find for each query.
      query: a question to answer instead.

    Returns:
      The run and its summary, or, of test~all, those of each split (`runs`); of a query, its passages.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    if query is not None:
        folder = work.searcher(name)
        searcher_manifest(folder, collection)  # raises where it is not of this collection
        passages = search_texts(Searcher.open(folder, make_partitioner), collection, query, k)
        if not passages:
            log(f"{name}: no passage was found for {query!r}")
        return {"query": query, "passages": passages}

    # One searcher for all, which compiles once; it opens at the first run that is not there.
    opened = functools.cache(functools.partial(Searcher.open, work.searcher(name), make_partitioner))
    splits = variations.expand(work, split)
    # The split itself comes last: measuring the latency leaves the searcher with batches of one.
    runs_of = {one: _run(work, collection, name, one, k, opened) for one in reversed(splits)}
    return runs_of.get(split, {"runs": {one: runs_of[one] for one in splits}})


def _run(
    work: Workspace, collection: Collection, name: str, split: str, k: int, opened: Callable[[], Searcher]
) -> dict:
    """Makes the run of a split, unless it is there; gives its path and its summary."""
    folder = work.searcher(name)
    manifest = searcher_manifest(folder, collection)
    path = work.run(name, split)
    read = collection.recipe(variations.base(split))
    recipe = {"searcher": manifest["recipe"], **read, "split": split, "k": k}
    if variation := variations.fingerprint(work, split):
        recipe["variation"] = variation
    facts = runs.read_facts(path) if path.exists() else {}
    if facts is None:
        raise UserError(
            f"{path}: is another tool's run, or was changed since: give it another name, or delete it"
        )
    # Runs of earlier versions lack the latency, and which queries are certain.
    known = facts.get("summary", {})
    whole = (variation or "single_query_ms" in known) and ("certain" in known) == ("certain" in facts)
    made = whole and facts.get("recipe") == recipe
    if multihost.broadcast_from_process_0(bool(made)):
        return {"run": str(path), **runs.read_facts(path)["summary"]}

    queries = variations.split_queries(work, collection, split)
    searcher = opened()
    run, summary, certain = search_queries(searcher, queries, k, f"search {name}")
    texts = [query.text for query in queries]
    if manifest.get("recall_target"):
        summary["recall"] = round(searcher.measured_recall(texts[:BATCH_SIZE], k), 4)
    if not variation:
        summary["single_query_ms"] = single_query_ms(searcher, texts, k)
    if summary["fewer_than_k"]:
        log(f"{name}: fewer than {k} passages for {summary['fewer_than_k']} of {len(queries)} queries")
    facts = {key: manifest[key] for key in ("kind", "family", "parameters")}
    facts |= {} if certain is None else {"certain": certain}

    def write() -> None:
        write_qrels(work.qrels(split), {q.id: q.judgements for q in queries})
        runs.write_run_with_facts(path, run, name, {"recipe": recipe, **facts, "summary": summary})

    multihost.on_process_0(write)
    return {"run": str(path), **summary}
