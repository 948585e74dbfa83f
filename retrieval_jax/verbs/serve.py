"""The verb `serve`: searchers answer over HTTP."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import gin

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegativeFloat, Positive, PositiveFloat, Within
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.mesh.partitioning import make_partitioner


@gin.configurable
def serve(
    source: str,
    work_dir: str | None = None,
    searchers: Sequence[str] | None = None,
    exports: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: Annotated[int, Within(0, 65535)] = 8000,
    batch_sizes: Sequence[Positive] = (1, 8, 32),
    max_wait_ms: NonNegativeFloat = 4.0,
    max_waiting: Positive = 512,
    max_queue_seconds: PositiveFloat = 0.75,
    deadline_seconds: PositiveFloat = 10.0,
    max_hits: Positive = 1000,
    max_queries: Positive = 32,
    max_query_chars: Positive = 8192,
    max_payload_mb: PositiveFloat = 2.0,
    cache_mb: NonNegativeFloat = 64.0,
    log_queries: bool = False,
    cors_origins: Sequence[str] = (),
) -> None:
    """Serves searchers over HTTP, and a page to search with at http://127.0.0.1:8000/.

    GET /v1/SEARCHER/search?query=…&hits=10 finds passages, as Pyserini's server does; /docs describes all
    routes. /health, /ready and /metrics are for those who operate it. SIGHUP opens the searchers whose
    folders have changed, and SIGTERM (or Ctrl-C) ends it when what was asked is answered. With the
    environment variable RETRIEVAL_JAX_API_KEY, requests need that key (X-API-Key, or a Bearer token).

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      searchers: names of searchers, of searchers/; None for all that are there, () for none.
      exports: folders of exported searchers, each served under its folder's name.
      host: the address to listen on. 127.0.0.1 is reached from this machine alone; 0.0.0.0 from all others.
      port: the port; 0 for any that is free.
      batch_sizes: the numbers of queries that are searched for at once, ascending; each is compiled, and
        timed: batches of over 0.1 s are not made where smaller ones answer about as many queries a second.
      max_wait_ms: milliseconds that a query waits, at most, until as many wait as the last batch held; after
        a slow batch, until a tenth of its time has passed since its end. Until then it also waits where its
        batch would be padded. It never waits so for more than half of `deadline_seconds`.
      max_waiting: queries that may wait for a searcher; with more, requests are refused with status 429.
      max_queue_seconds: about how long the queries that wait may take together, by the searcher's pace: a
        slow one refuses earlier than `max_waiting` says, and is free again as soon after an overload.
      deadline_seconds: after so long in the queue, a query is dropped with status 503.
      max_hits: passages that a request may ask for.
      max_queries: queries that a request may have. Queries times hits may be 10,000, or `max_hits`.
      max_query_chars: characters of a query that are read. A response says if there were more.
      max_payload_mb: the size of a request's body; larger ones are refused with status 413.
      cache_mb: memory for answers of each searcher; 0 for none.
      log_queries: whether each query is written to the log.
      cors_origins: origins of web pages that may call the API, such as "https://example.org"; "*" for all.
    """
    # The web server's packages are imported by this verb alone: the others do not wait for them.
    from retrieval_jax.serving.batching import BatchSettings
    from retrieval_jax.serving.catalogue import Catalogue
    from retrieval_jax.serving.gate import MAX_BODIES
    from retrieval_jax.serving.server import serve_forever
    from retrieval_jax.serving.settings import API_KEY, ServeSettings

    if list(batch_sizes) != sorted(set(batch_sizes)) or not batch_sizes:
        raise UserError("serve.batch_sizes: they must ascend: --gin.serve.batch_sizes='(1, 8, 32)'")
    if max_queries > max_waiting:
        raise UserError(
            f"serve.max_queries: {max_queries} queries of a request never find room where {max_waiting} may "
            "wait: raise serve.max_waiting"
        )
    if max_payload_mb * 2**20 > MAX_BODIES:
        raise UserError(
            f"serve.max_payload_mb: {max_payload_mb:g} MB are more than the {MAX_BODIES >> 20} MB that all "
            "bodies may have together: choose less"
        )
    work = Workspace.for_source(source, work_dir)
    settings = ServeSettings(
        BatchSettings(
            tuple(batch_sizes), max_wait_ms / 1000, max_waiting, max_queue_seconds, deadline_seconds
        ),
        max_hits,
        max_queries,
        max_query_chars,
        round(max_payload_mb * 2**20),
        round(cache_mb * 2**20),
        os.environ.get(API_KEY) or None,
        log_queries,
        tuple(cors_origins),
    )
    folders = served_folders(work, searchers, exports)
    serve_forever(Catalogue(folders, work.collection, settings, make_partitioner), host, port)


def served_folders(
    work: Workspace, searchers: Sequence[str] | None, exports: Sequence[str]
) -> dict[str, Path]:
    """Finds the folders of the searchers to serve.

    Args:
      work: the work folder.
      searchers: names of its searchers; None for all.
      exports: folders of exported searchers.

    Returns:
      Name -> folder.

    Raises:
      UserError: a folder holds nothing finished, two have one name, or there are none at all.
    """
    if searchers is None:
        there = work.folder / "searchers"
        found = sorted(path.name for path in there.iterdir()) if there.is_dir() else []
        searchers = [name for name in found if name[0] != "." and storage.finished(work.searcher(name))]
    folders = {name: work.searcher(name) for name in searchers}
    for path in map(paths.as_path, exports):
        if path.name in folders:
            raise UserError(f"{path}: another searcher is called {path.name}: name the folder otherwise")
        folders[path.name] = path
    for folder in folders.values():
        storage.read_manifest(folder, "index")
    if not folders:
        raise UserError(f"{work.folder}: no searcher to serve: make one with `retrieval-jax index`")
    return folders
