"""The searchers that are served: opened, warmed, and replaced when their folders have changed."""

import asyncio
import contextlib
import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.stopwatch import tokenizing
from retrieval_jax.data.collection import Collection
from retrieval_jax.mesh.partitioning import Partitioner
from retrieval_jax.models.dual_encoder_network import shorten
from retrieval_jax.search.manifest import check_sources
from retrieval_jax.search.searcher import RankedList, Searcher, class_and_manifest
from retrieval_jax.serving.answers import candidates_json, vector_json
from retrieval_jax.serving.batching import Batcher, worthwhile_sizes
from retrieval_jax.serving.cache import Cache
from retrieval_jax.serving.errors import Invalid, NotFound, NotReady, Overloaded
from retrieval_jax.serving.metrics import Metrics
from retrieval_jax.serving.passages import NO_TEXT, PassageTexts
from retrieval_jax.serving.settings import MAX_UNDER_WAY, PASSAGES_BYTES, ServeSettings

WARM_UP = "warm up"  # the query with which the shapes are compiled
EXPLAINED = 100  # passages of an answer that are explained, at most
EMBEDDINGS = "embeddings"  # ends the label of the queue of a dual encoder's vectors


class SearchKey(NamedTuple):
    """What tells one request to a searcher from another of the same depth.

    Attributes:
      query: the text.
      docs: whether the passages' texts are wanted.
    """

    query: str
    docs: bool


class SearchShape(NamedTuple):
    """What the requests of one batch have in common.

    Attributes:
      depth: passages to find.
      explained: whether the answer is explained, too, which takes longer.
    """

    depth: int
    explained: bool


class VectorForm(NamedTuple):
    """How the texts of one batch are to be encoded.

    Attributes:
      encoding: "float" or "base64"; see `vector_json`.
      dimensions: how many of a vector's first dimensions are given.
    """

    encoding: str
    dimensions: int


