"""What does BM25 take, to index and to search, beside the library bm25s and beside Tantivy?

    python benchmarks/bm25.py FOLDER [--work WORK] [--passages N] [--only ours] [--quick]

The passages are those of an imported collection (WORK is its work folder), or of one like MS MARCO's that is
generated and imported in FOLDER (data_scale.py; 1,000,000 passages; 20,000 with --quick). All three get the
same terms of the same passages: ours is `BM25Searcher`, with a process for each core; bm25s's own `index` and
`retrieve` have one process; Tantivy (`pip install tantivy`; left out where it is not installed) writes by as
many threads as there are cores. Each step runs in a process of its own. The table: seconds to read, analyse
and index; seconds to open the index for a first query; queries a second (k = 100), of the collection's
queries and of the same without the 100 most frequent terms, which generated text has instead of stop words;
the peak of the resident memory of all processes, summed, which counts what is mapped of a file; the size on
disk. Ours and bm25s must give the same scores. The last line is JSON.
"""

import _quiet  # noqa: F401, I001
import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bm25s
import numpy as np
from data_scale import generate, measure
from rich.console import Console
from rich.table import Table

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.search.analysis import analyzer
from retrieval_jax.search.bm25 import BM25Searcher
from retrieval_jax.search.index_inputs import IndexInputs

K = 100
QUERIES = 300
FREQUENT = 100
METHODS = ("ours", "bm25s", "tantivy")
logging.getLogger("bm25s").setLevel(logging.ERROR)  # the library sets it to DEBUG when it is imported


def terms_of(work: Path) -> Iterator[list[str]]:
    analyze = analyzer()
    return (analyze(passage.full_text) for passage in Collection(work / "collection").passages())


def index_ours(work: Path, folder: Path) -> None:
    inputs = IndexInputs(Collection(work / "collection"), Workspace(work), folder)
    storage.build_once(
        folder, {}, lambda tmp: BM25Searcher.recipe(inputs) | (BM25Searcher.write(tmp, inputs) or {})
    )


def index_bm25s(work: Path, folder: Path) -> None:
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index([*terms_of(work)], show_progress=False)
    index.save(folder)


def tantivy_schema():
    import tantivy

    # Terms come as they are; documents have no position, and only their number is stored.
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("text", tokenizer_name="whitespace", index_option="freq")
    builder.add_unsigned_field("row", stored=True)
    return builder.build()


def index_tantivy(work: Path, folder: Path) -> None:
    import tantivy

    folder.mkdir()
    writer = tantivy.Index(tantivy_schema(), path=str(folder)).writer(1 << 30, os.cpu_count())
    for row, terms in enumerate(terms_of(work)):
        document = tantivy.Document()
        document.add_text("text", " ".join(terms))
        document.add_unsigned("row", row)
        writer.add_document(document)
    writer.commit()
    writer.wait_merging_threads()


def open_ours(folder: Path) -> Callable[[str], np.ndarray]:
    searcher = BM25Searcher.open(folder)
    return lambda query: np.array([score for _, score in searcher.search([query], K)[0]])


def open_bm25s(folder: Path) -> Callable[[str], np.ndarray]:
    index, analyze = bm25s.BM25.load(folder, mmap=True), analyzer()
    k = min(K, index.scores["num_docs"])
    return lambda query: index.retrieve([analyze(query)], k=k, show_progress=False).scores[0]


def open_tantivy(folder: Path) -> Callable[[str], np.ndarray]:
    import tantivy

    schema, analyze = tantivy_schema(), analyzer()
    searcher = tantivy.Index.open(str(folder)).searcher()

    def search(query: str) -> np.ndarray:
        terms = [tantivy.Query.term_query(schema, "text", term, "freq") for term in analyze(query)]
        query = tantivy.Query.boolean_query([(tantivy.Occur.Should, term) for term in terms])
        hits = searcher.search(query, K, count=False).hits
        _ = [searcher.doc(address)["row"] for _, address in hits]
        return np.array([score for score, _ in hits])

    return search


