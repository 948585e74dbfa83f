"""Dynamic batching: requests that wait for the same searcher at the same time are computed together.

A `Batcher` has a queue and a thread of its own, so that a slow searcher holds up no other. It takes the
oldest request and those of the same shape. If the last batch held several, more are likely to be on their
way, and it waits a few milliseconds for as many; after a slow batch, a tenth of that batch's time from its
end on, which it also waits where the next one would be padded. A lone request is computed at once.
"""

import asyncio
import collections
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence

from retrieval_jax.serving.cache import Cache
from retrieval_jax.serving.errors import NotReady, Overloaded
from retrieval_jax.serving.metrics import BatcherMetrics

PATIENCE = 0.1  # share of a batch's time for which, after its end, requests wait for others
LONG_BATCH = 0.1  # seconds from which on those who wait behind a batch feel it
WORTHWHILE = 0.9  # share of the best batch size's queries a second that a smaller one needs to take its place
Compute = Callable[[Hashable, Sequence[Hashable]], Sequence[object]]
"""(shape, the keys of a batch) -> one result a key. It runs in the batcher's thread."""


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """How requests are batched, and when they are refused.

    Attributes:
      sizes: the batch sizes that are compiled, ascending; the largest is the most that a batch holds. A
        batcher may leave out the largest ones; see `Batcher`.
      max_wait: seconds that the oldest request waits, at most, until as many wait as the last batch held.
        After a slow batch it may wait longer: until PATIENCE of that batch's time has passed since its end.
        Until then it also waits where its batch would be padded: until those that came during the last batch
        and as many as that one held are there, or the padded size is full. No wait lasts longer than half of
        `deadline`.
      max_waiting: requests that may wait; with more, new ones are refused (status 429).
      max_queue_seconds: about how long the requests that wait may take together, by the pace of the last
        batches: a slow searcher refuses earlier, so that it is free again soon after an overload. As many as
        the largest of `sizes` may always wait.
      deadline: seconds after which a request that still waits is dropped (status 503).
    """

    sizes: tuple[int, ...] = (1, 8, 32)
    max_wait: float = 0.004
    max_waiting: int = 512
    max_queue_seconds: float = 0.75
    deadline: float = 10.0


@dataclasses.dataclass(eq=False)
class _Item:
    """A request, or several identical ones, with the futures that wait for its result.

    The deadline is that of the first one.
    """

    shape: Hashable
    key: Hashable
    came: float
    deadline: float
    futures: list[asyncio.Future]


def worthwhile_sizes(sizes: Sequence[int], seconds: Sequence[float], longest: float) -> Sequence[int]:
    """Leaves out sizes whose batches take LONG_BATCH, if smaller ones answer about as many queries a second.

    On a CPU a batch takes nearly as long as its queries one by one: a larger one would only make everyone
    wait, and an overload end later. An accelerator computes a large batch in little more time.

    Args:
      sizes: batch sizes, ascending.
      seconds: how long a batch of each takes.
      longest: seconds of the largest batch from which on none is left out: in smaller ones, the last queries
        of so long a list would not begin before their deadline.

    Returns:
      The sizes that are left, at least the smallest.
    """
    if seconds[-1] > longest:
        return sizes
    pace = [size / max(taken, 1e-6) for size, taken in zip(sizes, seconds, strict=True)]
    for count in range(1, len(sizes)):
        if seconds[count] >= LONG_BATCH and pace[count - 1] >= WORTHWHILE * max(pace):
            return sizes[:count]
    return sizes