@dataclasses.dataclass
class Served:
    """A searcher that answers requests.

    Attributes:
      name: its name in the API.
      folder: where it lies.
      manifest: the folder's manifest.
      fingerprint: a digest of the manifest: another one says that the searcher was replaced.
      searcher: the searcher.
      texts: the passages' texts; None where they are unknown.
      batcher: the queue of searches. Its results are tuples of JSON: whether the model truncates
        the query, the explanation, and the candidates; see `candidates_json`.
      embedder: the queue of texts to encode; None for searchers without a dual encoder.
      tokenized: takes the seconds that a batch of queries spent in the tokenizer.
      passages: those that it has been asked for and that are not answered yet.
      sizes: the batch sizes of searches, of the settings' ones; see `worthwhile_sizes`.
    """

    name: str
    folder: Path
    manifest: dict
    fingerprint: str
    searcher: Searcher
    texts: PassageTexts | None
    batcher: Batcher | None = None
    embedder: Batcher | None = None
    tokenized: Callable[[float], None] = lambda seconds: None
    passages: int = 0
    sizes: Sequence[int] = ()

    @contextlib.contextmanager
    def under_way(self, passages: int) -> Iterator[None]:
        """Counts the passages of a request while it is answered. A request that is alone may have any number.

        Raises:
          Overloaded: those of all requests would be more than MAX_UNDER_WAY.
        """
        if self.passages and self.passages + passages > MAX_UNDER_WAY:
            raise Overloaded(
                f"{self.name}: {self.passages:,} passages are being looked for already, of {MAX_UNDER_WAY:,} "
                "that may: ask again after the seconds that Retry-After says"
            )
        self.passages += passages
        try:
            yield
        finally:
            self.passages -= passages

    def search(self, shape: SearchShape, keys: Sequence[SearchKey]) -> list[tuple[bytes, ...]]:
        """Computes a batch: see `batching.Compute`."""
        tokenizing.take()
        ranked_lists = self.searcher.search([key.query for key in keys], shape.depth)
        self.tokenized(tokenizing.take())
        return [self._answer(shape, key, found) for key, found in zip(keys, ranked_lists, strict=True)]

    def _answer(self, shape: SearchShape, key: SearchKey, ranked_list: RankedList) -> tuple[bytes, ...]:
        why = self.searcher.explain(key.query, ranked_list[:EXPLAINED]) if shape.explained else None
        truncated = self.searcher.truncates(key.query)
        ids = [passage_id for passage_id, _ in ranked_list]
        docs = self.texts.json(ids) if self.texts and key.docs else [NO_TEXT] * len(ids)
        return (
            b"true" if truncated else b"false",
            b"null" if why is None else json.dumps(why).encode(),
            *candidates_json(ranked_list, docs),
        )

    def vector_form(self, encoding: str, dimensions: int | None) -> VectorForm:
        """Gives the form of vectors that is asked for. Raises Invalid where they have fewer dimensions."""
        whole = self.searcher.dimensions
        if dimensions and dimensions > whole:
            raise Invalid(f"dimensions: {dimensions}, and {self.name}'s vectors have {whole}: ask for fewer")
        return VectorForm(encoding, dimensions or whole)

    def embed(self, form: VectorForm, texts: Sequence[str]) -> list[tuple[bytes, ...]]:
        """Encodes a batch of texts.

        Returns:
          For each, as JSON: a vector, as `form` says, the number of tokens that were read, and whether there
          were more.
        """
        encoder = self.searcher.encoder
        vectors = shorten(encoder(texts), form.dimensions, encoder.normalize)
        counts = [len(tokens) + 1 for tokens in encoder.vocabulary.encode_all(texts)]  # with the end
        return [
            (
                vector_json(vector, form.encoding),
                b"%d" % min(count, encoder.length),
                b"true" if count > encoder.length else b"false",
            )
            for vector, count in zip(vectors, counts, strict=True)
        ]

    def start(self, settings: ServeSettings, metrics: Metrics) -> None:
        """Starts the threads of the queues."""
        cache = Cache(settings.cache_bytes) if settings.cache_bytes else None
        self.tokenized = metrics.tokenize_seconds.labels(self.name).observe
        measured = metrics.of(self.name)
        self.batcher = Batcher(self.name, self.search, settings.batching, measured, cache, self.sizes)
        self.batcher.start()
        if hasattr(self.searcher, "encoder") and self.searcher.model_family == "dual encoder":
            label = f"{self.name}/{EMBEDDINGS}"
            self.embedder = Batcher(label, self.embed, settings.batching, metrics.of(label))
            self.embedder.start()

    def close(self) -> list[Batcher]:
        """Takes no more requests; returns the queues that still compute what waits."""
        queues = [queue for queue in (self.batcher, self.embedder) if queue]
        for queue in queues:
            queue.close()
        return queues

    def info(self) -> dict:
        """Describes the searcher, for /v1/info."""
        recipe = self.manifest["recipe"]
        collection = self.texts.collection if self.texts else None
        return {
            "name": self.name,
            "kind": self.manifest["kind"],
            "family": type(self.searcher).family,
            "collection": collection.name if collection else None,
            "collection_fingerprint": recipe.get("collection"),
            "passages": collection.passage_count if collection else self.manifest.get("passages"),
            "parameters": self.manifest.get("parameters"),
            "beams": self.manifest.get("beams"),
            "dimensions": self.manifest.get("dimensions"),
            "step": self.manifest.get("step"),
            "embeddings": self.embedder is not None,
            "fingerprint": self.fingerprint,
        }


