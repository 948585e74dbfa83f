"""A stopwatch adds up, and starts anew, in each thread for itself."""

import threading
import time

from retrieval_jax.core.stopwatch import Stopwatch


def test_each_thread_has_its_own_seconds():
    watch, other = Stopwatch(), []

    def work(seconds: float) -> float:
        for _ in range(2):
            with watch:
                time.sleep(seconds)
        return watch.take()

    thread = threading.Thread(target=lambda: other.append(work(0.04)))
    thread.start()
    mine = work(0.01)
    thread.join()
    assert 0.02 <= mine < other[0]
    assert other[0] >= 0.08
    assert watch.take() == 0