class Batcher:
    """Computes requests in batches, in a thread of its own. All methods belong to the event loop's thread.

    Args:
      name: the thread's name.
      compute: computes a batch; see `Compute`.
      settings: when requests are put together, and when refused.
      metrics: what is measured.
      cache: keeps results; None to compute every request.
      sizes: what `worthwhile_sizes` leaves of `settings.sizes`; () for all of them.
    """

    def __init__(
        self,
        name: str,
        compute: Compute,
        settings: BatchSettings,
        metrics: BatcherMetrics,
        cache: Cache | None = None,
        sizes: Sequence[int] = (),
    ):
        self.name, self._compute, self.settings = name, compute, settings
        self._sizes = sizes or settings.sizes
        self._metrics, self._cache = metrics, cache
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()
        self._wanted = 1  # the thread sleeps until so many wait
        self._took = 0.0  # seconds of the last batch
        self._closed = False
        self._busy_seconds, self._busy_queries = 0.0, 0.0  # of the last batches that left others waiting
        self._wake_is_due = False  # whether `_wake` is scheduled
        self._waiting: collections.deque[_Item] = collections.deque()
        self._in_flight: dict[tuple[Hashable, Hashable], _Item] = {}  # waiting or being computed
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread. Results go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        this = weakref.ref(self)  # the metrics live longer than a searcher that is replaced
        self._metrics.waiting(lambda: len(one._waiting) if (one := this()) else 0)
        self._thread.start()

    def submit(self, shape: Hashable, keys: Sequence[Hashable]) -> list[asyncio.Future]:
        """Queues requests: all of them, or none if the queue has no room for all.

        A request that is identical to one that waits or is being computed shares its result.

        Args:
          shape: requests of one shape may be in one batch.
          keys: the requests.

        Returns:
          A future of the result for each.

        Raises:
          Overloaded: too many requests wait.
          NotReady: the batcher is closed.
        """
        futures = [self._loop.create_future() for _ in keys]
        now, missing = time.monotonic(), []
        for key, future in zip(keys, futures, strict=True):
            known = None
            if self._cache is not None:
                known = self._cache.get((shape, key))
                self._metrics.looked_up(known is not None)
            if known is not None:
                future.set_result(known)
            else:
                missing.append((key, future))
        if missing:
            self._queue(shape, missing, now)
        return futures

    def _queue(self, shape: Hashable, missing: list[tuple[Hashable, asyncio.Future]], now: float) -> None:
        until = now + self.settings.deadline
        with self._changed:
            if self._closed:
                raise NotReady(f"{self.name}: the server is ending: ask another one")
            new = {key for key, _ in missing if (shape, key) not in self._in_flight}
            room = self._room()
            if len(self._waiting) + len(new) > room:
                raise Overloaded(
                    f"{self.name}: {len(self._waiting)} queries wait already, of {room} that may: ask again "
                    "after the seconds that Retry-After says"
                )
            for key, future in missing:
                item = self._in_flight.get((shape, key))
                if item is None:
                    item = self._in_flight[shape, key] = _Item(shape, key, now, until, [])
                    self._waiting.append(item)
                item.futures.append(future)
            if not self._wake_is_due:  # all requests of one turn of the event loop wake the thread up once
                self._wake_is_due = True
                self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        with self._changed:
            self._wake_is_due = False
            if len(self._waiting) >= self._wanted:
                self._changed.notify()

    def _room(self) -> int:
        """Gives how many requests may wait."""
        most = self.settings.max_waiting
        if not self._busy_seconds or not self._waiting:  # a list longer than a batch finds room, too
            return most
        in_time = int(self.settings.max_queue_seconds * self._busy_queries / self._busy_seconds)
        # A list of as many queries as a request may have finds room also where batches are smaller.
        return min(max(in_time, self.settings.sizes[-1]), most)

    def close(self) -> None:
        """Takes no more requests. Those that wait are still computed; then the thread ends."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    async def drained(self) -> None:
        """Waits, after `close`, until the thread has ended."""
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    def _run(self) -> None:
        last = 1  # size of the batch before
        while any(batch := self._next_batch(last)):
            items, late = batch
            if late:
                error = NotReady(
                    f"{self.name}: not begun within {self.settings.deadline:g} s, as the server is "
                    "overloaded: ask again"
                )
                self._metrics.dropped(len(late))
                self._loop.call_soon_threadsafe(self._deliver, [(item, error) for item in late])
            if items:
                last, now = len(items), time.monotonic()
                self._metrics.taken([now - item.came for item in items])
                results = self._results(items)
                self._loop.call_soon_threadsafe(self._deliver, [*zip(items, results, strict=True)])

    def _next_batch(self, last: int) -> tuple[list[_Item], list[_Item]]:
        """Waits for requests. Takes those of the next batch, and those whose deadline has passed.

        It takes none when it is closed and empty.
        """
        most, ended = self._sizes[-1], time.monotonic()
        with self._changed:
            came_meanwhile = min(len(self._waiting), most)  # while the last batch was computed
            self._wanted = 1
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._waiting:
                patient_until = ended + PATIENCE * self._took
                self._wait_for(last, max(self._waiting[0].came + self.settings.max_wait, patient_until))
                # Who was answered may ask again: seats that would be padded are kept for them.
                seats = next(size for size in self._sizes if size >= came_meanwhile)
                self._wait_for(min(last + came_meanwhile, seats), patient_until)
            taken, late, left, now = [], [], collections.deque(), time.monotonic()
            for item in self._waiting:
                if item.deadline < now:
                    late.append(item)
                    del self._in_flight[item.shape, item.key]  # who asks for it from now on waits anew
                elif len(taken) < most and (not taken or item.shape == taken[0].shape):
                    taken.append(item)
                else:
                    left.append(item)
            self._waiting = left
        return taken, late

    def _wait_for(self, count: int, until: float) -> None:
        """Waits until so many requests wait, or until a time.

        At half of the oldest one's deadline it ends, too: a request is not dropped while the thread is idle.
        """
        self._wanted = count
        until = min(until, self._waiting[0].came + self.settings.deadline / 2)
        while len(self._waiting) < count and not self._closed:
            if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                break

    def _results(self, items: list[_Item]) -> list[object]:
        """Computes a batch. If it fails, each request is computed alone: one of them may be the reason."""
        began = time.monotonic()
        try:
            return list(self._compute(items[0].shape, [item.key for item in items]))
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [self._results([item])[0] for item in items]
        finally:
            self._took = seconds = time.monotonic() - began
            self._metrics.computed(len(items), seconds)
            with self._changed:
                if self._waiting:  # of a batch that others wait behind: a lone request says less
                    self._busy_seconds = 0.8 * self._busy_seconds + seconds
                    self._busy_queries = 0.8 * self._busy_queries + len(items)

    def _deliver(self, outcomes: list[tuple[_Item, object]]) -> None:
        with self._changed:
            for item, _ in outcomes:
                if self._in_flight.get((item.shape, item.key)) is item:
                    del self._in_flight[item.shape, item.key]
        for item, outcome in outcomes:
            failed = isinstance(outcome, Exception)
            if not failed and self._cache is not None:
                self._cache.put((item.shape, item.key), outcome)
            for future in item.futures:
                if not future.done():
                    (future.set_exception if failed else future.set_result)(outcome)
