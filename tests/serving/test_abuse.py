"""Four times the load that a searcher can answer, beside clients that no server wants: nothing breaks."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_abused_it_refuses_what_it_must_keeps_its_memory_and_recovers(start, collection, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _abuse

    process, address = start("--gin.serve.searchers=('bm25', 'naive')", "--gin.serve.cache_mb=0")
    queries = [query.text for query in collection.queries("train")]
    report = _abuse.run(process, address.removeprefix("http://"), "naive", queries, seconds=8)
    statuses = report["statuses"]
    seen = {status for of in statuses.values() for status in of}
    assert seen <= {"0", "200", "400", "413", "422", "429", "431", "503"}
    assert {*statuses["k of 0"], *statuses["k of -1"], *statuses["k of 10⁹"]} == {"422"}
    assert statuses["10,000 queries"].keys() == {"422"}
    assert statuses["3 MB body"].keys() == {"413"}
    assert statuses["1 MB address"].keys() == {"431"}
    assert statuses["not HTTP"].keys() == {"400"}
    assert statuses["broken UTF-8 in JSON"].keys() == {"400"}
    for what in ("1 MB query", "a million spaces", "NULs", "broken UTF-8", "flood"):
        assert statuses[what].keys() <= {"200", "429", "503"}, what
    assert statuses["another searcher"].keys() == {"200"}
    # 64 MB of bodies that are being read, 64 MB of answers that are not, and what a hundred requests take.
    assert report["mb_at_most"] < report["mb_before"] + 160
    assert report["recovered_seconds"] <= 5
    assert process.poll() is None
