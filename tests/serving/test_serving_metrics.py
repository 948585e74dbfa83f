"""The metrics have one prefix, a registry of their own, and labels of few values."""

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from retrieval_jax.serving.metrics import Metrics


def test_metrics_of_a_queue():
    metrics = Metrics()
    queue = metrics.of("bm25")
    queue.taken([0.01, 0.02])
    queue.computed(2, 0.5)
    queue.dropped(3)
    queue.waiting(lambda: 7)
    for found in (True, False, True):
        queue.looked_up(found)
    families = {f.name: f for f in text_string_to_metric_families(metrics.page().decode())}
    assert all(name.startswith("retrieval_jax_") for name in families)
    assert not any(name in prometheus_client.generate_latest().decode() for name in families)
    values = {
        (sample.name, sample.labels.get("found", sample.labels.get("le"))): sample.value
        for family in families.values()
        for sample in family.samples
        if sample.labels.get("index") == "bm25"
    }
    assert values["retrieval_jax_queue_seconds_count", None] == 2
    assert values["retrieval_jax_queue_seconds_sum", None] == 0.03
    assert values["retrieval_jax_search_seconds_sum", None] == 0.5
    assert values["retrieval_jax_batch_size_bucket", "2.0"] == 1
    assert values["retrieval_jax_batch_size_bucket", "1.0"] == 0
    assert values["retrieval_jax_expired_total", None] == 3
    assert values["retrieval_jax_queue_length", None] == 7
    assert values["retrieval_jax_cache_lookups_total", "yes"] == 2
