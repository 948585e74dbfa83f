"""The settings of a server: what it takes, and what it refuses."""

import dataclasses

from retrieval_jax.serving.batching import BatchSettings

PASSAGES_BYTES = 64 << 20  # of passages that are kept
MAX_PASSAGES = 10_000  # of one response, all its queries together, unless `max_hits` is more
MAX_UNDER_WAY = 100_000  # passages that a searcher has been asked for and that are not answered yet
DEPTHS = (10, 100)  # passages that searches look for, beside the most that a request may ask for
API_KEY = "RETRIEVAL_JAX_API_KEY"  # environment variable


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """The limits of requests, and how they are batched.

    Attributes:
      batching: sizes and waiting times of batches, the bound of the queue, and the deadline.
      max_hits: passages that a request may ask for.
      max_queries: queries of one request.
      max_query_chars: characters of a query that are read; the response says that the rest was not.
      max_payload_bytes: bytes of a request's body; with more, it is refused (status 413).
      cache_bytes: answers that are kept for each searcher; 0 for none.
      api_key: the key that requests must bring; None for no key.
      log_queries: whether queries are written to the log.
      cors_origins: origins whose pages may call the API, or "*".
    """

    batching: BatchSettings = dataclasses.field(default_factory=BatchSettings)
    max_hits: int = 1000
    max_queries: int = 32
    max_query_chars: int = 8192
    max_payload_bytes: int = 2 << 20
    cache_bytes: int = 64 << 20
    api_key: str | None = None
    log_queries: bool = False
    cors_origins: tuple[str, ...] = ()

    @property
    def depths(self) -> list[int]:
        """The numbers of passages that searches look for: each is compiled once."""
        return [*(depth for depth in DEPTHS if depth < self.max_hits), self.max_hits]

    @property
    def max_passages(self) -> int:
        """The most passages of a response: its queries times its hits."""
        return max(MAX_PASSAGES, self.max_hits)

    def depth(self, hits: int) -> int:
        """Returns the smallest of `depths` that holds `hits` passages."""
        return next(depth for depth in self.depths if depth >= hits)
