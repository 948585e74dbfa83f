"""The queue of a searcher: what is put together, shared, refused and dropped."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Sequence

import pytest

from retrieval_jax.serving import batching
from retrieval_jax.serving.batching import Batcher, BatchSettings, worthwhile_sizes
from retrieval_jax.serving.cache import Cache
from retrieval_jax.serving.errors import NotReady, Overloaded
from retrieval_jax.serving.metrics import Metrics

pytestmark = pytest.mark.anyio


class Recorder:
    """Computes nothing but (shape, key), keeps the batches, and waits where it is told to."""

    def __init__(self):
        self.batches: list[tuple[object, list]] = []
        self.go = threading.Event()
        self.go.set()
        self.began = threading.Event()

    def __call__(self, shape: object, keys: Sequence) -> list[tuple[bytes, ...]]:
        self.batches.append((shape, list(keys)))
        self.began.set()
        assert self.go.wait(10)
        if "bad" in keys:
            raise ValueError("a bad one")
        return [(f"{shape}:{key}".encode(),) for key in keys]


def batcher(compute: Recorder, cache: Cache | None = None, **settings: object) -> Batcher:
    made = Batcher("test", compute, BatchSettings(**settings), Metrics().of("test"), cache)
    made.start()
    return made


class Slow(Recorder):
    """Takes `seconds` for a batch."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def __call__(self, shape: object, keys: Sequence) -> list[tuple[bytes, ...]]:
        time.sleep(self.seconds)
        return super().__call__(shape, keys)


async def held(compute: Recorder, made: Batcher) -> asyncio.Future:
    """Submits a request whose computation waits for `compute.go`."""
    compute.go.clear()
    (first,) = made.submit(1, ["first"])
    await asyncio.to_thread(compute.began.wait, 10)
    return first


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        ((0.03, 0.14, 0.56), (1, 8)),  # a CPU: 57 queries a second in either
        ((0.03, 0.04, 0.11), (1, 8, 32)),  # an accelerator: 200, then 291
        ((0.12, 0.96, 3.84), (1,)),
        ((0.4, 3.2, 12.8), (1, 8, 32)),  # one by one the last of 32 would begin after 12 s
        ((0.003, 0.024, 0.096), (1, 8, 32)),  # no one waits long for these
    ],
)
def test_a_long_batch_has_to_answer_more_queries_a_second_than_a_shorter_one(seconds, sizes):
    assert worthwhile_sizes((1, 8, 32), seconds, 5.0) == sizes


async def test_a_lone_request_is_computed_at_once_and_those_that_come_meanwhile_together():
    compute = Recorder()
    made = batcher(compute, sizes=(1, 4), max_wait=60)
    first = await held(compute, made)
    others = [future for key in "abcdef" for future in made.submit(1, [key])]
    compute.go.set()
    assert await first == (b"1:first",)
    assert [await future for future in others[:4]] == [(f"1:{key}".encode(),) for key in "abcd"]
    # The last batch held four, so two more are waited for; they come, and all four are one batch.
    later = made.submit(1, ["g", "h"])
    assert [await future for future in [*others[4:], *later]] == [(f"1:{k}".encode(),) for k in "efgh"]
    assert compute.batches == [(1, ["first"]), (1, [*"abcd"]), (1, [*"efgh"])]


async def test_it_waits_for_others_no_longer_than_it_may():
    compute = Recorder()
    made = batcher(compute, sizes=(1, 4), max_wait=0.05)
    await asyncio.gather(*made.submit(1, [*"abcd"]))
    began = time.monotonic()
    await made.submit(1, ["alone"])[0]
    assert time.monotonic() - began >= 0.05
    assert compute.batches[-1] == (1, ["alone"])


async def test_after_a_slow_batch_it_waits_a_share_of_its_time(monkeypatch):
    monkeypatch.setattr(batching, "PATIENCE", 1000)
    compute = Slow(0.01)
    made = batcher(compute, sizes=(1, 4), max_wait=0)
    await asyncio.gather(*made.submit(1, [*"abcd"]))
    early = made.submit(1, ["e"])
    await asyncio.sleep(0.05)
    await asyncio.gather(*early, *made.submit(1, [*"fgh"]))
    assert compute.batches == [(1, [*"abcd"]), (1, [*"efgh"])]


