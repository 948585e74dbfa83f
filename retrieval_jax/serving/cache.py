"""A cache with a bound in bytes: what was used longest ago makes room."""

import collections
import sys
import threading
from collections.abc import Hashable

Bytes = bytes | tuple[bytes, ...]
ENTRY = 300  # bytes that an entry takes beside its key and its value


class Cache:
    """Keeps the newest of what was computed, as bytes. Any thread may use it.

    Args:
      max_bytes: the most that keys and values take together, with `ENTRY` bytes each; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self._entries: collections.OrderedDict[Hashable, tuple[Bytes, int]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Bytes | None:
        """Returns the value of a key, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Bytes) -> None:
        """Keeps a value, and drops those that were used longest ago if there is no room."""
        size = ENTRY + size_of(key) + size_of(value)
        if size > self.max_bytes:
            return
        with self._lock:
            if (old := self._entries.pop(key, None)) is not None:
                self.bytes -= old[1]
            self._entries[key] = value, size
            self.bytes += size
            while self.bytes > self.max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed


def size_of(value: object) -> int:
    """Returns the bytes of memory that a value takes, with the parts of a tuple."""
    parts = sum(map(size_of, value)) if isinstance(value, tuple) else 0
    return sys.getsizeof(value) + parts