class Catalogue:
    """The searchers of a server, by name.

    Args:
      folders: name -> the searcher's folder.
      collection: the folder of the collection that has the passages' texts; None for none.
      settings: the server's settings.
      make_partitioner: see `Searcher.open`.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        collection: Path | None,
        settings: ServeSettings,
        make_partitioner: Callable[[], Partitioner] | None = None,
    ):
        self.folders, self.settings = dict(folders), settings
        self.metrics = Metrics()
        self.texts: PassageTexts | None = None
        self.closing = False
        self.failure: str | None = None  # why a searcher could not be opened at the start
        self.on_ready: Callable[[], None] = lambda: None  # called when all searchers are warm
        self.unsent: Callable[[], int] = lambda: 0  # bytes of responses that clients have not read
        self._collection, self._make_partitioner = collection, make_partitioner
        self._served: dict[str, Served] = {}
        self._opening = asyncio.Lock()
        if collection is not None:
            # TFDS replaces `__import__` while it is imported, also for other threads: it is imported before
            # there are any.
            from tensorflow_datasets import builder_from_directory  # noqa: F401

    @property
    def ready(self) -> bool:
        """Whether every searcher is open and warm, and the server is not ending."""
        return not self.closing and len(self._served) == len(self.folders)

    @property
    def missing(self) -> list[str]:
        """The searchers that are not open yet."""
        return [name for name in self.folders if name not in self._served]

    def all(self) -> list[Served]:
        """Returns the searchers that are open."""
        return [self._served[name] for name in self.folders if name in self._served]

    def get(self, name: str) -> Served:
        """Returns a searcher.

        Raises:
          NotFound: there is none of that name.
          NotReady: it is not open yet.
        """
        if (served := self._served.get(name)) is not None:
            return served
        if name in self.folders:
            raise NotReady(f"{name}: being opened: ask again")
        raise NotFound(f"no searcher of this name: choose one of {', '.join(self.folders)}")

    async def open_first(self) -> None:
        """Opens all searchers, or none after the first that cannot be opened: `failure` says why.

        To open one may take minutes, so what is wrong with any of them is looked for before, as far as their
        manifests show it.
        """
        for step in (self._check, self._open_if_changed):
            outcomes = await self._for_each(step, until_failure=True)
            self.failure = next(filter(None, outcomes.values()), None)
            if self.failure:
                return
        if self.ready:
            self.on_ready()

    async def open_changed(self) -> dict[str, str | None]:
        """Opens the searchers that are new or were replaced on disk, each in its turn, and warms them.

        Requests are answered by the old one until the new one is warm. The old one answers those that it has
        taken. Where the new one cannot be opened, the old one stays.

        Returns:
          Name -> None if it was opened, or the reason why it could not be.
        """
        return await self._for_each(self._open_if_changed)

    async def _for_each(
        self, step: Callable[[str], Served | None], until_failure: bool = False
    ) -> dict[str, str | None]:
        """Does a step for each name, in a thread, and serves what it returns; see `open_changed`."""
        outcomes: dict[str, str | None] = {}
        async with self._opening:
            for name in self.folders:
                if self.closing or (until_failure and any(outcomes.values())):
                    break
                try:
                    new = await asyncio.to_thread(step, name)
                    if new is not None:
                        self._replace(new)
                        outcomes[name] = None
                except UserError as error:
                    outcomes[name] = str(error).splitlines()[0]
                except Exception as error:  # such as memory that an accelerator does not have
                    log(traceback.format_exc())
                    outcomes[name] = f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return outcomes

    def _check(self, name: str) -> None:
        """Raises UserError if a searcher's kind is unknown, or if what it was made of was replaced since."""
        folder = self.folders[name]
        _, manifest = class_and_manifest(folder)
        check_sources(folder, manifest)

    def _open_if_changed(self, name: str) -> Served | None:
        """Opens and warms a searcher; None if it is the one that is open."""
        folder = self.folders[name]
        manifest = storage.read_manifest(folder, "index")
        fingerprint = storage.digest([json.dumps(manifest, sort_keys=True)])
        old = self._served.get(name)
        texts = self._texts_of(manifest["recipe"].get("collection"))
        if old is not None and old.fingerprint == fingerprint:
            old.texts = texts or old.texts
            return None
        searcher = Searcher.open(folder, self._make_partitioner)
        searcher.use_batch_sizes(self.settings.batching.sizes)
        served = Served(name, folder, manifest, fingerprint, searcher, texts)
        self._warm(served)
        return served

    def _texts_of(self, fingerprint: str | None) -> PassageTexts | None:
        """Returns the texts of a searcher's collection; None if it is not the collection that is there.

        Where its passages or queries are others than before, `texts` are those of now.
        """
        if self._collection is None or not storage.finished(self._collection):
            return None
        collection = Collection(self._collection)
        known = self.texts and self.texts.collection
        if known is None or known.recipe(*known.query_counts) != collection.recipe(*collection.query_counts):
            self.texts = PassageTexts(collection, PASSAGES_BYTES)
        return self.texts if self.texts.collection.fingerprint == fingerprint else None

    def _warm(self, served: Served) -> None:
        """Runs each shape once, so that no request waits for the compiler, and chooses `Served.sizes`."""
        sizes = self.settings.batching.sizes
        for depth in self.settings.depths:
            for size in sizes:
                if self.closing:
                    return
                found = served.searcher.search([WARM_UP] * size, depth)
            served.searcher.explain(WARM_UP, found[0][:EXPLAINED])
        seconds = []
        for size in sizes:
            tries = []
            for _ in range(2):  # of which the quicker one was disturbed less
                if self.closing:
                    return
                began = time.monotonic()
                served.searcher.search([WARM_UP] * size, self.settings.depths[0])
                tries.append(time.monotonic() - began)
            seconds.append(min(tries))
        served.sizes = worthwhile_sizes(sizes, seconds, self.settings.batching.deadline / 2)

    def _replace(self, new: Served) -> None:
        new.start(self.settings, self.metrics)
        old = self._served.get(new.name)
        self._served[new.name] = new
        if old is not None:
            log(f"{new.name}: replaced")
            old.close()

    async def close(self) -> None:
        """Answers what was taken, and ends the threads."""
        self.closing = True
        queues = [queue for served in self._served.values() for queue in served.close()]
        for queue in queues:
            await queue.drained()
