"""Sources that are not a folder: the embedded `python_docs` and the datasets of ir_datasets.

Each one is written to a scratch folder in BEIR's layout and imported from there, so that one reader checks
all.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError, first_line
from retrieval_jax.core.progress import log, track
from retrieval_jax.core.workspace import PYTHON_DOCS
from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources.folders import Source, dataset_name
from retrieval_jax.data.sources.judged import FindRows
from retrieval_jax.data.sources.layouts import open_source
from retrieval_jax.data.sources.lines import ErrorLog
from retrieval_jax.data.sources.passages import Passages
from retrieval_jax.data.sources.python_docs import python_docs

IR_DATASETS = "ir_datasets:"


def open_any_source(source: str, docs_size: int, docs_packages: tuple[str, ...]) -> Source:
    """Opens a source by its name: `python_docs`, `ir_datasets:ID` or `ir_datasets:ID,ID`, or a local folder.

    Args:
      source: the name.
      docs_size: the most passages of `python_docs`.
      docs_packages: the packages that `python_docs` reads.

    Returns:
      The source, of which no passage is read yet.

    Raises:
      UserError: there is no such source, or it lacks a file.
    """
    if source == PYTHON_DOCS:
        return python_docs_source(docs_size, docs_packages)
    if source.startswith(IR_DATASETS):
        return ir_datasets_source(source.removeprefix(IR_DATASETS))
    paths.require_local(source, "a source")
    return open_source(paths.as_path(source))


def python_docs_source(size: int, packages: tuple[str, ...]) -> Source:
    """Returns the source `python_docs`: of its queries 80% train, 10% dev and 10% test, by a hash of the id.

    Args:
      size: the most passages.
      packages: the packages whose documentation is read.
    """

    def split(query: Query) -> str:
        fraction = storage.hash_fraction(query.id)
        return "train" if fraction < 0.8 else "dev" if fraction < 0.9 else "test"

    def write(folder: Path) -> None:
        log("reading the docstrings of the installed packages (half a minute)")
        passages, queries = python_docs(size, packages=packages)
        _write(
            folder,
            passages,
            {q.id: q.text for q in queries},
            ((split(q), q.id, q.positives) for q in queries),
        )

    return _exported(PYTHON_DOCS, write)


def ir_datasets_source(ids: str) -> Source:
    """Returns datasets of ir_datasets, which downloads what is not on this machine yet.

    A split is named by what its id adds to the corpus's id: msmarco-passage/dev/small is `dev_small` (see
    `folders.find_splits`); what is no letter or digit becomes _. It is `test` if it adds nothing.

    Args:
      ids: `ID` or `ID,ID,…`, which are splits of one corpus.

    Raises:
      UserError: there is no such dataset, it lacks queries or judgements, or the package is not installed.
    """
    try:
        import ir_datasets
    except ImportError:
        hint = "pip install 'retrieval_jax[ir_datasets]'"
        raise UserError(f"{IR_DATASETS}{ids}: the package ir_datasets is not installed: {hint}") from None
    names = ids.split(",")
    with _readable(ids):
        datasets = {name: ir_datasets.load(name) for name in names}
        corpora = {ir_datasets.docs_parent_id(name) for name in names}
    if len(corpora) != 1:
        raise UserError(f"{IR_DATASETS}{ids}: these have different passages: name splits of one corpus")
    (corpus,) = corpora
    for name, dataset in datasets.items():
        if not (dataset.has_docs() and dataset.has_queries() and dataset.has_qrels()):
            hint = "name one that has all three, e.g. msmarco-passage/train"
            raise UserError(f"{IR_DATASETS}{name}: it lacks passages, queries or qrels: {hint}")

    def write(folder: Path) -> None:
        with _readable(ids):
            first = datasets[names[0]]
            passages = track(map(_passage, first.docs_iter()), "reading passages", first.docs_count())
            queries = {q.query_id: q.default_text() for d in datasets.values() for q in d.queries_iter()}
            qrels = (
                (
                    re.sub(r"\W", "_", name.removeprefix(corpus).strip("/")) or "test",
                    q.query_id,
                    {q.doc_id: q.relevance},
                )
                for name, dataset in datasets.items()
                for q in dataset.qrels_iter()
            )
            _write(folder, passages, queries, qrels)

    return _exported(dataset_name(corpus), write)


@contextlib.contextmanager
def _readable(ids: str) -> Iterator[None]:
    """A context that reports in one line whatever goes wrong in ir_datasets, which downloads and unpacks."""
    try:
        yield
    except KeyError:
        raise UserError(f"{IR_DATASETS}{ids}: no such dataset: see https://ir-datasets.com") from None
    except Exception as error:
        hint = "check the network, or what ir_datasets printed above"
        raise UserError(f"{IR_DATASETS}{ids}: cannot be had ({first_line(error)}): {hint}") from error


def _passage(doc) -> Passage:
    text = getattr(doc, "text", None) or getattr(doc, "body", None)
    if text and hasattr(doc, "title"):
        return Passage(doc.doc_id, doc.title or "", text)
    return Passage(doc.doc_id, "", doc.default_text())


def _exported(name: str, write: Callable[[Path], None]) -> Source:
    """Returns the source that `write` writes into a folder when its passages are asked for."""
    folders = []

    def passages(scratch: Path, errors: ErrorLog, shard_bytes: int) -> Passages:
        folders.append(scratch / name)
        write(folders[-1])
        return open_source(folders[-1]).passages(scratch, errors, shard_bytes)

    def queries(rows: FindRows, errors: ErrorLog) -> dict[str, list[Query]]:
        return open_source(folders[-1]).queries(rows, errors)

    return Source(name, (), passages, queries)


def _write(
    folder: Path,
    passages: Iterable[Passage],
    queries: Mapping[str, str],
    qrels: Iterable[tuple[str, str, Mapping[str, int]]],
) -> None:
    """Writes files in BEIR's layout.

    Args:
      folder: the new folder.
      passages: the passages.
      queries: query id -> text.
      qrels: (split, query id, passage id -> grade).
    """
    (folder / "qrels").mkdir(parents=True)
    dump = functools.partial(json.dumps, ensure_ascii=False)
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(f"{dump({'_id': p.id, 'title': p.title, 'text': p.text})}\n" for p in passages)
    with (folder / "queries.jsonl").open("w") as file:
        file.writelines(f"{dump({'_id': key, 'text': text})}\n" for key, text in queries.items())
    with contextlib.ExitStack() as stack:
        files = {}
        for split, query, grades in qrels:
            if split not in files:
                files[split] = stack.enter_context((folder / "qrels" / f"{split}.tsv").open("w"))
            files[split].writelines(f"{query}\t{passage}\t{grade}\n" for passage, grade in grades.items())
