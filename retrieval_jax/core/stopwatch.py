"""How long a thread spends in a part of its work, for those who measure the whole."""

import threading
import time


class Stopwatch:
    """Adds up the seconds of `with` blocks, in each thread for itself."""

    def __init__(self):
        self._local = threading.local()

    def __enter__(self) -> None:
        self._local.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._local.began
        self._local.seconds = getattr(self._local, "seconds", 0.0) + seconds

    def take(self) -> float:
        """Returns this thread's seconds since the last call."""
        seconds = getattr(self._local, "seconds", 0.0)
        self._local.seconds = 0.0
        return seconds


tokenizing = Stopwatch()
"""Runs while texts become tokens or terms."""