async def test_a_slow_batch_is_waited_for_no_longer_than_a_share_of_its_time_after_its_end(monkeypatch):
    monkeypatch.setattr(batching, "PATIENCE", 10)
    compute = Slow(0.05)
    made = batcher(compute, sizes=(1, 4), max_wait=0)
    began = time.monotonic()
    await asyncio.gather(*made.submit(1, [*"abcd"]))
    patience = batching.PATIENCE * (time.monotonic() - began)  # or less: the batch took no longer
    await asyncio.sleep(patience + 0.1)
    late = made.submit(1, ["e"])
    await asyncio.wait(late, timeout=0.4)  # a share of the batch's time from now on would be 0.5 s or more
    await asyncio.gather(*late, *made.submit(1, ["f"]))
    assert compute.batches == [(1, [*"abcd"]), (1, ["e"]), (1, ["f"])]


@pytest.mark.parametrize(("patience", "max_wait"), [(1e9, 0), (0.1, 60)])
async def test_no_request_is_dropped_as_it_waits_for_others(monkeypatch, patience, max_wait):
    monkeypatch.setattr(batching, "PATIENCE", patience)
    compute = Slow(0.001)
    made = batcher(compute, sizes=(1, 4), max_wait=max_wait, deadline=0.4)
    await asyncio.gather(*made.submit(1, [*"abcd"]))
    assert await made.submit(1, ["alone"])[0] == (b"1:alone",)


async def test_no_request_is_dropped_as_it_waits_for_seats_that_would_be_padded(monkeypatch):
    monkeypatch.setattr(batching, "PATIENCE", 1e9)
    compute = Recorder()
    made = batcher(compute, sizes=(1, 4), max_wait=0, deadline=0.4)
    first = await held(compute, made)
    others = made.submit(1, ["a", "b"])
    compute.go.set()
    assert await asyncio.gather(first, *others) == [(b"1:first",), (b"1:a",), (b"1:b",)]
    assert compute.batches == [(1, ["first"]), (1, ["a", "b"])]


async def test_seats_that_would_be_padded_are_kept_for_those_who_were_answered(monkeypatch):
    monkeypatch.setattr(batching, "PATIENCE", 1000)
    compute = Recorder()
    made = batcher(compute, sizes=(1, 4), max_wait=0)
    first = await held(compute, made)
    early = made.submit(1, ["a", "b"])
    await asyncio.sleep(0.02)
    compute.go.set()
    await first
    await asyncio.sleep(0.05)
    await asyncio.gather(*early, *made.submit(1, ["c"]))
    assert compute.batches == [(1, ["first"]), (1, [*"abc"])]


async def test_requests_of_one_turn_of_the_event_loop_are_one_batch():
    compute = Recorder()
    made = batcher(compute, sizes=(1, 4), max_wait=0)
    await asyncio.sleep(0.02)  # now the thread waits
    futures = []
    for key in "abcd":
        futures += made.submit(1, [key])
        time.sleep(0.005)  # had it been woken up, it would take what is there
    await asyncio.gather(*futures)
    assert compute.batches == [(1, [*"abcd"])]


async def test_shapes_are_not_mixed_and_the_oldest_goes_first():
    compute = Recorder()
    made = batcher(compute, max_wait=0)
    first = await held(compute, made)
    futures = [made.submit(shape, [key])[0] for shape, key in ((1, "a"), (2, "b"), (1, "c"), (2, "d"))]
    compute.go.set()
    await asyncio.gather(first, *futures)
    assert compute.batches[1:] == [(1, ["a", "c"]), (2, ["b", "d"])]


async def test_identical_requests_share_one_computation_and_later_ones_the_cache():
    compute = Recorder()
    made = batcher(compute, Cache(10_000), max_wait=0)
    first = await held(compute, made)
    same = [*made.submit(1, ["first"]), *made.submit(1, ["a", "a"]), *made.submit(1, ["a"])]
    compute.go.set()
    results = await asyncio.gather(first, *same)
    assert results == [(b"1:first",)] * 2 + [(b"1:a",)] * 3
    (cached,) = made.submit(1, ["a"])
    assert cached.done()
    assert await cached == (b"1:a",)
    assert await made.submit(2, ["a"])[0] == (b"2:a",)  # of another shape
    assert compute.batches == [(1, ["first"]), (1, ["a"]), (2, ["a"])]


@pytest.mark.parametrize("several", [False, True])
async def test_the_queue_has_a_bound_for_one_request_as_for_many(several):
    compute = Recorder()
    made = batcher(compute, max_wait=0, max_waiting=4)
    first = await held(compute, made)
    futures = made.submit(1, [*"abc"])
    with pytest.raises(Overloaded, match="3 queries wait already, of 4 that may"):
        made.submit(1, ["d", "e"])
    futures += made.submit(1, ["d"])
    with pytest.raises(Overloaded):
        made.submit(1, [*"ef"] if several else ["e"])
    futures += made.submit(1, [*"abcd"])  # what waits already takes no room
    compute.go.set()
    assert len(await asyncio.gather(first, *futures)) == 9
    assert await made.submit(1, ["e"])[0] == (b"1:e",)


