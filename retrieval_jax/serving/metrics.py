"""What Prometheus reads at /metrics. Labels have few values: routes, statuses and the names of searchers."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "retrieval_jax"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of a server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        make = {"namespace": PREFIX, "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ("route", "status"), **make)
        self.seconds = Histogram(
            "request_seconds", "Time of a request in the server.", ("route",), buckets=SECONDS, **make
        )
        index = ("index",)
        self.queue_seconds = Histogram(
            "queue_seconds", "Time that a query waited for its batch.", index, buckets=SECONDS, **make
        )
        self.tokenize_seconds = Histogram(
            "tokenize_seconds", "Time of a batch in the tokenizer.", index, buckets=SECONDS, **make
        )
        self.search_seconds = Histogram(
            "search_seconds", "Time of a batch in the searcher.", index, buckets=SECONDS, **make
        )
        self.batch_size = Histogram(
            "batch_size", "Queries of a batch.", index, buckets=(1, 2, 4, 8, 16, 32, 64, 128), **make
        )
        self.queue_length = Gauge("queue_length", "Queries that wait.", index, **make)
        self.cached = Counter("cache_lookups", "Queries looked up in the cache.", ("index", "found"), **make)
        self.expired = Counter("expired", "Queries dropped after their deadline.", index, **make)

    def of(self, index: str) -> "BatcherMetrics":
        """Returns the metrics of one queue."""
        return BatcherMetrics(self, index)

    def page(self) -> bytes:
        """Returns the page in Prometheus's text format."""
        return generate_latest(self.registry)


class BatcherMetrics:
    """The metrics of one queue, with its label bound once.

    Args:
      metrics: the server's.
      index: the label: the name of a searcher, from the server's own list.
    """

    def __init__(self, metrics: Metrics, index: str):
        self._queue_seconds = metrics.queue_seconds.labels(index)
        self._search_seconds = metrics.search_seconds.labels(index)
        self._batch_size = metrics.batch_size.labels(index)
        self._found = [metrics.cached.labels(index, found) for found in ("no", "yes")]
        self._expired = metrics.expired.labels(index)
        self.waiting = metrics.queue_length.labels(index).set_function  # takes a function that counts them

    def looked_up(self, found: bool) -> None:
        """Counts a look into the cache."""
        self._found[found].inc()

    def taken(self, seconds: Sequence[float]) -> None:
        """Records how long the queries of a batch waited."""
        for value in seconds:
            self._queue_seconds.observe(value)

    def dropped(self, count: int) -> None:
        """Counts queries that were dropped."""
        if count:
            self._expired.inc(count)

    def computed(self, size: int, seconds: float) -> None:
        """Records a batch and its time in the searcher."""
        self._batch_size.observe(size)
        self._search_seconds.observe(seconds)
