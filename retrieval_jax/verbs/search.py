"""The verb `search`: a searcher answers the queries of a split (a run), or one question."""

import time
from pathlib import Path

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.evaluation.trec import write_qrels, write_run
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.search.searcher import BATCH_SIZE, Searcher, search_in_batches, searcher_manifest


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

    Args:
      source, work_dir: the collection, and where its work lies.
      name: the searcher, one of searchers/.
      split: the queries to answer.
      k: passages a query.
      query: a question to answer instead.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    folder = work.searcher(name)
    manifest = searcher_manifest(folder, collection)
    if query is not None:
        return search_one(collection, folder, query, k)
    path = work.run(name, split)
    facts = path.with_suffix(".json")
    recipe = {"searcher": manifest["recipe"], "collection": collection.fingerprint, "split": split, "k": k}
    if path.exists() and facts.exists():
        known = storage.read_json(facts, f"delete {facts}")
        if known["recipe"] == recipe and "summary" in known:
            return {"run": str(path), **known["summary"]}

    queries = collection.queries(split)
    texts = [q.text for q in queries]
    # Of a query that is a passage one more is sought, as evaluations leave the passage itself out.
    themselves = {query.id for query in queries if query.is_passage}
    sought = k + bool(themselves)
    searcher = Searcher.open(folder, make_mesh)
    searcher.search(texts[:BATCH_SIZE], sought)  # compiles; people wait for that once, not for every query
    began = time.monotonic()
    found = list(search_in_batches(searcher, texts, sought, f"search {name}"))
    summary = {
        "queries": len(queries),
        "ms_per_query": round(1000 * (time.monotonic() - began) / len(queries), 3),
        "fewer_than_k": sum(len(ranking) < k for ranking in found),
    }
    found = [r[: k + (q.id in themselves)] for q, r in zip(queries, found, strict=True)]
    if manifest.get("recall_target"):
        summary["recall"] = round(searcher.measured_recall(texts[:BATCH_SIZE], k), 4)
    if summary["fewer_than_k"]:
        log(f"{name}: fewer than {k} passages for {summary['fewer_than_k']} of {len(queries)} queries")
    write_qrels(work.qrels(split), {q.id: q.relevant or q.judgements for q in queries})
    facts.unlink(missing_ok=True)  # never the facts of another run
    write_run(path, {q.id: ranking for q, ranking in zip(queries, found, strict=True)}, name)
    known = {"kind": manifest["kind"], "parameters": manifest["parameters"], "summary": summary}
    storage.write_json(facts, {"recipe": recipe, **known})
    return {"run": str(path), **summary}


def search_one(collection: Collection, folder: Path, query: str, k: int) -> dict:
    """The passages that a searcher finds for one query, with their texts."""
    (ranking,) = Searcher.open(folder, make_mesh).search([query], k)
    if not ranking:
        log(f"{folder.name}: no passage was found for {query!r}")
    passages = collection.get(collection.find_rows([pid for pid, _ in ranking]).tolist())
    return {
        "query": query,
        "passages": [
            {"rank": rank, "id": p.id, "score": score, "title": p.title, "text": p.text}
            for rank, (p, (_, score)) in enumerate(zip(passages, ranking, strict=True), start=1)
        ],
    }