async def test_a_slow_searcher_refuses_what_it_could_not_answer_soon():
    class SlowByQuery(Recorder):
        def __call__(self, shape: object, keys: Sequence) -> list[tuple[bytes, ...]]:
            time.sleep(0.02 * len(keys))
            return super().__call__(shape, keys)

    made = batcher(SlowByQuery(), sizes=(1, 2), max_waiting=100, max_queue_seconds=0.2)
    await asyncio.gather(*made.submit(1, [*range(20)]))  # its pace is not known yet: all may wait
    busy = made.submit(1, [*"busily"])  # nothing waits, so that all may
    with pytest.raises(Overloaded, match=r"of (9|10|[2-8]) that may"):  # 0.2 s at 20 ms or more a query
        made.submit(1, [*range(100, 120)])
    await asyncio.gather(*busy)
    assert await made.submit(1, ["again"])[0] == (b"1:again",)


async def test_what_waited_longer_than_its_deadline_is_dropped_before_it_is_computed():
    compute = Recorder()
    made = batcher(compute, max_wait=0, deadline=0.02)
    first = await held(compute, made)
    (late,) = made.submit(1, ["late"])
    await asyncio.sleep(0.05)
    (fresh,) = made.submit(1, ["fresh"])
    compute.go.set()
    with pytest.raises(NotReady, match="not begun within"):
        await late
    assert await first == (b"1:first",)
    assert await fresh == (b"1:fresh",)
    assert compute.batches == [(1, ["first"]), (1, ["fresh"])]


async def test_a_request_that_fails_fails_alone():
    compute = Recorder()
    made = batcher(compute, Cache(10_000), max_wait=0)
    first = await held(compute, made)
    futures = made.submit(1, ["a", "bad", "b"])
    compute.go.set()
    results = await asyncio.gather(first, *futures, return_exceptions=True)
    assert [results[0], results[1], results[3]] == [(b"1:first",), (b"1:a",), (b"1:b",)]
    assert str(results[2]) == "a bad one"
    with pytest.raises(ValueError, match="a bad one"):
        await made.submit(1, ["bad"])[0]  # it is not kept


async def test_closed_it_computes_what_it_has_taken():
    compute = Recorder()
    made = batcher(compute, sizes=(1, 2), max_wait=60)
    first = await held(compute, made)
    futures = made.submit(1, [*"abc"])
    made.close()
    with pytest.raises(NotReady, match="the server is ending"):
        made.submit(1, ["d"])
    compute.go.set()
    await made.drained()
    assert await asyncio.gather(first, *futures) == [(f"1:{key}".encode(),) for key in ("first", *"abc")]


async def test_who_asks_again_after_the_deadline_is_computed_and_who_joins_moves_no_deadline():
    compute = Recorder()
    made = batcher(compute, max_wait=0, deadline=0.2)
    first = await held(compute, made)
    (early,) = made.submit(1, ["a"])
    await asyncio.sleep(0.15)
    (joined,) = made.submit(1, ["a"])
    await asyncio.sleep(0.1)  # later than the first one's deadline, earlier than that of the second
    (other,) = made.submit(2, ["b"])
    compute.go.set()
    for late in (early, joined):
        with pytest.raises(NotReady, match="not begun within"):
            await late
    assert await first == (b"1:first",)
    assert await other == (b"2:b",)
    assert await made.submit(1, ["a"])[0] == (b"1:a",)
    assert compute.batches == [(1, ["first"]), (2, ["b"]), (1, ["a"])]


async def test_the_metrics_do_not_keep_a_batcher_that_has_ended_in_memory():
    metrics = Metrics()
    made = Batcher("test", Recorder(), BatchSettings(), metrics.of("test"))
    made.start()
    await made.submit(1, ["a"])[0]
    assert metrics.registry.get_sample_value("retrieval_jax_queue_length", {"index": "test"}) == 0
    made.close()
    await made.drained()
    ended = weakref.ref(made)
    del made
    await asyncio.sleep(0)  # the loop lets go of its last call
    gc.collect()
    assert ended() is None
    assert metrics.registry.get_sample_value("retrieval_jax_queue_length", {"index": "test"}) == 0