def run_step(step: str, method: str, work: Path, folder: Path) -> dict:
    """Does one step in this process; returns what it took."""
    started = time.perf_counter()
    if step == "index":
        globals()[f"index_{method}"](work, folder / method)
        return {"index_seconds": time.perf_counter() - started}
    search = globals()[f"open_{method}"](folder / method)
    search("")
    taken = {"open_seconds": time.perf_counter() - started}
    for name, queries in json.loads((folder / "queries.json").read_text()).items():
        scores = [search(query) for query in queries]  # reads the files for the first time
        np.save(folder / f"{method}.{name}.npy", np.concatenate(scores))
        started = time.perf_counter()
        for query in queries:
            search(query)
        taken[f"{name}_per_second"] = len(queries) / (time.perf_counter() - started)
    return taken


def write_queries(work: Path, folder: Path) -> None:
    """Writes the queries, as they are and without the most frequent terms."""
    index, analyze = BM25Searcher.open(folder / "ours").index, analyzer()
    most = np.argsort(-np.diff(index.starts))[:FREQUENT]
    frequent = {index.terms[int(column)].as_py() for column in most}
    collection = Collection(work / "collection")
    split = next(split for split in ("dev", "test", "train") if collection.query_counts.get(split))
    queries = [query.text for query in collection.queries(split)[:QUERIES]]
    rarer = [" ".join(w for w in text.split() if not frequent & {*analyze(w)}) for text in queries]
    storage.write_json(folder / "queries.json", {"queries": queries, "rarer": rarer})


def imported(folder: Path, passages: int) -> Path:
    """Returns the work folder of a generated collection."""
    source, work = folder / f"msmarco_like_{passages}", folder / f"work_{passages}"
    if not (source / "predicted_queries_sample001.txt").exists():
        generate(source, passages)
    verb = [sys.executable, "-m", "retrieval_jax.main", "import", "--json"]
    measure([*verb, f"--gin.COLLECTION='{source}'", f"--gin.WORK_DIR='{work}'"])
    return work


def show(found: dict[str, dict], passages: int) -> None:
    names = ("index_seconds", "index_gb", "open_seconds", "queries_per_second", "rarer_per_second")
    table = Table("", *names, "search_gb", "disk_gb", title=f"BM25, {passages:,} passages, k = {K}")
    for method, taken in found.items():
        table.add_row(method, *(f"{taken[name]:,.2f}" for name in (*names, "search_gb", "disk_gb")))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the indices are written")
    parser.add_argument("--work", type=Path, help="the work folder of an imported collection")
    parser.add_argument("--passages", type=int, default=1_000_000, help="of a generated one, without --work")
    parser.add_argument("--only", choices=METHODS, help="this one alone (as where bm25s needs 31 GB)")
    parser.add_argument("--quick", action="store_true", help="20,000 passages: within a minute")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work or imported(args.folder, 20_000 if args.quick else args.passages)
    folder = args.folder / f"bm25_{work.name}"
    if args.step:
        print(json.dumps(run_step(*args.step, work, folder)))
        return

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    methods = [m for m in METHODS if m != "tantivy" or importlib.util.find_spec("tantivy")]
    methods = ["ours", *([] if args.only == "ours" else [m for m in methods[1:] if args.only in (None, m)])]
    found: dict[str, dict] = {method: {} for method in methods}
    for step in ("index", "search"):
        for method in methods:
            command = [sys.executable, __file__, str(args.folder), "--work", str(work)]
            _, peak, taken = measure([*command, "--step", step, method])
            found[method] |= {f"{step}_gb": peak, **taken}
            files = [path for path in (folder / method).rglob("*") if path.is_file()]
            found[method]["disk_gb"] = sum(path.stat().st_size for path in files) / 1e9
        if step == "index":
            write_queries(work, folder)
    if "bm25s" in found:
        for name in ("queries", "rarer"):
            ours, theirs = (np.load(folder / f"{method}.{name}.npy") for method in ("ours", "bm25s"))
            np.testing.assert_array_equal(ours.astype(np.float32), theirs[theirs > 0])
    passages = Collection(work / "collection").passage_count
    show(found, passages)
    print(json.dumps({"passages": passages, "cores": os.cpu_count(), "k": K, **found}))


if __name__ == "__main__":
    main()
